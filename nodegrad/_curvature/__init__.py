"""Curvature of a loss: products with it, and Kronecker factors of its layers."""
