"""The nine data sets of SNOpt's paper, or what stands in for them, as training tasks.

Four of them are those of `scripts/benchmarks/training_tasks.py`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.training_tasks import (
    accuracy,
    circles,
    cross_entropy,
    digits,
    negative_mean,
    ODERNN,
    shuffled,
    Task,
    words,
)
from demonstration.model import Solve
from sklearn.model_selection import train_test_split

import nodegrad

from . import archives, data, pictures


def _logits(model: Any, x: Any, labels: Any) -> Any:
    del labels
    return model(x)


def _classification(
    name: str,
    make: Callable[[Any], Any],
    arrays: Any,
    steps: Any,
    iterations: int,
    size: int,
) -> Task:
    x, x_test, y, y_test = arrays
    return Task(
        name=name,
        make_model=make,
        loss=cross_entropy,
        predict=_logits,
        metric=accuracy,
        batches=shuffled((x, y), size),
        test=(x_test, y_test),
        steps=steps,
        iterations=iterations,
    )


# Images.


class _Pictures(pictures.Network):
    """The network of `pictures.py`; every picture has its own steps."""

    def solution(self, x: Any) -> Any:
        """The solution for a batch of pictures."""

        def field(t: Any, y: Any, args: Any) -> Any:
            return self.field(t, y[None], args)[0]

        return nodegrad.odesolve(
            field,
            diffrax.Heun(),
            jnp.float32(0),
            jnp.float32(1),
            None,
            self.features(x),
            stepsize_controller=diffrax.PIDController(1e-2, 1e-2),
            batched=True,
            max_steps=64,
            throw=False,
        )

    def __call__(self, pictures: Any, solve: Solve | None = None) -> Any:
        """The logits of a batch."""
        del solve
        y1 = self.solution(pictures).ys[:, 0]
        return jax.vmap(self.head)(jax.nn.gelu(y1).reshape(len(y1), -1))


def _images(name: str, iterations: int, size: int, folder: Path | None) -> Task:
    found = pictures.load(name, folder)
    (x, y), (x_test, y_test) = found
    x_test, y_test = x_test[:1000], y_test[:1000]
    make = lambda key: _Pictures(key, x.shape[1], x.shape[2])
    steps = lambda model, batch: model.solution(batch[0]).stats
    return _classification(name, make, (x, x_test, y, y_test), steps, iterations, size)


# Time series.


def resampled(series: Any, count: int) -> Any:
    """`count` samples of a series of any length, by linear interpolation."""
    at = np.linspace(0, len(series) - 1, count)
    columns = [np.interp(at, np.arange(len(series)), c) for c in series.T]
    return np.stack(columns, axis=1).astype(np.float32)


def _series(
    name: str, classes: int, iterations: int, _: int, folder: Path | None
) -> Task:
    loader = {"spoken": data.spoken_digits, "characters": data.characters}[name]
    series, labels = loader(folder)
    x = np.stack([resampled(s, 12) for s in series])
    split = train_test_split(x, labels, test_size=0.3, random_state=0, stratify=labels)
    x, x_test, y, y_test = map(np.asarray, split)
    mean, scale = x.mean((0, 1)), x.std((0, 1))
    arrays = (x - mean) / scale, (x_test - mean) / scale, y, y_test
    make = lambda key: ODERNN(key, x.shape[2], 32, classes)
    steps = lambda model, batch: model.run(batch[0])[1]
    return _classification(name, make, arrays, steps, iterations, 128)


# Densities.


class _Flow(eqx.Module):
    """A continuous normalising flow. One random vector per sample finds the trace."""

    mlp: eqx.nn.MLP

    def __init__(self, key: Any, size: int):
        self.mlp = eqx.nn.MLP(size + 1, size, 64, 2, activation=jnp.tanh, key=key)

    def solution(self, points: Any, noise: Any) -> Any:
        """From the data to the normal distribution."""

        def field(t: Any, state: Any, args: Any) -> Any:
            del args
            x, _, noise = state
            velocity = lambda x: self.mlp(jnp.append(x, t.astype(x.dtype)))
            out, pushed = jax.jvp(velocity, (x,), (noise,))
            return out, jnp.dot(pushed, noise), jnp.zeros_like(noise)

        return nodegrad.odesolve(
            field,
            diffrax.Tsit5(),
            jnp.float32(0),
            jnp.float32(1),
            None,
            (points, jnp.zeros(len(points), points.dtype), noise),
            stepsize_controller=diffrax.PIDController(1e-3, 1e-3),
            batched=True,
            max_steps=256,
            throw=False,
        )

    def __call__(self, points: Any, noise: Any) -> Any:
        """Negative log likelihoods, in nats."""
        x, trace, _ = self.solution(points, noise).ys
        square = jnp.sum(x[:, 0] ** 2, axis=1) / 2
        constant = points.shape[1] * np.log(2 * np.pi) / 2
        return square + jnp.float32(constant) - trace[:, 0]


def _density(name: str, iterations: int, _: int, folder: Path | None) -> Task:
    load = {"vowels": data.vowel_frames, "miniboone": data.miniboone}[name]
    x = load(folder)
    # The order of the rows has no meaning; this is the same one every time.
    x = x[np.random.default_rng(0).permutation(len(x))]
    count = len(x) // 10
    train, test = x[count:], x[:count]
    mean, scale = train.mean(0), train.std(0)
    train, test = ((p - mean) / scale for p in (train, test))
    signs = np.random.default_rng(1).choice([-1.0, 1.0], train.shape)
    noise = signs.astype(np.float32), signs[: len(test)].astype(np.float32)
    return Task(
        name=name,
        make_model=partial(_Flow, size=x.shape[1]),
        loss=lambda model, x, noise: model(x, noise),
        predict=None,
        metric=negative_mean,
        batches=shuffled((train.astype(np.float32), noise[0]), 128),
        test=(test.astype(np.float32), noise[1]),
        steps=lambda model, batch: model.solution(*batch).stats,
        iterations=iterations,
    )


#: What they are called, and how they are made from iterations, the size of a batch of
#: MNIST, SVHN or CIFAR-10, and the folder.
TASKS: dict[str, tuple[str, Callable[..., Task]]] = {
    "mnist": ("MNIST", partial(_images, "mnist")),
    "digits": ("8 x 8 digits, for SVHN", lambda n, *_: digits(n)),
    "svhn": ("SVHN", partial(_images, "svhn")),
    "cifar10": ("CIFAR-10, small and lossy", partial(_images, "cifar10")),
    "spoken": ("spoken digits, for SpoAD", partial(_series, "spoken", 10)),
    "words": ("ArtWR", lambda n, _, folder: words(n, folder)),
    "characters": ("CharT", partial(_series, "characters", 20)),
    "circles": ("circles", lambda n, *_: circles(n)),
    "vowels": ("frames of vowels, for Gas", partial(_density, "vowels")),
    "miniboone": ("MiniBooNE, 1523 rows", partial(_density, "miniboone")),
}


def names(folder: Path | None) -> list[str]:
    """Those whose data are at hand. SVHN replaces what stands in for it."""
    has_svhn = archives.SVHN_TRAIN.is_in(folder) and archives.SVHN_TEST.is_in(folder)
    return [name for name in TASKS if name != ("digits" if has_svhn else "svhn")]


@lru_cache
def make(name: str, iterations: int, folder: Path | None, size: int = 128) -> Task:
    """The task of that name."""
    if name not in ("digits", "circles"):
        folder = data.folder(folder)
    return TASKS[name][1](iterations, size, folder)
