"""Networks for pictures: convolutions, a differential equation, a linear layer.

The differential equation and the ways to solve it are those of `scripts/demo.py`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from benchmarks.training_tasks import split_digits
from demonstration.model import CHANNELS, Solve, VectorField

from . import data


class Pictures(NamedTuple):
    """Pairs of pictures `(count, channels, size, size)` and labels.

    The grey values have mean 0 and variance 1 over the training pictures.
    """

    train: tuple[Any, Any]
    test: tuple[Any, Any]


class Network(eqx.Module):
    """Two convolutions of stride 2 before the equation, a linear layer after it."""

    stem: list[eqx.nn.Conv2d]
    field: VectorField
    head: eqx.nn.Linear

    def __init__(self, key: Any, channels: int, size: int):
        """For square pictures of this `size`."""
        keys = jr.split(key, 4)
        conv = lambda n, key: eqx.nn.Conv2d(n, CHANNELS, 3, 2, 1, key=key)
        self.stem = [conv(channels, keys[0]), conv(CHANNELS, keys[1])]
        self.field = VectorField(key=keys[2])
        self.head = eqx.nn.Linear(CHANNELS * (-(-size // 4)) ** 2, 10, key=keys[3])

    def features(self, pictures: Any) -> Any:
        """Where the equation starts."""

        def one(x: Any) -> Any:
            return self.stem[1](jax.nn.gelu(self.stem[0](x)))

        return jnp.moveaxis(jax.vmap(one)(pictures), 1, -1)

    def __call__(self, pictures: Any, solve: Solve) -> tuple[Any, Any]:
        """The logits, and the statistics of the solve."""
        y1, stats = solve(self.field, self.features(pictures))
        return jax.vmap(self.head)(jax.nn.gelu(y1).reshape(len(y1), -1)), stats


def load(name: str, folder: Path | None) -> Pictures:
    """The set `"mnist"`, `"cifar10"`, `"svhn"` or `"digits"`, which needs no folder."""
    if name == "digits":
        x, x_test, y, y_test = split_digits()
        return _normalised(x, y, x_test, y_test)
    if name == "mnist":
        arrays = data.mnist(folder)
        shaped = lambda x: x[:, None].astype(np.float32)
    else:
        arrays = {"cifar10": data.cifar10, "svhn": data.svhn}[name](folder)
        shaped = lambda x: np.moveaxis(x, -1, 1).astype(np.float32)
    x, x_test = shaped(arrays["train_images"]), shaped(arrays["test_images"])
    return _normalised(x, arrays["train_labels"], x_test, arrays["test_labels"])


def _normalised(x: Any, y: Any, x_test: Any, y_test: Any) -> Pictures:
    mean = x.mean((0, 2, 3), keepdims=True)
    scale = x.std((0, 2, 3), keepdims=True)
    pair = lambda x, y: ((x - mean) / scale, y.astype(np.int32))
    return Pictures(pair(x, y), pair(x_test, y_test))
