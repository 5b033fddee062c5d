"""Values and mathematics that know no framework: factors, states, initialisers, decompositions, streams."""
