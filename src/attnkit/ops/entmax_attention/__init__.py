"""Attention whose rows are normalised by alpha-entmax."""
