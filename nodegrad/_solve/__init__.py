"""Solving: `odesolve`, and the adjoints for it and for `diffrax.diffeqsolve`."""
