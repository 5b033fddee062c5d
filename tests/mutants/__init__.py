"""Formula mutations: each changes one line of a rule, and some test has to turn red."""
