"""Small parts that several kernels share."""
