"""The handwritten digits of scikit-learn: 1437 to train on, 360 to test with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from benchmarks.training_tasks import split_digits


BATCH_SIZE = 64
#: Full batches in an epoch.
BATCHES = 1437 // BATCH_SIZE


class Digits(NamedTuple):
    """Pairs of images `(count, 1, 8, 8)`, grey values in [0, 1], and labels."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]


def load(seed: int) -> Digits:
    """The digits, split at random."""
    images, test_images, labels, test_labels = split_digits(seed)
    return Digits((images, labels), (test_images, test_labels))


def distort(images: Any, key: Any) -> Any:
    """Shears, scales, rotates and shifts every image at random.

    The model overfits the 1437 training digits without this augmentation.
    """
    axis = jnp.arange(8.0) - 3.5
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)

    def distort_one(image: Any, key: Any) -> Any:
        key1, key2 = jr.split(key)
        matrix = jnp.eye(2) + 0.1 * jr.normal(key1, (2, 2))
        points = matrix @ grid + 0.3 * jr.normal(key2, (2, 1)) + 3.5
        values = jax.scipy.ndimage.map_coordinates(image[0], list(points), order=1)
        return values.reshape(1, 8, 8)

    return jax.vmap(distort_one)(images, jr.split(key, len(images)))
