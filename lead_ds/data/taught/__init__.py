"""A teacher's output, on disk: relevance or vectors."""
