"""Model server of a node: keeps the base model loaded between messages."""
