"""Configurations that can be run as they are, benchmarks, and what was found; nothing imports this."""
