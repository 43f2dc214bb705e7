"""Alpha-entmax, sparse probabilities from scores."""
