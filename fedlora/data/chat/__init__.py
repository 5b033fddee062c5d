"""Conversations: read from the forms that people have, written by a chat template, tokenised whole."""
