"""A latent ODE that fills in trajectories of which a part was observed."""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from benchmarks.training_tasks import shuffled
from matplotlib.axes import Axes

import nodegrad

from . import hopper
from .experiment import (
    across_seeds,
    Claim,
    entirely_below,
    Experiment,
    Report,
    Result,
    Setting,
    spread,
    Table,
)


LATENT, HIDDEN = 15, 64
FRACTIONS = (0.1, 0.2, 0.5)
# Published mean square errors in units of 0.01, by the fraction that was observed.
_PUBLISHED = {
    "adjoint": (0.47, 0.44, 0.40),
    "naive": (0.36, 0.30, 0.29),
    "ACA": (0.31, 0.27, 0.26),
}
_ADJOINTS = {
    "ACA": nodegrad.ACAAdjoint(),
    "adjoint": diffrax.BacksolveAdjoint(),
    "naive": diffrax.RecursiveCheckpointAdjoint(),
}


class LatentODE(eqx.Module):
    """A recurrent cell reads what was observed, an equation continues from there."""

    cell: eqx.nn.GRUCell
    encode: eqx.nn.Linear
    field: eqx.nn.MLP
    decode: eqx.nn.Linear

    def __init__(self, key: Any, channels: int):
        keys = jr.split(key, 4)
        self.cell = eqx.nn.GRUCell(2 * channels, HIDDEN, key=keys[0])
        self.encode = eqx.nn.Linear(HIDDEN, 2 * LATENT, key=keys[1])
        self.field = eqx.nn.MLP(LATENT, LATENT, HIDDEN, 3, jnp.tanh, key=keys[2])
        self.decode = eqx.nn.Linear(LATENT, channels, key=keys[3])

    def __call__(self, series: Any, seen: Any, key: Any, method: str) -> Any:
        """Predictions `(batch, time, channels)`, and the divergence from the prior."""

        def read(h: Any, x: Any) -> tuple[Any, None]:
            return jax.vmap(self.cell)(x, h), None

        # Backwards in time, so that the state ends where the equation begins.
        mask = jnp.broadcast_to(seen[..., None], series.shape).astype(series.dtype)
        inputs = jnp.concatenate([series * mask, mask], axis=-1)
        start = jnp.zeros((len(series), HIDDEN), series.dtype)
        h, _ = jax.lax.scan(read, start, jnp.moveaxis(inputs, 1, 0)[::-1])
        mean, log_scale = jnp.split(jax.vmap(self.encode)(h), 2, axis=-1)
        z0 = mean + jnp.exp(log_scale) * jr.normal(key, mean.shape, mean.dtype)
        square = mean**2 + jnp.exp(2 * log_scale) - 1 - 2 * log_scale
        zs = self._solve(z0, series.shape[1], method)
        predicted = jax.vmap(jax.vmap(self.decode))(zs)
        return jnp.moveaxis(predicted, 0, 1), jnp.sum(square, axis=-1) / 2

    def _solve(self, z0: Any, length: int, method: str) -> Any:
        """The whole batch is one state."""

        def vector_field(t: Any, z: Any, mlp: Any) -> Any:
            del t
            return jax.vmap(mlp)(z)

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            diffrax.Dopri5(),
            jnp.float32(0),
            jnp.float32(1),
            None,
            z0,
            self.field,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, length, dtype=z0.dtype)),
            stepsize_controller=diffrax.PIDController(1e-3, 1e-4),
            adjoint=_ADJOINTS[method],
            max_steps=256,
            throw=False,
        )
        return sol.ys


_load = lru_cache(hopper.load)


@lru_cache
def _programs(method: str, iterations: int) -> Any:
    rate = optax.cosine_decay_schedule(1e-2, iterations)
    optim = optax.adamax(rate)

    @eqx.filter_jit
    def step(model: Any, state: Any, series: Any, seen: Any, key: Any) -> Any:
        def loss(model: Any) -> Any:
            predicted, divergence = model(series, seen, key, method)
            square = jnp.mean((predicted - series) ** 2)
            return square + 1e-5 * jnp.mean(divergence), square

        (_, square), grad = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        updates, state = optim.update(grad, state)
        return eqx.apply_updates(model, updates), state, square

    @eqx.filter_jit
    def test(model: Any, series: Any, seen: Any, key: Any) -> Any:
        predicted, _ = model(series, seen, key, method)
        return jnp.mean((predicted - series) ** 2)

    return optim, step, test


