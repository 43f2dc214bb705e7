"""The attention core: what every softmax-like attention operator of attnkit is an instance of."""
