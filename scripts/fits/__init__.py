"""Fits of measured data by mechanistic and hybrid models in the PEtab format.

- `sbml.py` translates a model to expressions, and these to JAX;
- `tables.py` reads the tables of a PEtab problem;
- `networks.py` reads what PEtab-SciML adds: networks inside of a model;
- `likelihood.py` makes a negative log-likelihood of all that;
- `trust_region.py` minimises it for many starts at once, `peers.py` for one.
"""
