"""The target's pass on CPUs: kernels of our own, packed weights, one compiled graph."""
