"""Aggregation of saved PEFT adapters without a federation."""
