"""The ways into a solve: `odesolve` and the adjoints for `diffrax.diffeqsolve`."""
