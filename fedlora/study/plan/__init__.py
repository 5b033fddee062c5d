"""Plan of a study: which cells there are, and which cannot be."""
