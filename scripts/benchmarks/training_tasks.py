"""What to train: four models with a differential equation in them, small ones.

Each task says how to make the model, its batches, and its losses; all in float32.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from sklearn.datasets import load_digits, make_circles
from sklearn.model_selection import train_test_split

import nodegrad


Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """A training problem.

    - `make_model`: from a key.
    - `loss`, `predict`: as in `nodegrad.value_grad_and_curvature`; `predict` is `None`
      where there are no outputs with a loss of their own.
    - `metric`: of the outputs, or of the losses, and their targets; larger is better.
    - `batches`: from a seed, as many as one likes.
    - `steps`: of the solver, as a function of model and batch: how many are accepted.
    - `iterations`: how long to train.
    """

    name: str
    make_model: Callable[[Any], Any]
    loss: Callable[..., Any]
    predict: Callable[..., Any] | None
    metric: Callable[..., Any]
    batches: Callable[[int], Iterator[Batch]]
    test: Batch
    steps: Callable[[Any, Batch], Any]
    iterations: int

    def losses(self, model: Any, *batch: Any) -> Any:
        """One loss for each sample."""
        if self.predict is None:
            return self.loss(model, *batch)
        return self.loss(self.predict(model, *batch), *batch)


def _solve(field: Callable[..., Any], y0: Any, t1: Any, rtol: float) -> Any:
    return nodegrad.odesolve(
        field,
        diffrax.Tsit5(),
        jnp.float32(0),
        t1,
        None,
        y0,
        stepsize_controller=diffrax.PIDController(rtol, rtol),
        batched=True,
        max_steps=256,
        throw=False,
    )


def shuffled(arrays: Batch, size: int) -> Callable[[int], Iterator[Batch]]:
    """A function from a seed to endless batches of `size` samples, shuffled."""

    def batches(seed: int) -> Iterator[Batch]:
        rng, count = np.random.default_rng(seed), len(arrays[0])
        while True:
            order = rng.permutation(count)
            for start in range(0, count - size + 1, size):
                index = order[start : start + size]
                yield tuple(x[index] for x in arrays)

    return batches


def whole(arrays: Batch) -> Callable[[int], Iterator[Batch]]:
    """Endless batches that all are the whole training set."""
    return lambda _: itertools.repeat(arrays)


def negative_mean(losses: Any, *batch: Any) -> Any:
    """The metric of tasks that have nothing but losses."""
    del batch
    return -jnp.mean(losses)


def cross_entropy(outputs: Any, x: Any, labels: Any) -> Any:
    """The loss of every sample, from its logits."""
    del x
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def _logits(model: Any, x: Any, labels: Any) -> Any:
    del labels
    return model(x)


def accuracy(outputs: Any, x: Any, labels: Any) -> Any:
    """The share of samples whose largest logit is that of their label."""
    del x
    return jnp.mean((jnp.argmax(outputs, axis=1) == labels).astype(jnp.float32))


# Images.


class ImageNODE(eqx.Module):
    """A convolution, a neural differential equation, a linear read-out."""

    conv: eqx.nn.Conv2d
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear
    decode: eqx.nn.Linear
    t1: Any

    def __init__(self, key: Any, learn_t1: bool = False):
        """Of 4 channels on 4 x 4 points; the end time may be a parameter."""
        keys = jr.split(key, 4)
        self.conv = eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=keys[0])
        self.inner = eqx.nn.Linear(65, 64, key=keys[1])
        self.outer = eqx.nn.Linear(65, 64, key=keys[2])
        self.decode = eqx.nn.Linear(64, 10, key=keys[3])
        self.t1 = jnp.float32(1) if learn_t1 else 1.0

    def field(self, t: Any, y: Any, args: Any) -> Any:
        """Two layers that know the time."""
        del args
        with_time = lambda y: jnp.append(y, t.astype(y.dtype))
        return self.outer(with_time(jnp.tanh(self.inner(with_time(y)))))

    def solution(self, images: Any) -> Any:
        """The solution for a batch of images."""
        encode = lambda image: jax.nn.relu(self.conv(image)).reshape(-1)
        return _solve(self.field, jax.vmap(encode)(images), jnp.float32(self.t1), 1e-3)

    def __call__(self, images: Any) -> Any:
        """The logits of a batch."""
        return jax.vmap(self.decode)(self.solution(images).ys[:, 0])


def split_digits(seed: int = 0) -> list[np.ndarray]:
    """Training images, test images, training labels and test labels.

    Images have shape `(1, 8, 8)` and grey values in [0, 1]. Every class is split in the
    same proportion.
    """
    data: Any = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    labels = data.target.astype(np.int32)
    split = train_test_split(
        images, labels, test_size=360, random_state=seed, stratify=labels
    )
    return [np.asarray(x) for x in split]


def digits(iterations: int) -> Task:
    """Handwritten digits, 8 x 8."""
    x, x_test, y, y_test = split_digits()
    return Task(
        name="digits",
        make_model=ImageNODE,
        loss=cross_entropy,
        predict=_logits,
        metric=accuracy,
        batches=shuffled((x, y), 128),
        test=(x_test, y_test),
        steps=lambda model, batch: model.solution(batch[0]).stats,
        iterations=iterations,
    )


# Time series.


class ODERNN(eqx.Module):
    """A recurrent cell, with a differential equation between observations."""

    cell: eqx.nn.GRUCell
    layers: list[eqx.nn.Linear]
    decode: eqx.nn.Linear
    size: int = eqx.field(static=True)

    def __init__(self, key: Any, channels: int, size: int, classes: int):
        """With a state of `size` numbers."""
        keys = jr.split(key, 6)
        self.cell = eqx.nn.GRUCell(channels, size, key=keys[0])
        self.layers = [eqx.nn.Linear(size, size, key=k) for k in keys[1:5]]
        self.decode = eqx.nn.Linear(size, classes, key=keys[5])
        self.size = size

    def field(self, t: Any, h: Any, args: Any) -> Any:
        """Four layers."""
        del t, args
        for layer in self.layers[:-1]:
            h = jnp.tanh(layer(h))
        return self.layers[-1](h)

    def run(self, series: Any) -> tuple[Any, Any]:
        """The last state, and the counts of all solves."""

        def step(h: Any, x: Any) -> tuple[Any, Any]:
            sol = _solve(self.field, h, jnp.float32(1), 1e-3)
            return jax.vmap(self.cell)(x, sol.ys[:, 0]), sol.stats

        h = jnp.zeros((len(series), self.size), jnp.float32)
        return jax.lax.scan(step, h, jnp.moveaxis(series, 1, 0))

    def __call__(self, series: Any) -> Any:
        """The logits of a batch."""
        h, _ = self.run(series)
        return jax.vmap(self.decode)(h)


def read_series(path: Path) -> list[tuple[np.ndarray, str]]:
    """The series `(times, channels)` of a file of the UEA archive, and their labels."""
    found = []
    for line in path.read_text().splitlines():
        if line and line[0] not in "#@":
            *channels, label = line.strip().split(":")
            rows = [[float(v) for v in channel.split(",")] for channel in channels]
            found.append((np.asarray(rows).T, label))
    return found


def words(iterations: int, folder: Path, every: int = 12, size: int = 32) -> Task:
    """Articulary word recognition, every so many-th sample of the series."""
    paths = [folder / f"ArticularyWordRecognition_{p}.ts" for p in ("TRAIN", "TEST")]
    recorded = [one for path in paths for one in read_series(path)]
    x = np.stack([np.asarray(one, np.float32) for one, _ in recorded])[:, ::every]
    y = np.asarray([int(float(label)) - 1 for _, label in recorded], np.int32)
    x, x_test, y, y_test = map(
        np.asarray, train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    )
    mean, scale = x.mean((0, 1)), x.std((0, 1))
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    return Task(
        name="words",
        make_model=lambda key: ODERNN(key, 9, size, 25),
        loss=cross_entropy,
        predict=_logits,
        metric=accuracy,
        batches=shuffled((x, y), 128),
        test=(x_test, y_test),
        steps=lambda model, batch: model.run(batch[0])[1],
        iterations=iterations,
    )


# Densities.


class Flow(eqx.Module):
    """A continuous normalising flow of the plane, with the exact trace."""

    mlp: eqx.nn.MLP

    def __init__(self, key: Any):
        """Two hidden layers."""
        self.mlp = eqx.nn.MLP(3, 2, 32, 2, activation=jnp.tanh, key=key)

    def field(self, t: Any, state: Any, args: Any) -> Any:
        """Of the point, and of its log density."""
        del args
        x, _ = state
        velocity = lambda x: self.mlp(jnp.append(x, t.astype(x.dtype)))
        out, push = jax.linearize(velocity, x)
        units = jnp.eye(2, dtype=x.dtype)
        return out, jnp.trace(jax.vmap(push)(units))

    def solution(self, points: Any) -> Any:
        """From the data to the normal distribution."""
        zeros = jnp.zeros(len(points), points.dtype)
        return _solve(self.field, (points, zeros), jnp.float32(1), 1e-3)

    def __call__(self, points: Any) -> Any:
        """Negative log likelihoods, in nats."""
        x, trace = self.solution(points).ys
        square = jnp.sum(x[:, 0] ** 2, axis=1) / 2
        return square + jnp.float32(np.log(2 * np.pi)) - trace[:, 0]


def circles(iterations: int) -> Task:
    """Two noisy circles, one inside the other."""

    def draw(count: int, seed: int) -> Any:
        return make_circles(count, noise=0.06, factor=0.5, random_state=seed)[0]

    return density("circles", draw, iterations)


def density(name: str, draw: Callable[[int, int], Any], iterations: int) -> Task:
    """The density of points in the plane, from `draw(count, seed)`; all are new."""
    points = lambda count, seed: np.asarray(draw(count, seed), np.float32)

    def batches(seed: int) -> Iterator[Batch]:
        while True:
            seed = seed + 1_000
            yield (points(256, seed),)

    return Task(
        name=name,
        make_model=Flow,
        loss=lambda model, x: model(x),
        predict=None,
        metric=negative_mean,
        batches=batches,
        test=(points(2048, 12345),),
        steps=lambda model, batch: model.solution(batch[0]).stats,
        iterations=iterations,
    )


# README's example.


class DiscNODE(eqx.Module):
    """A neural differential equation in the plane and a linear read-out."""

    mlp: eqx.nn.MLP
    read_out: eqx.nn.Linear

    def __init__(self, key: Any):
        """A field with two hidden layers of 16."""
        for_field, for_read_out = jr.split(key)
        self.mlp = eqx.nn.MLP(2, 2, 16, 2, jnp.tanh, key=for_field)
        self.read_out = eqx.nn.Linear(2, 2, key=for_read_out)

    def field(self, t: Any, y: Any, args: Any) -> Any:
        """A network of the state."""
        del t, args
        return self.mlp(y)

    def solution(self, x: Any) -> Any:
        """Four steps of Heun's method."""
        return nodegrad.odesolve(
            self.field,
            diffrax.Heun(),
            jnp.float32(0),
            jnp.float32(1),
            jnp.float32(0.25),
            x,
            batched=True,
            max_steps=4,
        )

    def __call__(self, x: Any) -> Any:
        """The logits of a batch."""
        return jax.vmap(self.read_out)(self.solution(x).ys[:, 0])


def discs(iterations: int) -> Task:
    """Points inside and outside of a circle; every batch is the whole training set."""

    def draw(count: int, seed: int) -> Batch:
        x = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
        return x, (np.sum(x**2, axis=1) < 1).astype(int)

    return Task(
        name="discs",
        make_model=DiscNODE,
        loss=cross_entropy,
        predict=_logits,
        metric=accuracy,
        batches=whole(draw(256, 0)),
        test=draw(2048, 1),
        steps=lambda model, batch: model.solution(batch[0]).stats,
        iterations=iterations,
    )


def data_folder() -> Path | None:
    """Where the series are, if anywhere."""
    folder = Path(os.environ.get("NODEGRAD_DATA", ""))
    name = "ArticularyWordRecognition_TRAIN.ts"
    return folder if (folder / name).is_file() else None
