"""Commands of the operator: create a federation, run it on one machine, ask about it, submit to it."""
