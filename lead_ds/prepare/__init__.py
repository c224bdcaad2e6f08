"""Published collections -> the canonical layout: one file per source format, and one builder that writes and checks."""
