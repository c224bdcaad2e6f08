"""What a teacher said, on disk: relevance or vectors."""
