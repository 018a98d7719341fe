"""The experiments of the papers, run again: one module for each of them.

Every module has an `EXPERIMENT`; `experiment.py` says what that is. The order is that
of the papers: ACA, the reversible solvers, SNOpt.
"""

MODULES: tuple[str, ...] = (
    "exponential",
    "van_der_pol",
    "image",
    "node18",
    "three_body",
    "latent_ode",
    "end_time",
    "white_dwarf",
    "run_time",
    "orders",
    "stability",
    "flow",
    "characters",
    "physical_systems",
    "neural_sde",
    "heat",
    "training_images",
    "training_series",
    "regularity",
    "robustness",
    "memory",
)
