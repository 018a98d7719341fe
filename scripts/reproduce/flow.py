"""A continuous normalising flow on two moons: likelihood and memory.

The flow transports the data to the normal distribution, with the exact trace of the
Jacobian of the vector field. The network has four layers which the time scales and
shifts. Memory is that of the compiled gradient at the published size, which need not be
run for that.
"""

import functools
from collections.abc import Mapping
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

from . import adjoints
from .experiment import (
    across_seeds,
    Claim,
    Experiment,
    number,
    Report,
    Result,
    Setting,
    spread,
    Table,
)
from .memory_ratio import draw, memory_claim, METHODS, SOLVERS


#: Negative log likelihood and gigabytes: reversible, then backpropagation.
PUBLISHED = {
    "Midpoint": ((0.888, 0.563), (0.891, 3.922)),
    "RK4": ((0.890, 0.647), (0.890, 7.467)),
    "Dopri5": ((0.890, 0.704), (0.891, 12.79)),
}
#: Points, width of the network, steps.
Size = tuple[int, int, int]
PUBLISHED_SIZE: Size = 1000, 128, 100


class Layer(eqx.Module):
    """A linear layer, scaled and shifted by functions of the time."""

    linear: eqx.nn.Linear
    scale: eqx.nn.Linear
    shift: eqx.nn.Linear

    def __init__(self, size: int, out: int, key: Any):
        """From `size` to `out` numbers."""
        keys = jr.split(key, 3)
        self.linear = eqx.nn.Linear(size, out, key=keys[0])
        self.scale = eqx.nn.Linear(1, out, key=keys[1])
        self.shift = eqx.nn.Linear(1, out, use_bias=False, key=keys[2])

    def __call__(self, t: Any, y: Any) -> Any:
        """The output at a time."""
        return self.linear(y) * jax.nn.sigmoid(self.scale(t)) + self.shift(t)


class Velocity(eqx.Module):
    """The vector field in the plane."""

    layers: list[Layer]

    def __init__(self, width: int, seed: int):
        """With the weights of a seed, which are those of the published runs."""
        sizes = 2, width, width, width, 2
        # Random numbers as JAX made them when those were done.
        with jax.threefry_partitionable(False):
            keys = jr.split(jr.PRNGKey(seed), 4)
            pairs = zip(sizes, sizes[1:], keys, strict=False)
            self.layers = [Layer(*pair) for pair in pairs]

    def __call__(self, t: Any, y: Any) -> Any:
        """The velocity at a time and a point."""
        for layer in self.layers[:-1]:
            y = jnp.tanh(layer(t, y))
        return self.layers[-1](t, y)


def moons(count: int) -> Any:
    """The points, as in the published script."""
    points, _ = make_moons(n_samples=count, noise=0.05, random_state=0)
    points = np.asarray(points)
    return jnp.asarray((points - points.mean()) / points.std(), jnp.float32)


def field(t: Any, state: Any, model: Velocity) -> Any:
    """Of all points, and of their log densities."""
    points, _ = state
    time = jnp.asarray(t, points.dtype)[None]

    def one(y: Any) -> Any:
        slope, push = jax.linearize(partial(model, time), y)
        return slope, jnp.trace(jax.vmap(push)(jnp.eye(2, dtype=y.dtype)))

    return jax.vmap(one)(points)


def make_loss(solve: adjoints.Solve, width: int, steps: int) -> Any:
    """`(params, points) -> (negative log likelihood, whether the copies diverged)`."""
    static = eqx.partition(Velocity(width, 0), eqx.is_array)[1]

    def loss(params: Any, points: Any) -> Any:
        model, zeros = eqx.combine(params, static), jnp.zeros(len(points), points.dtype)
        sol = solve(
            diffrax.ODETerm(field),
            # From the data at time 1 to the normal distribution at time 0.
            1.0,
            0.0,
            -1 / steps,
            (points, zeros),
            model,
            max_steps=steps,
            throw=False,
        )
        end, trace = sol.ys
        square = jnp.sum(end[0] ** 2, axis=1) / 2
        value = jnp.mean(square + jnp.log(2 * jnp.pi) - trace[0])
        return value, adjoints.failed(sol)

    return loss


