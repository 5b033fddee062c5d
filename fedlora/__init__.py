"""Federated LoRA fine-tuning: simulate, deploy, and budget privacy with one Flower app."""
