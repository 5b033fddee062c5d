"""Prepared data: encoded once, mapped by every process."""
