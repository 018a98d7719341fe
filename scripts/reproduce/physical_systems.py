"""Two measured physical systems: coupled oscillators and a double pendulum.

A network with ten hidden units learns the four states of each system from the
measurements of Schmidt and Lipson. The oscillators take 500 constant steps. The double
pendulum takes adaptive steps at a tolerance of 1e-6, and is compared with the
measurements at 500 times by linear interpolation, as in the published script.
"""

import functools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from matplotlib.axes import Axes

from . import adjoints, data
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


POINTS = 500
#: File, end time, divisor of the states, base method, most steps.
SYSTEMS: dict[str, tuple[str, float, float, Any, int]] = {
    "oscillators": (
        "real_double_linear_h_1.txt",
        3.0,
        100.0,
        diffrax.Midpoint(),
        POINTS - 1,
    ),
    "pendulum": ("real_double_pend_h_1.txt", 2.0, 10.0, diffrax.Bosh3(), 1000),
}
#: Loss of reversible and base, then minutes: reversible, and by checkpoints.
PUBLISHED = {
    "oscillators": ("1.00e-3", "1.01e-3", "11 to 15.5", "31: 30 to 36; 2: 546 to 655"),
    "pendulum": (
        "8.3e-3",
        "7.8e-3 to 12.8e-3",
        "21.9",
        "32: 62; 16: 71; 8: 83; 4: 140; 2: 846",
    ),
}
RATIOS = {"oscillators": 30 / 15.5, "pendulum": 62 / 21.9}
METHODS = ("reversible", "ACA", "checkpoints")
COUNTS = {"oscillators": 31, "pendulum": 32}
OPTIM = optax.adamw(1e-2, weight_decay=1e-5)


def network(seed: int) -> eqx.nn.MLP:
    """The vector field, with the initial weights of the published runs."""
    # Random numbers as JAX made them when those were done.
    with jax.threefry_partitionable(False):
        return eqx.nn.MLP(4, 4, 10, 1, jnp.tanh, key=jr.PRNGKey(seed))


def load(folder: Path | None, system: str) -> np.ndarray:
    """The states at equidistant times."""
    name, t1, divisor, _, _ = SYSTEMS[system]
    path = data.find(folder, name, "supplement of Schmidt and Lipson (2009)")
    table = np.loadtxt(path, skiprows=1)[:, 1:]
    # A file may have several recordings. The first one is used.
    ends = np.flatnonzero(np.diff(table[:, 0]) <= 0)
    table = table[: ends[0] + 1] if len(ends) else table
    times = table[:, 0] - table[0, 0]
    at = np.linspace(0, t1, POINTS)
    states = table[:, 1:5].T
    return np.stack([np.interp(at, times, x) for x in states], axis=-1) / divisor


def predict(system: str, solve: adjoints.Solve, model: Any, y0: Any) -> Any:
    """The states at the times of the measurements but the first, and the solution."""
    _, t1, _, _, max_steps = SYSTEMS[system]
    size = t1 / (POINTS - 1)

    def field(t: Any, y: Any, args: Any) -> Any:
        del t
        return args(y)

    adaptive = system == "pendulum"
    tolerant = diffrax.PIDController(1e-6, 1e-6)
    controller = tolerant if adaptive else diffrax.ConstantStepSize()
    sol = solve(
        diffrax.ODETerm(field),
        0.0,
        t1,
        size,
        y0,
        model,
        saveat=diffrax.SaveAt(t0=adaptive, steps=True),
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=False,
    )
    if not adaptive:
        return sol.ys, sol
    # What was not needed is padded with infinity.
    ys = jnp.where(jnp.isfinite(sol.ys), sol.ys, 0.0)
    at = jnp.linspace(0, t1, POINTS)[1:]
    return jax.vmap(partial(jnp.interp, at, sol.ts), 1, 1)(ys), sol


