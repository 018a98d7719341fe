"""What `scripts/benchmark.py fits` measures."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import Clock, compile_program, Program, relative_error
from benchmarks.report import Budget, Column, fixed, Report, scientific, significant

import nodegrad

from . import peers
from .likelihood import Fit, make_fit, Settings
from .tables import read_tables
from .trust_region import minimise, quadratic


#: Log-likelihoods at nominal parameters, from AMICI's `benchmark_models.yaml`.
REFERENCES = {
    "Boehm_JProteomeRes2014": -138.22199693517703,
    "Crauste_CellSystems2017": -190.96521897435176,
    "Elowitz_Nature2000": 63.20279991419332,
    "Sneyd_PNAS2002": 319.79177818768756,
    "Fujita_SciSignal2010": 53.08377736998929,
}
OURS = "trust region, compiled"
MAX_ITERATIONS = 500
#: A fit stops where a step changes the log-likelihood by less.
TOLERANCE = 1e-5
#: A start has converged if it ends within this of the best end of all methods.
CONVERGED = 0.1
STIFF = Settings(nodegrad.Rodas5P(), rtol=1e-8, atol=1e-8)
# For differences of likelihoods. There is room for the times of a quarter of the steps.
CHECKED = Settings(nodegrad.Rodas5P(), rtol=1e-10, atol=1e-10, max_steps=40_000)

NOMINAL = (
    Column("case", "problem"),
    Column("parameters", "parameters"),
    Column("llh", "log-likelihood", fixed(5)),
    Column("reference", "reference", fixed(5)),
    Column("llh_difference", "difference", scientific),
    Column("gradient_error", "gradient, relative error", scientific),
)
FITS = (
    Column("case", "problem"),
    Column("method", "method"),
    Column("best_llh", "best log-likelihood", fixed(3)),
    Column("converged", "converged"),
    Column("iterations", "iterations", fixed(0)),
    Column("cpu_seconds", "time (s)", significant(3)),
    Column("per_second", "converged per s", significant(3)),
    Column("build_seconds", "build (s)", significant(3)),
)
ERRORS = (
    Column("parameter", "parameter"),
    Column("estimate", "estimate", significant(5)),
    Column("standard_error", "standard error", scientific),
    Column("at_bound", "at a bound"),
)

Point = np.ndarray
Runner = Callable[[Point], peers.End]


@dataclass(frozen=True)
class Options:
    """The folder of the problems, and how much is computed."""

    folder: Path
    starts: int
    seed: int
    quick: bool


def fit_mechanistic(
    options: Options, names: Sequence[str], clock: Clock, report: Report
) -> None:
    """Likelihoods, gradients, fits and standard errors of mechanistic models."""
    if not names:
        return
    report.note(
        f"{options.starts} starts, uniform within the bounds on the scale of each "
        f"parameter (seed {options.seed}); those at which the likelihood or its "
        "gradient is not finite are drawn again. All methods have the same starts, "
        f"solver, tolerances, at most {MAX_ITERATIONS} iterations, and stop where a "
        f"step changes the log-likelihood by less than {TOLERANCE:g}. A start has "
        f"converged if it ends within {CONVERGED} of the best end of all methods. "
        "Times are without compilation."
    )
    nominal, fitted = [], []
    for name in names:
        tables = read_tables(options.folder / name)
        nominal.append(
            check_likelihood(make_fit(tables, CHECKED), REFERENCES[name], report)
        )
        fit = make_fit(tables, STIFF)
        records, best, information = _fits(fit, options, clock)
        fitted += records
        _judge(records, REFERENCES[name], report)
        title = f"{name}: standard errors at the best fit"
        report.table(title, ERRORS, standard_errors(fit, best, information))
    report.table("at nominal parameters", NOMINAL, nominal)
    report.table("fits", FITS, fitted)


def check_likelihood(fit: Fit, reference: float, report: Report) -> dict[str, Any]:
    """The likelihood at nominal parameters, and its gradient near them.

    At the nominal parameters themselves the gradient is close to zero.
    """
    value_and_grad = jax.jit(jax.value_and_grad(fit.negative_log_likelihood))
    llh = -float(value_and_grad(jnp.asarray(fit.nominal))[0])
    rng = np.random.default_rng(0)
    value = lambda x: float(value_and_grad(jnp.asarray(x))[0])
    x = _near_nominal(fit, value, rng)
    directions = _directions(len(x), rng)
    gradient = np.asarray(value_and_grad(jnp.asarray(x))[1])
    by_differences = [_difference(value, x, v) for v in directions]
    error = relative_error(directions @ gradient, np.array(by_differences))
    difference = abs(llh - reference)
    budget = partial(Budget, case=fit.name)
    report.budgets += [
        budget(
            "log-likelihood, difference",
            peer="reference",
            measured=difference,
            limit=1e-3,
        ),
        budget(
            "gradient, relative error",
            peer="central differences",
            measured=error,
            limit=1e-5,
        ),
    ]
    return {
        "case": fit.name,
        "parameters": len(x),
        "llh": llh,
        "reference": reference,
        "llh_difference": difference,
        "gradient_error": error,
    }


def _near_nominal(
    fit: Fit, value: Callable[[Point], float], rng: np.random.Generator
) -> Point:
    """A point between the bounds and near the nominal parameters, with a likelihood.

    If there is none (solutions of Crauste's model blow up 1e-5 away from the nominal
    parameters), a random point between the bounds.
    """
    x = np.clip(fit.nominal, fit.lower + 0.1, fit.upper - 0.1)
    x = x + 0.01 * rng.standard_normal(len(x))
    if np.isfinite(value(x)):
        return x
    return draw_starts(fit, 1, 0, lambda x: bool(np.isfinite(value(x))))[0]


def _directions(count: int, rng: np.random.Generator) -> np.ndarray:
    """Every parameter alone; of many parameters, a few random directions."""
    if count <= 100:
        return np.eye(count)
    found = rng.standard_normal((3, count))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _difference(
    value: Callable[[Point], float], x: Point, v: Point, h: float = 1e-3
) -> float:
    """A central difference of order four along `v`."""
    near, far = (value(x + s * v) - value(x - s * v) for s in (h, 2 * h))
    return (8 * near - far) / (12 * h)


def draw_starts(
    fit: Fit, count: int, seed: int, is_valid: Callable[[Point], bool]
) -> list[Point]:
    """Points within the bounds, uniform on the scales of the parameters."""
    rng = np.random.default_rng(seed)
    found: list[Point] = []
    while len(found) < count:
        x = rng.uniform(fit.lower, fit.upper)
        if is_valid(x):
            found.append(x)
    return found


def _fits(
    fit: Fit, options: Options, clock: Clock
) -> tuple[list[dict[str, Any]], Point, np.ndarray]:
    """A record for each method, the best point of all, its Fisher information."""
    x = jnp.asarray(fit.nominal)
    model = compile_program(clock, partial(quadratic, fit), x)
    reverse = compile_program(clock, jax.value_and_grad(fit.negative_log_likelihood), x)
    ours = compile_program(
        clock,
        partial(minimise, fit, max_iterations=MAX_ITERATIONS, tolerance=TOLERANCE),
        x,
    )
    methods: dict[str, tuple[Program, Runner]] = {
        OURS: (ours, lambda x: _ended(ours.run(jnp.asarray(x)))),
        "Fides": (
            model,
            lambda x: peers.fit_by_fides(fit, model.run, x, MAX_ITERATIONS, TOLERANCE),
        ),
        "L-BFGS-B": (
            reverse,
            lambda x: peers.fit_by_lbfgs(
                fit, reverse.run, x, MAX_ITERATIONS, TOLERANCE
            ),
        ),
    }

    def is_valid(x: Point) -> bool:
        found = model.run(jnp.asarray(x))
        return bool(np.all(np.isfinite(found.gradient)))

    starts = draw_starts(fit, options.starts, options.seed, is_valid)
    ends: dict[str, list[peers.End]] = {}
    seconds: dict[str, float] = {}
    for name, (_, run) in methods.items():
        before = clock.now()
        ends[name] = [run(start) for start in starts]
        seconds[name] = clock.now() - before
    best = min(
        (end for of_method in ends.values() for end in of_method),
        key=lambda end: end.value if np.isfinite(end.value) else np.inf,
    )
    records = [
        {
            "case": fit.name,
            "method": name,
            **_summary(ends[name], best.value, seconds[name]),
            "build_seconds": methods[name][0].build_seconds,
        }
        for name in methods
    ]
    information = model.run(jnp.asarray(best.x)).hessian
    return records, np.asarray(best.x), np.asarray(information)


def _ended(found: Any) -> peers.End:
    jax.block_until_ready(found)
    return peers.End(np.asarray(found.x), float(found.value), int(found.iterations))


def _summary(ends: Sequence[peers.End], best: float, seconds: float) -> dict[str, Any]:
    values = np.array([end.value for end in ends])
    converged = int(np.sum(values <= best + CONVERGED))
    return {
        "best_llh": -float(np.nanmin(values)),
        "converged": f"{converged} of {len(ends)}",
        "iterations": statistics.median(end.iterations for end in ends),
        "cpu_seconds": seconds,
        "per_second": converged / seconds,
    }


def _judge(
    records: Sequence[Mapping[str, Any]], reference: float, report: Report
) -> None:
    """Enters what the first of the records has to keep to, next to Fides."""
    ours, fides, *_ = records
    case = ours["case"]
    below = reference - ours["best_llh"]
    report.budgets.append(
        Budget("best log-likelihood, below", case, "reference", max(below, 0.0), 1e-2)
    )
    if fides["per_second"] > 0:
        speed = ours["per_second"]
        ratio = fides["per_second"] / speed if speed > 0 else np.inf
        what = "converged starts per second of Fides"
        report.budgets.append(Budget(what, case, OURS, ratio, 0.5))


def standard_errors(
    fit: Fit, x: Point, information: np.ndarray
) -> list[dict[str, Any]]:
    """Estimates on their scales, and their errors from the Fisher `information`.

    Parameters at a bound count as known. A direction that the data do not determine
    makes the errors of its parameters large.
    """
    at_bound = (x - fit.lower < 1e-3) | (fit.upper - x < 1e-3)
    free = np.flatnonzero(~at_bound)
    values, vectors = np.linalg.eigh(information[np.ix_(free, free)])
    floor = 1e-14 * np.max(values, initial=0.0)
    variances = (vectors**2) @ (1 / np.maximum(values, floor))
    errors = dict(zip(free.tolist(), np.sqrt(variances).tolist(), strict=True))
    return [
        {
            "parameter": name,
            "estimate": float(x[i]),
            "standard_error": errors.get(i),
            "at_bound": "yes" if at_bound[i] else "",
        }
        for i, name in enumerate(fit.names)
    ]
