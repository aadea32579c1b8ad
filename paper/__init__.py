"""What the paper compares with and measures: baselines, benchmarks, tables and figures, the token explorer."""
