"""Kernels of ragged decode attention; loading this loads Triton."""
