"""SNOpt against Adam and SGD on time series, and on densities."""

from .training import experiment


EXPERIMENT = experiment(
    "training_series",
    "time series and densities",
    ("spoken", "words", "characters", "circles", "vowels", "miniboone"),
    smoke="circles",
)
