"""A fit on a CUDA device: resident store, captured steps, compiled kernels."""