def make_step(system: str, solve: adjoints.Solve) -> Any:
    """An iteration: `(params, state, data) -> (params, state, loss, failed)`."""
    static = eqx.partition(network(0), eqx.is_array)[1]

    def step(params: Any, state: Any, states: Any) -> Any:
        def loss(params: Any) -> Any:
            model = eqx.combine(params, static)
            found, sol = predict(system, solve, model, states[0])
            return jnp.mean((states[1:] - found) ** 2), adjoints.failed(sol)

        (value, lost), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = OPTIM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, lost

    return step


def start(seed: int) -> tuple[Any, Any]:
    """The parameters and the state of the optimizer at first."""
    params = eqx.filter(network(seed), eqx.is_array)
    return params, OPTIM.init(params)


@functools.cache
def program(system: str, method: str) -> Any:
    """An iteration with a method, compiled."""
    base = SYSTEMS[system][3]
    solve = {
        # Without resyncs the copies diverge in training, on every seed of the pendulum.
        "reversible": adjoints.reversible(base, resync_every="auto"),
        "ACA": adjoints.aca(base),
        "checkpoints": adjoints.checkpointed(base, COUNTS[system]),
        "2 checkpoints": adjoints.checkpointed(base, 2),
    }[method]
    states = jnp.zeros((POINTS, 4))
    return adjoints.compiled(make_step(system, solve), *start(0), states)


def _states(folder: Path | None, system: str) -> Any:
    """The measurements, or, for the smoke size, something like them."""
    if folder is not None:
        return jnp.asarray(load(folder, system))
    t = jnp.linspace(0, 1, POINTS)[:, None]
    return jnp.sin(t * jnp.arange(1, 5))


def time_methods(
    system: str, methods: tuple[str, ...], iterations: int, folder: Path | None
) -> Result:
    """Seconds of an iteration after so many of training, and memory."""
    states = _states(folder, system)
    params, state, *_ = _trained("ACA", system, iterations, 0, states)
    programs = {method: program(system, method) for method in methods}
    args = params, state, states
    return {
        "seconds": adjoints.seconds_per_call(programs, args, 3.0, once_above=2.0),
        "bytes": {method: p.temp_bytes for method, p in programs.items()},
    }


def _trained(method: str, system: str, iterations: int, seed: int, states: Any) -> Any:
    """Parameters, state, losses, and how many iterations a failed solve has cost.

    There is no loss after a solve that failed, and nothing to go on from.
    """
    (params, state), step, losses = start(seed), program(system, method).run, []
    for _ in range(iterations):
        new_params, new_state, value, lost = step(params, state, states)
        if lost:
            break
        params, state = new_params, new_state
        losses.append(float(value))
    return params, state, losses, iterations - len(losses)


def train(
    system: str, method: str, iterations: int, seed: int, folder: Path | None
) -> Result:
    """The smallest loss, which is the published measure."""
    states = _states(folder, system)
    *_, losses, failures = _trained(method, system, iterations, seed, states)
    return {"loss": min(losses, default=None), "failures": failures}


