"""How messages reach clients: fedlora's own engine is a Flower Grid on Ray actors."""
