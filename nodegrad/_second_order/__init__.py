"""Second derivatives along a solve, by steps and by Theorem 1."""
