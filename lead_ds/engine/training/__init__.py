"""A run: steps, evaluation, resuming, from configuration to student."""
