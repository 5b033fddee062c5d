"""Secure aggregation: the server learns sums. Pure: arrays, bytes and integers, no messages and no models."""
