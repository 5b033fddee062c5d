"""Rules: one file for each paper."""
