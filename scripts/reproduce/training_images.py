"""SNOpt against Adam and SGD on images."""

from .training import experiment


EXPERIMENT = experiment(
    "training_images", "images", ("mnist", "digits", "svhn", "cifar10"), smoke="digits"
)
