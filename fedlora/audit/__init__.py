"""Auditing a privacy claim: what an attack on real training shows, beside the epsilon that is claimed."""
