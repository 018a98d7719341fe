"""Solvers whose steps have an algebraic inverse, and the reconstruction of states."""
