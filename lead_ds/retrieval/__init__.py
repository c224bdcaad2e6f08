"""Encode, index, search, mine and evaluate with a dual encoder."""
