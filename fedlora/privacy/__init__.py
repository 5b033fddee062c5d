"""Accounting of differential privacy: noise for a budget, and what was spent."""
