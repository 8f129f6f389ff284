"""Directions in the residual stream: find, compare, and steer along them."""