def tasks(setting: Setting) -> dict[str, Any]:
    """Timing of each system, and training."""
    iterations = setting.pick(2, 2000, 10_000)
    systems = setting.pick(["oscillators"], list(SYSTEMS), list(SYSTEMS))
    timed = setting.pick(METHODS[:2], (*METHODS, "2 checkpoints"), METHODS)
    folder, out = None if setting.size == "smoke" else setting.data, {}
    if setting.size != "smoke":
        # Fails at once where there are no data.
        load(folder, systems[0])
    for system in systems:
        warm = min(iterations, 500)
        out[f"{system}-time"] = partial(time_methods, system, timed, warm, folder)
        for method in METHODS[:2]:
            for seed in range(setting.seeds):
                task = partial(train, system, method, iterations, seed, folder)
                out[f"{system}-{method}-seed{seed}"] = task
    return out


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """Times and losses, ours beside the published ones."""
    iterations = setting.pick(2, 2000, 10_000)
    systems = [s for s in SYSTEMS if f"{s}-time" in results]
    rows, claims = [], []
    for system in systems:
        timed, published = results[f"{system}-time"], PUBLISHED[system]
        seconds = timed["seconds"]
        runs = {m: across_seeds(results, f"{system}-{m}") for m in METHODS[:2]}
        losses = {m: [r["loss"] for r in r_m] for m, r_m in runs.items()}
        ratio = {m: s / seconds["reversible"] for m, s in seconds.items()}
        for method, value in seconds.items():
            rows.append(
                [
                    system,
                    _shown(system, method),
                    published[2] if method == "reversible" else None,
                    number(value * 10_000 / 60),
                    f"{ratio[method]:.2f}",
                    timed["bytes"][method],
                    spread(losses[method]) if method in losses else None,
                    sum(r["failures"] for r in runs.get(method, [])),
                ]
            )
        missed = [r["failures"] for r in runs["reversible"]]
        claims += _claims(system, ratio, losses, missed)
    columns = (
        "system",
        "gradient",
        "minutes, paper",
        "minutes of 10,000 iterations, ours",
        "time to reversible, ours",
        "temporary memory (bytes)",
        f"loss, ours, {iterations} iterations",
        "iterations lost to a failed solve",
    )
    table = Table(
        "Measured systems, with their initial weights as published", columns, rows
    )
    notes = [
        f"Published minutes with checkpoints, {s}: {PUBLISHED[s][3]}. Published loss: "
        f"reversible {PUBLISHED[s][0]}, base method {PUBLISHED[s][1]}."
        for s in systems
    ]
    notes += [
        "Minutes: the computing time of an iteration after 500 of training, times "
        "10,000. The pendulum takes more steps the longer it is trained.",
        f"Training is scaled down: {iterations} iterations instead of 10,000, "
        f"{setting.seeds} seeds instead of 3 (oscillators) and 5 (pendulum), and one "
        "base method for the oscillators, Midpoint.",
        "`Reversible` resyncs its copies where that is needed, which the published "
        "method does not do.",
        "The losses of `ACAAdjoint` are those of the base method with checkpoints, "
        "however many there are.",
    ]
    figures = {f"time to reversible, {s}": partial(draw, results, s) for s in systems}
    return Report((table,), tuple(claims), figures, tuple(notes))


def _shown(system: str, method: str) -> str:
    names = {"ACA": "`ACAAdjoint`", "checkpoints": f"{COUNTS[system]} checkpoints"}
    return names.get(method, method)


def _claims(
    system: str,
    ratio: Mapping[str, float],
    losses: Mapping[str, list[float]],
    missed: list[int],
) -> list[Claim]:
    ours, base = float(np.median(losses["reversible"])), float(np.median(losses["ACA"]))
    reason = (
        "" if ours < 1.5 * base else f"the median is {ours / base:.1f} times larger"
    )
    ended = sum(m > 0 for m in missed)
    if ended:
        reason = (
            f"a solve failed, which ended training early on {ended} seeds: the copies "
            "diverged, or there were more than the published number of steps"
        )
    claims = [
        Claim(
            f"{system}: the reversible method reaches the loss of its base method",
            f"{PUBLISHED[system][0]} against {PUBLISHED[system][1]}",
            f"{spread(losses['reversible'])} against {spread(losses['ACA'])}",
            not reason,
            reason,
        )
    ]
    if "checkpoints" in ratio:
        found = ratio["checkpoints"]
        claims.append(
            Claim(
                f"{system}: reversible is faster than {COUNTS[system]} checkpoints",
                f"{RATIOS[system]:.1f} times",
                f"{found:.1f} times",
                found > 1,
                "" if found > 1 else "Diffrax's checkpoints cost less here",
            )
        )
    return claims


def draw(results: Mapping[str, Result], system: str, axes: Axes) -> None:
    """Bars."""
    seconds = results[f"{system}-time"]["seconds"]
    names = [_shown(system, method) for method in seconds]
    axes.barh(names, [s / seconds["reversible"] for s in seconds.values()])
    axes.invert_yaxis()


EXPERIMENT = Experiment(
    name="physical_systems",
    title="Two measured physical systems",
    source="McCallum and Foster (2024), tables of the physical systems",
    tasks=tasks,
    report=report,
)