@functools.cache
def program(name: str, method: str, size: Size, rate: float) -> Any:
    """An iteration of AdamW, compiled: `(params, state, points) -> ...`."""
    count, width, steps = size
    loss = make_loss(METHODS[method](SOLVERS[name]), width, steps)

    def step(params: Any, state: Any, points: Any) -> Any:
        (value, lost), grads = jax.value_and_grad(loss, has_aux=True)(params, points)
        updates, state = optax.adamw(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, lost

    return adjoints.compiled(step, *start(width, 0), moons(count))


def start(width: int, seed: int) -> tuple[Any, Any]:
    """The parameters and the state of the optimizer at first."""
    params = eqx.filter(Velocity(width, seed), eqx.is_array)
    return params, optax.adamw(1.0).init(params)


def measure_memory(name: str, method: str, size: Size, rate: float) -> Result:
    """Temporary memory of the compiled iteration."""
    return {"bytes": program(name, method, size, rate).temp_bytes}


def train(
    name: str, method: str, size: Size, rate: float, iterations: int, seed: int
) -> Result:
    """The smallest loss, which is the published measure, and the time."""
    step, points = program(name, method, size, rate).run, moons(size[0])
    params, state = start(size[1], seed)
    losses, begin = [], adjoints.CLOCK.now()
    for _ in range(iterations):
        params, state, value, lost = step(params, state, points)
        if lost:
            break
        losses.append(float(value))
    seconds = (adjoints.CLOCK.now() - begin) / (len(losses) + 1)
    lost_at = len(losses) if len(losses) < iterations else None
    return {"loss": min(losses), "seconds": seconds, "lost_at": lost_at}


def _sizes(setting: Setting) -> tuple[Size, int, float]:
    """Points, width and steps to train with; iterations; learning rate."""
    small, middle = ((8, 4, 2), 2, 1e-3), ((200, 32, 20), 250, 3e-3)
    return setting.pick(small, middle, (PUBLISHED_SIZE, 5000, 1e-3))


def tasks(setting: Setting) -> dict[str, Any]:
    """Memory and training of each base method, with both gradients."""
    size, iterations, rate = _sizes(setting)
    names = setting.pick(["Midpoint"], list(SOLVERS), list(SOLVERS))
    memory = size if setting.size == "smoke" else PUBLISHED_SIZE
    fewer = memory[0], memory[1], memory[2] // 2
    out: dict[str, Any] = {}
    for name in names:
        # In the default size only one base method is trained on every seed.
        every = name == "Midpoint" or setting.size == "full"
        for method in METHODS:
            key, which = f"{name}-{method}", (name, method)
            out[f"{key}-memory"] = partial(measure_memory, *which, memory, rate)
            for seed in range(setting.seeds if every else 1):
                task = partial(train, *which, size, rate, iterations, seed)
                out[f"{key}-seed{seed}"] = task
        if setting.size != "smoke":
            task = partial(measure_memory, name, "reversible", fewer, rate)
            out[f"{name}-half-memory"] = task
    return out


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """Likelihoods and memory, ours beside the published ones."""
    (count, width, steps), iterations, rate = _sizes(setting)
    names = [n for n in SOLVERS if f"{n}-reversible-memory" in results]
    rows = []
    for name in names:
        for method, (loss, gigabytes) in zip(METHODS, PUBLISHED[name], strict=True):
            runs = across_seeds(results, f"{name}-{method}")
            size = results[f"{name}-{method}-memory"]["bytes"]
            rows.append(
                [
                    name,
                    method,
                    loss,
                    spread([r["loss"] for r in runs]),
                    gigabytes,
                    number(size / 1e9),
                    number(1e3 * float(np.median([r["seconds"] for r in runs]))),
                ]
            )
    columns = (
        "base method",
        "gradient",
        "-log p, paper",
        f"-log p, ours, {iterations} iterations",
        "GB, paper",
        "GB, ours, compiled",
        "ms an iteration, ours",
    )
    tables = (Table("Two moons", columns, rows),)
    points, wide, long = PUBLISHED_SIZE
    notes = [
        "Memory: temporary memory of the compiled iteration, for the processor named "
        f"below, with {points} points, width {wide} and {long} steps, which is the "
        "published size. The published numbers are those of the whole program on a "
        "GPU, of which the context alone takes about 0.28 GB.",
        "Backpropagation: a loop that keeps everything, as in the published runs. "
        "Diffrax's own step does not: it computes its stages again in the backward "
        "pass.",
        "-log p is the smallest training loss, as published.",
        "The published script advances Dopri5 with its weights of order four; here it "
        "has those of order five.",
    ]
    if setting.size != "full":
        notes.append(
            f"The training is scaled down: {count} points instead of {points}, width "
            f"{width} instead of {wide}, {steps} steps instead of {long}, {iterations} "
            f"iterations instead of 5000 (with a learning rate of {rate} instead of "
            f"0.001), {setting.seeds} seeds (RK4, Dopri5: 1) instead of 10."
        )
    claims = [memory_claim(results, names, PUBLISHED), _loss_claim(results, names)]
    if setting.size != "smoke":
        claims.insert(1, _flat_claim(results, names))
    figures = {"memory (GB)": partial(draw, results, names)}
    return Report(tables, tuple(claims), figures, tuple(notes))


def _flat_claim(results: Mapping[str, Result], names: list[str]) -> Claim:
    size = lambda name, what: results[f"{name}-{what}-memory"]["bytes"]
    grown = max(size(n, "reversible") / size(n, "half") for n in names)
    return Claim(
        "the memory of the reversible method does not grow with the steps",
        "stated, not measured here",
        f"at most {grown:.2f} times in twice as many steps",
        grown < 1.05,
        "" if grown < 1.05 else "it grows",
    )


def _loss_claim(results: Mapping[str, Result], names: list[str]) -> Claim:
    off, lost = 0.0, []
    for name in names:
        ours, theirs = (across_seeds(results, f"{name}-{m}") for m in METHODS)
        losses = [[r["loss"] for r in runs] for runs in (ours, theirs)]
        off = max(off, abs(float(np.median(losses[0]) - np.median(losses[1]))))
        lost += [f"{name}, {r['lost_at']}" for r in ours if r["lost_at"] is not None]
    reason = "" if off < 0.01 else f"the medians differ by {off:.2g}"
    if lost:
        reason = f"the copies diverged (iteration of {', '.join(lost)})"
    return Claim(
        "the reversible method reaches the likelihood of backpropagation",
        "differences of at most 0.003",
        f"differences of the medians of at most {off:.1g}",
        not reason,
        reason,
    )


EXPERIMENT = Experiment(
    name="flow",
    title="Continuous normalising flow on two moons",
    source="McCallum and Foster (2024, first version), table of the flow",
    tasks=tasks,
    report=report,
    x64=False,
)
