"""Kernels of query moments; loading this loads Triton."""
