"""The claims of the three papers, tried on a 1.5B model."""
