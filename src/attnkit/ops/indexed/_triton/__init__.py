"""Kernels that order rows; loading this loads Triton."""
