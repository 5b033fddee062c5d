"""Local optimisers: torch's, and such as see an adapted layer whole (docs/optimizer.md)."""
