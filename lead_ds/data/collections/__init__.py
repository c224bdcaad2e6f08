"""Collections: texts, judgements and runs."""
