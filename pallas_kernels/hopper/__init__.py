"""What kernels for Hopper GPUs are built from. Knows no operator."""
