"""Optax transformations that use curvature, and one that learns the end time."""
