"""Optax transforms that use curvature, and the end time as a parameter."""
