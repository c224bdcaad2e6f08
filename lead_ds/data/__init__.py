"""Texts, judgements, training groups and each model's own tokens."""
