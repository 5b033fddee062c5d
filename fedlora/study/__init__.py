"""Comparing runs: what a study consists of, what came out, and the report."""
