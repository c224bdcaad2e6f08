"""Distil a large retrieval teacher into a small dense-retrieval student, layer by layer."""

__version__ = "0.1.0"
