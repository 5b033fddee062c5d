"""Model weights and data files: fetched with pinned hashes into one cache."""
