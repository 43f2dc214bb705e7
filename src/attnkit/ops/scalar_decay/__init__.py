"""Linear attention whose state decays by one number for each head: constant (lightning) or one for each token."""
