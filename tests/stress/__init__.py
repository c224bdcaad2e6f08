"""Killed at random moments, again and again: every job continues as if nothing had happened."""
