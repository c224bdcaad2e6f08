"""Training groups: a query, a positive of it, its negatives; in every format that is read."""
