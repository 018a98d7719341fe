"""The white dwarf equation: training time, reversible against few checkpoints.

A network of the time and the two states learns the equation of a white dwarf from a
solution in 1000 steps, by AdamW. The reversible runs are made. The time of the others
is that of a few iterations, times the number of iterations. Their gradient is that of
the base method, so their training is too: `ACAAdjoint` makes it in a fraction of the
time.
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
import numpy as np
import optax
from benchmarks.problems import white_dwarf
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


STEPS = 1000
#: The script makes one more iteration before it starts its clock.
ITERATIONS = 1001
COUNTS = 2, 4, 8, 16, 32, 44
SOLVERS: dict[str, Any] = {
    "Midpoint": diffrax.Midpoint(),
    "Euler": diffrax.Euler(),
    "Ralston3": diffrax.Bosh3(),
    "RK4": nodegrad.RK4(),
}
MAIN = "Midpoint"
#: Minutes of the authors' runs, means of three seeds: reversible, then by `COUNTS`.
PUBLISHED = {
    "Euler": (1.52, 264, 30.5, 10.7, 8.9, 8.1, 5.2),
    "Midpoint": (1.74, 280, 30.2, 10.6, 9.6, 8.7, 5.4),
    "Ralston3": (1.81, 260, 29.8, 10.0, 8.4, 7.6, 4.9),
    "RK4": (2.21, 254, 29.2, 9.9, 8.2, 7.5, 4.95),
}
PUBLISHED_LOSSES = 1.2219e-4, 6.540e-5, 7.415e-5
OPTIM = optax.adamw(1e-2, weight_decay=1e-5)


class Network(eqx.Module):
    """The vector field: the time and two states to ten units to two."""

    mlp: eqx.nn.MLP

    def __init__(self, seed: int):
        """With the weights of a seed, which are those of the published runs."""
        # Random numbers as JAX made them when those were done.
        with jax.threefry_partitionable(False):
            self.mlp = eqx.nn.MLP(3, 2, 10, 1, jnp.tanh, key=jr.PRNGKey(seed))

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        """The slope."""
        del args
        return self.mlp(jnp.append(jnp.asarray(t, y.dtype), y))


def solutions(solve: adjoints.Solve, field: Any, steps: int) -> Any:
    """The states after each of so many steps."""
    problem = white_dwarf()
    size = problem.t1 / STEPS
    return solve(
        diffrax.ODETerm(field),
        0.0,
        size * steps,
        size,
        problem.y0,
        saveat=diffrax.SaveAt(steps=True),
        max_steps=steps,
    ).ys


def make_step(solve: adjoints.Solve, steps: int) -> Any:
    """An iteration: `(params, state, data) -> (params, state, loss)`."""
    static = eqx.partition(Network(0), eqx.is_array)[1]

    def step(params: Any, state: Any, data: Any) -> Any:
        def loss(params: Any) -> Any:
            ys = solutions(solve, eqx.combine(params, static), steps)
            return jnp.mean((data - ys) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = OPTIM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


@functools.cache
def make_data(name: str, coupled: bool, steps: int) -> Any:
    """The solution to learn from: as published, by the solver that is trained with."""
    problem, base = white_dwarf(), SOLVERS[name]
    return jax.jit(adjoints.states, static_argnums=(0, 1, 6))(
        adjoints.coupled(base) if coupled else base,
        diffrax.ODETerm(problem.vector_field),
        0.0,
        problem.t1 * steps / STEPS,
        problem.y0,
        problem.args,
        steps,
    )


def start(seed: int) -> tuple[Any, Any]:
    """The parameters and the state of the optimizer at first."""
    params = eqx.filter(Network(seed), eqx.is_array)
    return params, OPTIM.init(params)


@functools.cache
def program(method: str, name: str, steps: int) -> Any:
    """An iteration with a method, compiled for the data that belong to it."""
    base = SOLVERS[name]
    if method.isdigit():
        solve = adjoints.checkpointed(base, int(method))
    else:
        solve = {"reversible": adjoints.reversible, "ACA": adjoints.aca}[method](base)
    data = make_data(name, method == "reversible", steps)
    return adjoints.compiled(make_step(solve, steps), *start(0), data)


def time_methods(
    name: str, methods: Sequence[str], steps: int, seconds: float
) -> Result:
    """Seconds of an iteration with every method, called for so long, and memory."""
    programs = {method: program(method, name, steps) for method in methods}
    args = *start(0), make_data(name, False, steps)
    times = adjoints.seconds_per_call(programs, args, seconds, once_above=1.0)
    return {"seconds": times, "bytes": {m: p.temp_bytes for m, p in programs.items()}}


def train(method: str, name: str, iterations: int, steps: int, seed: int) -> Result:
    """The loss of the last iteration."""
    step = program(method, name, steps).run
    data, (params, state) = make_data(name, method == "reversible", steps), start(seed)
    for _ in range(iterations):
        params, state, loss = step(params, state, data)
    return {"loss": float(loss)}


def tasks(setting: Setting) -> dict[str, Any]:
    """The timing of every base method, and the training with it."""
    names = setting.pick([MAIN], list(SOLVERS), list(SOLVERS))
    steps = setting.pick(20, STEPS, STEPS)
    iterations = setting.pick(2, ITERATIONS, ITERATIONS)
    few = setting.pick((), ("2", "44"), tuple(map(str, COUNTS)))
    seconds = setting.pick(0.01, 3.0, 10.0)
    out: dict[str, Any] = {}
    for name in names:
        many = name == MAIN and setting.size == "default"
        counts = tuple(map(str, COUNTS)) if many else few
        methods = "reversible", *counts, "ACA"
        out[f"{name}-time"] = partial(time_methods, name, methods, steps, seconds)
        # In the default size only one base method is trained on every seed.
        every = name == MAIN or setting.size == "full"
        for seed in range(setting.seeds if every else 1):
            for method in ("reversible", "ACA"):
                task = partial(train, method, name, iterations, steps, seed)
                out[f"{name}-{method}-seed{seed}"] = task
    return out


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """Minutes of a training, the ratios of the paper and ours, and the losses."""
    names = [key.removesuffix("-time") for key in results if key.endswith("-time")]
    minutes = lambda seconds: number(seconds * 1000 / 60)
    rows, ratios = [], {}
    for name in names:
        timed, published = results[f"{name}-time"], PUBLISHED[name]
        seconds = timed["seconds"]
        for method, value in seconds.items():
            ratio = value / seconds["reversible"]
            ours = [minutes(value), f"{ratio:.1f}", timed["bytes"][method]]
            if method == "ACA":
                rows.append([name, "`ACAAdjoint`", None, None, *ours])
                continue
            index = 0 if method == "reversible" else 1 + COUNTS.index(int(method))
            theirs = published[index] / published[0]
            shown = method if index == 0 else f"{method} checkpoints"
            rows.append([name, shown, published[index], f"{theirs:.1f}", *ours])
            ratios[name, method] = theirs, ratio
    columns = (
        "base method",
        "gradient",
        "minutes, paper",
        "to reversible, paper",
        "minutes of 1000 iterations, ours",
        "to reversible, ours",
        "temporary memory (bytes)",
    )
    timing = Table("Training time, relative to the reversible method", columns, rows)
    claims, losses = _speed_claims(ratios, setting), _losses(results, names)
    claims.append(_loss_claim(results))
    notes = (
        "Minutes: the computing time of one iteration, median of a few calls (with 2 "
        "checkpoints of one call), times 1000. The published minutes are those of "
        "whole runs on the authors' machine, which they do not name.",
        "As in the published runs, checkpoints are those of Diffrax on the base "
        "method, which makes half of the evaluations of the coupled one.",
        "The default size times 2 and 44 checkpoints alone for all base methods but "
        f"{MAIN}, and trains these on one seed. It is the published size otherwise.",
        "The seeds give the same initial weights as in the published runs.",
    )
    figures = {f"one iteration, {names[0]}": partial(draw, results[f"{names[0]}-time"])}
    return Report((timing, losses), tuple(claims), figures, notes)


def _speed_claims(
    ratios: Mapping[tuple[str, str], tuple[float, float]], setting: Setting
) -> list[Claim]:
    if setting.size == "smoke":
        return []
    claims = []
    for method, limit in (("44", 2.5), ("2", 100.0)):
        found = {name: pair for (name, m), pair in ratios.items() if m == method}
        listed = lambda index, f=found: ", ".join(
            f"{name} {pair[index]:.1f}" for name, pair in f.items()
        )
        behind = [name for name, (theirs, ours) in found.items() if ours < theirs]
        short = f" (behind the paper's ratio: {', '.join(behind)})" if behind else ""
        factor = found[MAIN][1]
        claims.append(
            Claim(
                f"reversible is at least {limit:g} times faster than {method} "
                f"checkpoints ({MAIN})",
                listed(0),
                listed(1) + short,
                factor >= limit,
                "" if factor >= limit else f"{MAIN} is {factor:.1f} times faster",
            )
        )
    return claims


def _losses(results: Mapping[str, Result], names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        by_method = {
            method: [r["loss"] for r in across_seeds(results, f"{name}-{method}")]
            for method in ("reversible", "ACA")
        }
        published = spread(PUBLISHED_LOSSES) if name == MAIN else None
        shown = [spread(losses, 4) for losses in by_method.values()]
        rows.append([name, published, *shown, len(by_method["ACA"])])
    columns = "base method", "paper", "reversible", "base method, `ACAAdjoint`", "seeds"
    return Table("Loss after training", columns, rows)


def _loss_claim(results: Mapping[str, Result]) -> Claim:
    """That both ways to train end with the same loss, on each seed of `MAIN`."""
    ours, base = (
        np.array([r["loss"] for r in across_seeds(results, f"{MAIN}-{method}")])
        for method in ("reversible", "ACA")
    )
    off = float(np.max(np.abs(ours / base - 1)))
    return Claim(
        f"the loss is that of the base method ({MAIN})",
        "equal to four digits: " + ", ".join(f"{x:.3e}" for x in PUBLISHED_LOSSES),
        f"largest relative difference {off:.0e}: "
        + ", ".join(f"{x:.3e}" for x in ours),
        off < 1e-3,
        "" if off < 1e-3 else "the losses differ by more than a thousandth",
    )


def draw(timed: Result, axes: Axes) -> None:
    """Time against checkpoints."""
    seconds = timed["seconds"]
    counts = [method for method in seconds if method.isdigit()]
    axes.loglog([int(n) for n in counts], [seconds[n] for n in counts], "o-C0")
    axes.axhline(seconds["reversible"], color="C1", label="reversible")
    axes.axhline(seconds["ACA"], color="C2", ls="--", label="ACAAdjoint, base method")
    axes.set(xlabel="checkpoints", ylabel="seconds")
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="white_dwarf",
    title="White dwarf: training time against checkpoints",
    source="McCallum and Foster (2024), table of the white dwarf",
    tasks=tasks,
    report=report,
)
