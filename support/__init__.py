"""What any trainer needs, and nothing of the paper."""
