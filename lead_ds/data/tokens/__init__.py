"""Each model's own tokens of a text."""
