"""A neural stochastic differential equation with the reversible Heun method.

Drift and diffusion are networks, and the noise is Stratonovich and diagonal. Measured
are the error of the gradient against the number of steps, its time and its memory, for
the reversible Heun method and for the continuous adjoint of the midpoint method, which
the reversible Heun method was published to replace. The gradient is also trained with.
"""

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
from benchmarks.measure import relative_error
from matplotlib.axes import Axes

import nodegrad

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


#: Paths and states of each.
SHAPE = 16, 8
#: Solver, adjoint that is measured, and one whose gradient is exact for the solver.
METHODS: dict[str, tuple[Any, Any]] = {
    "reversible Heun": (diffrax.ReversibleHeun(), nodegrad.ReversibleAdjoint()),
    "midpoint, continuous adjoint": (diffrax.Midpoint(), diffrax.BacksolveAdjoint()),
}
EXACT = diffrax.RecursiveCheckpointAdjoint()
HEUN, CONTINUOUS = METHODS
PUBLISHED_SPEED = 1.98


class Model(eqx.Module):
    """Initial states, drift and diffusion."""

    start: eqx.nn.Linear
    drift: eqx.nn.MLP
    diffusion: eqx.nn.MLP
    read_out: eqx.nn.Linear

    def __init__(self, seed: int):
        """With random weights."""
        size, keys = SHAPE[1], jr.split(jr.PRNGKey(seed), 4)
        mlp = partial(eqx.nn.MLP, size + 1, size, 16, 1, lipswish, jnp.tanh)
        self.start = eqx.nn.Linear(2, size, key=keys[0])
        self.drift = mlp(key=keys[1])
        self.diffusion = mlp(key=keys[2])
        self.read_out = eqx.nn.Linear(size, 1, key=keys[3])


def lipswish(x: Any) -> Any:
    """The published activation."""
    return 0.909 * jax.nn.silu(x)


def _apply(network: Any, t: Any, y: Any) -> Any:
    """A network of the time and the states of every path, which are one vector."""
    with_time = lambda x: network(jnp.append(x, jnp.asarray(t, x.dtype)))
    return jax.vmap(with_time)(y.reshape(-1, SHAPE[1])).reshape(-1)


def make_terms(key: Any, paths: int, tolerance: float) -> Any:
    """Drift and diffusion along Brownian paths."""
    size = (paths * SHAPE[1],)
    brownian = diffrax.VirtualBrownianTree(0.0, 1.0, tolerance, size, key)
    drift = lambda t, y, model: _apply(model.drift, t, y)

    def diffusion(t: Any, y: Any, model: Any) -> Any:
        return lx.DiagonalLinearOperator(_apply(model.diffusion, t, y))

    noise = diffrax.ControlTerm(diffusion, brownian)
    return diffrax.MultiTerm(diffrax.ODETerm(drift), noise)


def solve(
    method: str, adjoint: Any, model: Any, key: Any, paths: int, steps: int, saveat: Any
) -> Any:
    """The states at the times of `saveat`, of every path."""
    noise, brownian = jr.split(key)
    y0 = jax.vmap(model.start)(jr.normal(noise, (paths, 2))).reshape(-1)
    ys = diffrax.diffeqsolve(
        make_terms(brownian, paths, 0.5 / steps),
        METHODS[method][0],
        0.0,
        1.0,
        1 / steps,
        y0,
        model,
        saveat=saveat,
        adjoint=adjoint,
        max_steps=steps,
    ).ys
    assert ys is not None
    return ys.reshape(-1, paths, SHAPE[1])


def _gradient(method: str, adjoint: Any, steps: int) -> Any:
    static = eqx.partition(Model(0), eqx.is_array)[1]

    def loss(params: Any, key: Any) -> Any:
        model = eqx.combine(params, static)
        final = diffrax.SaveAt(t1=True)
        ys = solve(method, adjoint, model, key, SHAPE[0], steps, final)
        return jnp.mean(ys**2)

    return jax.value_and_grad(loss)


def measure(steps: int, methods: Sequence[str], seconds: float) -> Result:
    """Errors of the gradients, their time and memory."""
    args = eqx.filter(Model(0), eqx.is_array), jr.PRNGKey(1)
    programs, errors = {}, {}
    for method in methods:
        programs[method] = adjoints.compiled(
            _gradient(method, METHODS[method][1], steps), *args
        )
        exact = jax.jit(_gradient(method, EXACT, steps))(*args)[1]
        errors[method] = relative_error(programs[method].run(*args)[1], exact)
    return {
        "seconds": adjoints.seconds_per_call(programs, args, seconds),
        "bytes": {method: p.temp_bytes for method, p in programs.items()},
        "errors": errors,
    }


