"""Ensembles of small mechanistic equations: many samples, each at its own step.

Lorenz, Lotka-Volterra, an epidemic with ten compartments and, with an implicit solver,
Robertson's reactions and a network of twenty reactions. Compared with `jax.vmap` of
Diffrax's default adjoint, and with the replay of `gradsolve` where that is installed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from .comparison import compare
from .measure import Clock
from .problems import loss, lotka_volterra, Problem, robertson_field
from .report import Budget, Report
from .solves import (
    ACA,
    ACA_IN_DIFFRAX,
    DIFFRAX,
    gradient_function,
    Method,
    value_function,
)


DTYPE = "float64"
_METHODS = DIFFRAX, ACA, ACA_IN_DIFFRAX
_GRADSOLVE = "replay of gradsolve, recorded before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--full`: also the largest ensembles."""
    parser.add_argument("--full", action="store_true", help="also 16384 samples")


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures every problem at every size."""
    report.note(
        "AOT compiled, adaptive steps, the mean of the squares of the final states. "
        "*Own* parameters: every sample has its own, and so a gradient of its own; "
        "*shared*: one vector for all, whose gradient is a sum."
    )
    seconds = 0.5 if arguments.quick else 4.0
    sizes = [128, 2048] if arguments.quick else [1, 128, 2048]
    if arguments.full:
        sizes.append(16384)
    explicit = [_lorenz()] if arguments.quick else [_lorenz(), _prey(), _epidemic()]
    for problem in explicit:
        for lanes in sizes:
            _measure(clock, report, problem, lanes, False, {"time": 0.15}, seconds)
    _measure_alone(clock, report, seconds)
    shared = 128 if arguments.quick else 2048
    _measure(clock, report, _lorenz(), shared, True, {"time": 0.15}, seconds)
    for lanes in [1] if arguments.quick else [1, 128]:
        limits = {"build": 0.5}
        _measure(clock, report, _robertson(), lanes, False, limits, seconds)
    _measure(clock, report, _reactions(), 1, False, {"build": 0.5}, seconds)


def _measure(
    clock: Clock,
    report: Report,
    problem: Problem,
    lanes: int,
    shared: bool,
    limits: dict[str, float],
    seconds: float,
) -> None:
    """The forward passes and the gradients of an ensemble of `lanes` samples."""
    inputs = _ensemble(problem, lanes, shared)
    span = np.float64(problem.t1), np.float64(problem.t1 / 100)
    parameters = "shared" if shared else "own"
    name = f"{problem.name}, {lanes} samples, {parameters} parameters"
    values = {m.name: partial(_value, problem, m, shared) for m in _METHODS}
    compare(clock, report, f"{name}: forward", values, (inputs, span), {}, seconds)
    gradients: dict[str, Callable] = {
        m.name: partial(_gradient, problem, m, shared) for m in _METHODS
    }
    replay = None if shared else _gradsolve_gradient(problem, inputs)
    if replay is not None:
        gradients[_GRADSOLVE] = lambda: replay
    times = compare(
        *(clock, report, f"{name}: gradient", gradients, (inputs, span)),
        *(limits, seconds, (_GRADSOLVE,)),
    )
    if replay is not None:
        ratio = times[ACA.name] / times[_GRADSOLVE]
        what = f"time of {ACA.name}"
        report.budgets.append(Budget(what, name, _GRADSOLVE, ratio, 0.25))


def _measure_alone(clock: Clock, report: Report, seconds: float) -> None:
    """One solve: its gradient in units of its forward pass."""
    problem = replace(_prey(), t1=15.0)
    inputs = problem.y0, problem.args
    span = np.float64(problem.t1), np.float64(0.1)
    for method in _METHODS[1:]:
        makers = {
            "forward": partial(value_function, problem, method, "adaptive"),
            "gradient": partial(gradient_function, problem, method, "adaptive"),
        }
        name = f"{problem.name}, one sample: {method.name}"
        compare(clock, report, name, makers, (inputs, span), {"time": 3.5}, seconds)


def _ensemble(problem: Problem, lanes: int, shared: bool) -> tuple[Any, Any]:
    """Initial states and parameters around those of the problem."""
    scales = jnp.linspace(0.9, 1.1, lanes)[:, None]
    args = problem.args if shared else scales * problem.args
    return scales * problem.y0, args


def _value(problem: Problem, method: Method, shared: bool) -> Callable[..., Any]:
    """`(inputs, span) -> mean square`, a new function."""
    field = lambda t, y, args: problem.vector_field(t, y, args)

    def value(inputs, span):
        y0, args = inputs
        solve = lambda y0, args: method(problem, field, y0, args, span, "adaptive").ys
        ys = jax.vmap(solve, in_axes=(0, None if shared else 0))(y0, args)
        mean = loss(ys)
        return mean, mean

    return value


def _gradient(problem: Problem, method: Method, shared: bool) -> Callable[..., Any]:
    return jax.value_and_grad(_value(problem, method, shared), has_aux=True)


@dataclass(frozen=True)
class _ForGradsolve:
    """A problem as `gradsolve` expects it."""

    problem: Problem
    t0: float = 0.0

    @property
    def name(self) -> str:
        return self.problem.name

    @property
    def dim(self) -> int:
        return len(self.problem.y0)

    @property
    def t1(self) -> float:
        return self.problem.t1

    @property
    def is_stiff(self) -> bool:
        return isinstance(self.problem.solver, diffrax.AbstractImplicitSolver)

    def f_jax(self, t: Any, y: Any, params: Any) -> Any:
        return self.problem.vector_field(t, y, params)


def _gradsolve_gradient(problem: Problem, inputs: Any) -> Callable[..., Any] | None:
    """The gradient on the grid that `gradsolve` records; the recording is not timed.

    `None` where it is not installed, or where its method is another one.
    """
    theirs = _ForGradsolve(problem)
    if theirs.is_stiff:
        return None
    try:
        import gradsolve
    except ImportError:
        return None
    y0, args = inputs
    final = gradsolve.grad_closure(
        theirs,
        np.asarray(y0),
        np.asarray(args),
        wrt=("y0", "params"),  # pyright: ignore[reportArgumentType]
        engine="tsit5_replay",
        rtol=problem.tolerance,
        atol=problem.tolerance,
    )

    def value(inputs, span):
        del span
        return loss(final(*inputs)), None

    return jax.value_and_grad(value, has_aux=True)


def _lorenz() -> Problem:
    """The equations of Lorenz (1963)."""

    def vector_field(t, y, args):
        del t
        sigma, rho, beta = args
        return jnp.stack(
            [
                sigma * (y[1] - y[0]),
                y[0] * (rho - y[2]) - y[1],
                y[0] * y[1] - beta * y[2],
            ]
        )

    y0, args = jnp.array([1.0, 1.0, 1.0]), jnp.array([10.0, 28.0, 8 / 3])
    return Problem("Lorenz", vector_field, y0, args, 1.0, 1e-7, pinned=False)


def _prey() -> Problem:
    return replace(lotka_volterra(), t1=10.0, tolerance=1e-7, pinned=False)


def _epidemic() -> Problem:
    """Ten compartments: susceptible, three exposed, three infectious, and the rest."""

    def vector_field(t, y, args):
        del t
        infection, onset, recovery, death, waning, hospital = args
        s, e1, e2, e3, i1, i2, i3, h, r, _ = y
        total = s + e1 + e2 + e3 + i1 + i2 + i3 + h + r
        infected = infection * s * (i1 + i2 + 0.5 * i3) / total
        ended = 3 * recovery * i3
        return jnp.stack(
            [
                waning * r - infected,
                infected - 3 * onset * e1,
                3 * onset * (e1 - e2),
                3 * onset * (e2 - e3),
                3 * onset * e3 - 3 * recovery * i1,
                3 * recovery * (i1 - i2),
                3 * recovery * i2 - ended,
                hospital * ended - (recovery + death) * h,
                (1 - hospital) * ended + recovery * h - waning * r,
                death * h,
            ]
        )

    y0 = jnp.array([0.99, 0.01, 0, 0, 0, 0, 0, 0, 0, 0])
    args = jnp.array([0.6, 0.2, 0.25, 0.02, 0.01, 0.1])
    return Problem("epidemic", vector_field, y0, args, 60.0, 1e-7, pinned=False)


def _robertson() -> Problem:
    """The reactions of Robertson (1966), for an implicit solver."""
    # So that the parameters, and their gradients, are of one magnitude.
    units = jnp.array([1.0, 1e7, 1e4])
    vector_field = lambda t, y, args: robertson_field(t, y, args * units)
    y0, args = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3.0, 1.0])
    return Problem(
        "Robertson",
        vector_field,
        y0,
        args,
        100.0,
        1e-8,
        pinned=False,
        solver=diffrax.Kvaerno5(),
    )


def _reactions() -> Problem:
    """Twenty reactions of ten species, written out as code generators do."""
    species, reactions = 10, 20
    # Reaction `i` turns two species into two others, at rates that span two decades.
    ends = [
        tuple(j % species for j in (i, 3 * i + 1, i + 2, 7 * i + 4))
        for i in range(reactions)
    ]

    def vector_field(t, y, args):
        del t
        slopes = [jnp.zeros(())] * species
        for i, (left, other, right, last) in enumerate(ends):
            rate = args[i] * y[left] * y[other]
            for reactant in (left, other):
                slopes[reactant] = slopes[reactant] - rate
            for product in (right, last):
                slopes[product] = slopes[product] + rate
        return jnp.stack(slopes)

    y0 = jnp.linspace(0.2, 1.0, species)
    args = jnp.logspace(-1.0, 1.0, reactions)
    return Problem(
        "twenty reactions",
        vector_field,
        y0,
        args,
        1.0,
        1e-8,
        pinned=False,
        solver=diffrax.Kvaerno5(),
    )
