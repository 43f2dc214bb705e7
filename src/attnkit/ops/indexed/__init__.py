"""Attention over groups and positions: dropped keys and queries, hash buckets, any packing of rows."""
