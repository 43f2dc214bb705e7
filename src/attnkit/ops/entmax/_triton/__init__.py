"""Kernels of entmax; loading this loads Triton."""
