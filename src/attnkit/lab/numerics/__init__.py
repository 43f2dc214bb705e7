"""How far operators are from the true value, and whether that is within what their precision allows."""
