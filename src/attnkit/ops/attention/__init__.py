"""Dense, windowed, packed and query-sparse softmax attention."""
