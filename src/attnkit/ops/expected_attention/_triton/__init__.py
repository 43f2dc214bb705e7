"""Kernels of expected attention; loading this loads Triton."""
