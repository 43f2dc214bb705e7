"""Kernels of recurrences; loading this loads Triton."""
