"""What makes passes fast on CUDA devices: kernels in Triton, and passes replayed as graphs."""
