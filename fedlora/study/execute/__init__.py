"""Execution of a study: its cells in turn or in parallel, tuning, and reuse of finished cells."""