def _train(
    method: str,
    fraction: float,
    count: int,
    iterations: int,
    folder: Path | None,
    seed: int,
) -> Result:
    name, series = _load(folder, count)
    # The same observations for all methods.
    seen = np.random.default_rng(0).random(series.shape[:2]) < fraction
    held_out = count // 5
    model = LatentODE(jr.PRNGKey(seed), series.shape[2])
    optim, step, test = _programs(method, iterations)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    train = series[held_out:], seen[held_out:]
    batches, key = shuffled(train, min(50, len(train[0])))(seed), jr.PRNGKey(seed)
    losses = []
    for index in range(iterations):
        key = jr.fold_in(key, index)
        model, state, square = step(model, state, *next(batches), key)
        losses.append(float(square))
    error = test(model, series[:held_out], seen[:held_out], key)
    return {"data": name, "error": float(error), "losses": losses}


def _tasks(setting: Setting) -> dict[str, Any]:
    count = setting.pick(10, 500, 10_000)
    iterations = setting.pick(2, 300, 48_000)
    methods = setting.pick(("ACA", "adjoint"), ("ACA", "adjoint"), tuple(_ADJOINTS))
    return {
        f"{method}-{fraction:g}-seed{seed}": partial(
            _train, method, fraction, count, iterations, setting.data, seed
        )
        for fraction in FRACTIONS[: setting.pick(1, 3, 3)]
        for method in methods
        for seed in range(setting.seeds)
    }


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    name = next(iter(results.values()))["data"]
    errors = {
        (method, fraction): [100 * run["error"] for run in runs]
        for method in _PUBLISHED
        for fraction in FRACTIONS
        if (runs := across_seeds(results, f"{method}-{fraction:g}"))
    }
    rows = [
        [f"{fraction:.0%}", method, _PUBLISHED[method][i], spread(found)]
        for i, fraction in enumerate(FRACTIONS)
        for method in _PUBLISHED
        if (found := errors.get((method, fraction)))
    ]
    columns = "observed", "latent ODE by", "paper", "ours"
    table = Table("Mean square error of trajectories, in units of 0.01", columns, rows)
    claims = tuple(
        _claim(index, errors)
        for index, fraction in enumerate(FRACTIONS)
        if ("ACA", fraction) in errors
    )
    which = "MuJoCo's hopper, as published"
    if name != "hopper":
        which = (
            "A double pendulum with friction stands in for MuJoCo's hopper, which "
            "needs the package mujoco and its model in the folder of the data"
        )
    notes = (
        f"{which}. {setting.pick(10, 500, 10_000)} trajectories (paper: 10,000), "
        f"{setting.pick(2, 300, 48_000)} iterations of 50 (paper: 48,000).",
        f"A GRU encoder without an equation of its own, {HIDDEN} units in all layers "
        "(paper: an ODE-RNN, up to 300), one latent sample (paper: 3), a weight of "
        "1e-5 on the divergence. Dopri5 at 1e-3 and 1e-4. The paper's RNN rows are "
        "from the literature, and are not run.",
    )
    figures = {"10 % observed": partial(_draw, results)}
    return Report((table,), claims, figures, notes)


def _claim(index: int, errors: Mapping[Any, list[float]]) -> Claim:
    fraction = FRACTIONS[index]
    aca, adjoint = (errors[method, fraction] for method in ("ACA", "adjoint"))
    return Claim(
        f"{fraction:.0%} observed: ACA's error is below the adjoint method's",
        f"{_PUBLISHED['ACA'][index]} against {_PUBLISHED['adjoint'][index]}",
        f"{np.median(aca):.3g} against {np.median(adjoint):.3g}",
        entirely_below(aca, adjoint),
        "both train to the same error: after so few iterations the error of a gradient "
        "does not matter yet",
    )


def _draw(results: Mapping[str, Result], axes: Axes) -> None:
    for method in _PUBLISHED:
        if runs := across_seeds(results, f"{method}-0.1"):
            axes.semilogy(runs[0]["losses"], label=method)
    axes.set(xlabel="iteration", ylabel="training error")
    axes.legend(fontsize=7)


EXPERIMENT = Experiment(
    name="latent_ode",
    title="A latent ODE that fills in trajectories",
    source="ACA, the hopper of MuJoCo",
    tasks=_tasks,
    report=_report,
    x64=False,
)
