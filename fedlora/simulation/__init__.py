"""Engine of simulations: Flower Grids on Ray actors or in this process."""
