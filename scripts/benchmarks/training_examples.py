"""More to train: four examples of Diffrax's documentation and a hybrid model; float32.

The models of the first three are those of `examples.py`, solved by `nodegrad.odesolve`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from sklearn.datasets import make_moons

import nodegrad

from .examples import LatentODE, NetworkField, NeuralCDE, spirals
from .training_tasks import Batch, density, negative_mean, shuffled, Task, whole


def _solve(*args: Any, max_steps: int = 256, **kwargs: Any) -> diffrax.Solution:
    """A solve that a failure fills with infinity; a loss of it is refused."""
    return nodegrad.odesolve(*args, max_steps=max_steps, throw=False, **kwargs)


def _curves(
    ts: Any, dt0: Any, rtol: float, field: Callable[..., Any], starts: Any
) -> diffrax.Solution:
    """The curves from many starts, each with its own steps, at the times `ts`."""
    return _solve(
        field,
        diffrax.Tsit5(),
        ts[0],
        ts[-1],
        dt0,
        starts,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=1e-6),
        batched=True,
    )


def _negative_mean_square(outputs: Any, *batch: Any) -> Any:
    return negative_mean(_mean_squares(outputs, *batch))


def _mean_squares(outputs: Any, *batch: Any) -> Any:
    """One loss for each sample. The targets are the last array of the batch."""
    squares = (outputs - batch[-1]) ** 2
    return jnp.mean(squares.reshape(len(squares), -1), axis=1)


def _spirals(samples: int, times: int, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Sorted times of each curve, and the curves."""
    time_key, data_key = jr.split(jr.key(0))
    ts = end * jnp.sort(jr.uniform(time_key, (samples, times)), axis=1)
    curves = spirals(ts, data_key, samples)
    return np.asarray(ts, np.float32), np.asarray(curves, np.float32)


def _split(*arrays: Any) -> tuple[Batch, Batch]:
    """The first three quarters of the samples, and the rest."""
    count = 3 * len(arrays[0]) // 4
    return tuple(x[:count] for x in arrays), tuple(x[count:] for x in arrays)


def spiral(iterations: int) -> Task:
    """A neural ODE for spirals, 32 at a time."""
    ts = jnp.linspace(0.0, 5.0, 50, dtype=jnp.float32)
    curves = np.asarray(spirals(ts, jr.key(0), 256), np.float32)
    train, test = _split(curves[:, 0], curves)

    solution = partial(_curves, ts, ts[1] - ts[0], 1e-3)

    def make(key: Any) -> NetworkField:
        network = eqx.nn.MLP(2, 2, 64, 2, activation=jax.nn.softplus, key=key)
        return NetworkField(network)

    return Task(
        name="spiral",
        make_model=make,
        loss=_mean_squares,
        predict=lambda field, starts, _: solution(field, starts).ys,
        metric=_negative_mean_square,
        batches=shuffled(train, 32),
        test=test,
        steps=lambda field, batch: solution(field, batch[0]).stats,
        iterations=iterations,
    )


def latent(iterations: int) -> Task:
    """A variational autoencoder of spirals seen at irregular times."""
    samples, hidden, code = 256, 16, 8
    noise = np.random.default_rng(0).normal(size=(samples, code)).astype(np.float32)
    train, test = _split(*_spirals(samples, 20, 3.0), noise)

    def of_sample(model: LatentODE, ts: Any, ys: Any, noise: Any) -> Any:
        mean, log_std = model.encode(ts, ys)
        predicted = model.decode(ts, mean + jnp.exp(log_std) * noise, _solve)
        spread = mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1
        return jnp.mean((predicted - ys) ** 2) + 0.5e-2 * jnp.sum(spread)

    return Task(
        name="latent",
        make_model=partial(LatentODE, hidden, code, 16),
        loss=lambda model, *batch: jax.vmap(partial(of_sample, model))(*batch),
        predict=None,
        metric=negative_mean,
        batches=shuffled(train, 32),
        test=test,
        # The steps are constant.
        steps=lambda _, batch: {"num_steps": jnp.ceil(batch[0][:, -1] / 0.4)},
        iterations=iterations,
    )


def control(iterations: int) -> Task:
    """A neural CDE that tells spirals to the left from those to the right."""
    ts = jnp.linspace(0.0, 3.0, 25, dtype=jnp.float32)
    curves = spirals(ts, jr.key(2), 256)
    curves += 0.1 * jr.normal(jr.key(3), curves.shape)
    is_left = np.arange(256) % 2
    curves = curves.at[::2, :, 1].multiply(-1)
    times = jnp.broadcast_to(ts[:, None], (256, len(ts), 1))
    paths = jnp.concatenate([times, curves], axis=-1).astype(jnp.float32)
    interpolate = partial(diffrax.backward_hermite_coefficients, ts)
    coefficients = map(np.asarray, jax.jit(jax.vmap(interpolate))(paths))
    train, test = _split(*coefficients, is_left)

    def logits(model: NeuralCDE, *batch: Any) -> Any:
        return jax.vmap(lambda *c: model.logit(ts, c, _solve))(*batch[:-1])

    def steps(model: NeuralCDE, batch: Batch) -> Any:
        solution = lambda *c: model.solution(ts, c, _solve)
        return jax.vmap(solution)(*batch[:-1]).stats

    def loss(logits: Any, *batch: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(logits, batch[-1])

    def accuracy(logits: Any, *batch: Any) -> Any:
        return jnp.mean((logits > 0) == batch[-1])

    return Task(
        name="control",
        make_model=lambda key: NeuralCDE(3, 8, 32, key),
        loss=loss,
        predict=logits,
        metric=accuracy,
        batches=shuffled(train, 32),
        test=test,
        steps=steps,
        iterations=iterations,
    )


def moons(iterations: int) -> Task:
    """The density of two moons, by a continuous normalising flow."""
    draw = lambda count, seed: make_moons(count, noise=0.06, random_state=seed)[0]
    return density("moons", draw, iterations)


class Hybrid(eqx.Module):
    """Predators and prey: growth and decay are known, a network is the interaction."""

    network: eqx.nn.MLP

    def __init__(self, key: Any):
        """With two hidden layers of 16."""
        self.network = eqx.nn.MLP(2, 2, 16, 2, jnp.tanh, key=key)

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        """The rates of both."""
        del t, args
        return jnp.float32([1.3, -1.8]) * y + self.network(y)


def hybrid(iterations: int) -> Task:
    """A network inside of a mechanistic model; every batch is the training set."""
    ts = jnp.linspace(0.0, 3.0, 31, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    starts = rng.uniform(0.5, 2.5, (24, 2)).astype(np.float32)

    solution = partial(_curves, ts, None, 1e-4)

    def truth(t: Any, y: Any, args: Any) -> Any:
        del t, args
        met = y[0] * y[1]
        return jnp.stack([1.3 * y[0] - 0.9 * met, 0.8 * met - 1.8 * y[1]])

    curves = np.asarray(jax.jit(partial(solution, truth))(starts).ys)
    curves = curves * (1 + 0.01 * rng.normal(size=curves.shape))
    train, test = _split(starts, curves.astype(np.float32))

    return Task(
        name="hybrid",
        make_model=Hybrid,
        loss=_mean_squares,
        predict=lambda field, starts, _: solution(field, starts).ys,
        metric=_negative_mean_square,
        batches=whole(train),
        test=test,
        steps=lambda field, batch: solution(field, batch[0]).stats,
        iterations=iterations,
    )
