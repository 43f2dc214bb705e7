"""Attention of a few new queries over stored keys in pages, every head with a number of its own."""
