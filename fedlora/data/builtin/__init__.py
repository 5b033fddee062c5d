"""Data sets that need no file of the user's: fetched with pinned hashes, or made."""
