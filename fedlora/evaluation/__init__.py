"""Evaluation of a saved adapter: on a test set, or by lm-eval."""
