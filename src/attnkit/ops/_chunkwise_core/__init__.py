"""What recurrences with gated states share: chunk tables, states, passes over chunks, private torch operators."""
