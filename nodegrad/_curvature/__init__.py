"""Products with the curvature of a loss, and Kronecker factors of its layers."""
