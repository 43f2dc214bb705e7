"""Moments of queries before rotation: what the first two sums of a Gaussian of queries are made of."""