def observe(steps: int, paths: int, key: Any) -> Any:
    """Paths of the published time dependent Ornstein-Uhlenbeck process, `(8, paths)`.

    Its time, 0 to 50, is scaled to 0 to 1, and its values by a tenth.
    """
    mu, theta, sigma, end = 0.02, 0.1, 0.4, 50.0
    first, rest = jr.split(key)
    y = jr.uniform(first, (paths,), minval=-1, maxval=1)
    size, seen = end / steps, []
    for index, draw_ in enumerate(jr.normal(rest, (steps, paths))):
        t = (index + 0.5) * size
        y = y + size * (mu * t - theta * y) + 2 * sigma * t / end * size**0.5 * draw_
        seen.append(y / 10)
    return jnp.stack(seen[steps // 8 - 1 :: steps // 8])


def energy_distance(x: Any, y: Any) -> Any:
    """Between the distributions at every time, and its mean over time."""
    apart = lambda a, b: jnp.mean(jnp.abs(a[:, :, None] - b[:, None]))
    return 2 * apart(x, y) - apart(x, x) - apart(y, y)


@functools.cache
def program(exact: bool, paths: int, steps: int) -> Any:
    """An iteration of training with the reversible Heun method, compiled."""
    static = eqx.partition(Model(0), eqx.is_array)[1]
    adjoint = EXACT if exact else METHODS[HEUN][1]
    at = diffrax.SaveAt(ts=jnp.arange(1, 9) / 8)

    def step(params: Any, state: Any, key: Any) -> Any:
        for_data, for_paths = jr.split(key)
        data = observe(steps, paths, for_data)

        def loss(params: Any) -> Any:
            model = eqx.combine(params, static)
            ys = solve(HEUN, adjoint, model, for_paths, paths, steps, at)
            shown = jax.vmap(jax.vmap(model.read_out))(ys)[..., 0]
            return energy_distance(shown, data)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optax.adam(1e-2).update(grads, state)
        return optax.apply_updates(params, updates), state, value

    return adjoints.compiled(step, *start(0), jr.PRNGKey(0))


def start(seed: int) -> tuple[Any, Any]:
    """The parameters and the state of the optimizer at first."""
    params = eqx.filter(Model(seed), eqx.is_array)
    return params, optax.adam(1.0).init(params)


def train(exact: bool, paths: int, steps: int, iterations: int, seed: int) -> Result:
    """The mean loss of the first and of the last tenth of the iterations."""
    run, (params, state) = program(exact, paths, steps).run, start(seed)
    losses = []
    for key in jr.split(jr.PRNGKey(seed), iterations):
        params, state, value = run(params, state, key)
        losses.append(float(value))
    some = max(1, iterations // 10)
    return {"first": np.mean(losses[:some]), "last": np.mean(losses[-some:])}


def _sizes(setting: Setting) -> tuple[Sequence[int], tuple[int, int, int]]:
    """Numbers of steps; and paths, steps and iterations to train with."""
    return setting.pick(
        ((4,), (4, 8, 2)),
        ((16, 64, 256), (64, 32, 150)),
        ((16, 64, 256, 1024, 4096), (1024, 500, 10_000)),
    )


def tasks(setting: Setting) -> dict[str, Any]:
    """One for each number of steps, and the training with both gradients."""
    numbers, sizes = _sizes(setting)
    seconds, smoke = setting.pick(0.01, 2.0, 10.0), setting.size == "smoke"
    methods = (HEUN,) if smoke else tuple(METHODS)
    out: dict[str, Any] = {
        f"{steps}-steps": partial(measure, steps, methods, seconds) for steps in numbers
    }
    if not smoke:
        for name, exact in (("reversible", False), ("stored", True)):
            for seed in range(setting.seeds):
                out[f"{name}-seed{seed}"] = partial(train, exact, *sizes, seed)
    return out


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """Errors, times and memory, and the training."""
    numbers, (paths, steps, iterations) = _sizes(setting)
    by_steps = {n: results[f"{n}-steps"] for n in numbers}
    methods = list(by_steps[numbers[0]]["errors"])
    rows = [
        [
            method,
            n,
            f"{r['errors'][method]:.0e}",
            number(1e3 * r["seconds"][method]),
            r["bytes"][method],
        ]
        for method in methods
        for n, r in by_steps.items()
    ]
    columns = "method", "steps", "error of the gradient", "ms", "bytes"
    tables = [Table("A gradient along the same Brownian paths", columns, rows)]
    notes = [
        "The error is relative to the gradient of the same solution by Diffrax's "
        "default adjoint.",
        f"{SHAPE[0]} paths of {SHAPE[1]} states, networks of 16 units with LipSwish.",
    ]
    claims = [_exact_claim(by_steps)]
    if setting.size != "smoke":
        claims += _other_claims(by_steps)
        trained = {m: across_seeds(results, m) for m in ("reversible", "stored")}
        shown = [
            [m, *(spread([r[k] for r in runs]) for k in ("first", "last"))]
            for m, runs in trained.items()
        ]
        columns = "gradient", "first tenth", "last tenth"
        tables.append(Table("Energy distance in training", columns, shown))
        claims.append(_training_claim(trained))
        notes.append(
            "The training is not the published one, which is adversarial, with a "
            "batch of 1024 in 500 steps: it minimises the energy distance to the "
            f"published process at eight times, with {paths} paths, {steps} steps, "
            f"{iterations} iterations of Adam, and {setting.seeds} seeds."
        )
    figures = {"error of the gradient": partial(draw, by_steps, methods)}
    return Report(tuple(tables), tuple(claims), figures, tuple(notes))


def _exact_claim(by_steps: Mapping[int, Result]) -> Claim:
    errors = {m: [r["errors"].get(m) for r in by_steps.values()] for m in METHODS}
    worst = max(errors[HEUN])
    theirs = [e for e in errors[CONTINUOUS] if e is not None]
    ours = f"at most {worst:.0e}"
    if theirs:
        ours += f"; midpoint: {min(theirs):.0e} to {max(theirs):.0e}"
    return Claim(
        "the gradient of reversible Heun is exact, that of the continuous adjoint is "
        "not",
        "rounding",
        ours,
        worst < 1e-10 and all(e > 1e3 * worst for e in theirs),
        "" if worst < 1e-10 else "its error exceeds rounding",
    )


def _other_claims(by_steps: Mapping[int, Result]) -> list[Claim]:
    first, last = min(by_steps), max(by_steps)
    seconds = by_steps[last]["seconds"]
    ratio = seconds[CONTINUOUS] / seconds[HEUN]
    grown = by_steps[last]["bytes"][HEUN] / by_steps[first]["bytes"][HEUN]
    return [
        Claim(
            "reversible Heun is faster than the midpoint method with the continuous "
            "adjoint",
            f"up to {PUBLISHED_SPEED} times, whole trainings",
            f"{ratio:.2f} times, a gradient in {last} steps",
            ratio > 1,
            "" if ratio > 1 else "it takes longer here",
        ),
        Claim(
            "the memory of reversible Heun does not grow with the steps",
            "stated",
            f"{grown:.2f} times in {last // first} times as many",
            grown < 1.05,
            "" if grown < 1.05 else "it grows",
        ),
    ]


def _training_claim(trained: Mapping[str, list[Result]]) -> Claim:
    last = {m: np.array([r["last"] for r in runs]) for m, runs in trained.items()}
    first = np.array([r["first"] for r in trained["reversible"]])
    off = float(np.max(np.abs(last["reversible"] / last["stored"] - 1)))
    holds = off < 1e-3 and bool(np.all(last["reversible"] < first))
    return Claim(
        "training needs no stored state and ends the same",
        "stated",
        f"largest relative difference of the final loss {off:.0e}",
        holds,
        "" if holds else "the losses differ, or do not fall",
    )


def draw(by_steps: Mapping[int, Result], methods: list[str], axes: Axes) -> None:
    """Error against the number of steps."""
    for method in methods:
        errors = [r["errors"][method] for r in by_steps.values()]
        axes.loglog(list(by_steps), errors, "o-", label=method)
    axes.set(xlabel="steps")
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="neural_sde",
    title="Neural stochastic differential equation with reversible Heun",
    source="Kidger, Foster, Li and Lyons (2021), gradient error and speed",
    tasks=tasks,
    report=report,
)
