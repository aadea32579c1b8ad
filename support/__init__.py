"""What any trainer needs and none of it is the paper: files, checkpoints, kernels, decoding, ranks, runs, flags."""
