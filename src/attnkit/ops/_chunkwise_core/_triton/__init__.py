"""The kernels of recurrences in chunks: gates, walk (states), outputs, and those of the backward pass."""
