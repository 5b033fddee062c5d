"""The client side: local training, DP-SGD, evaluation, and what a client keeps between messages."""
