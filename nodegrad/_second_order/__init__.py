"""Second derivatives of a loss along a solve, by its steps or by Theorem 1."""
