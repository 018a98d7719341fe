"""Stiff problems: Rosenbrock methods against Kvaerno5, and stiff noise.

Gradients of one component at the end with respect to the logarithms of the parameters.
The error of a gradient is that against SciPy's Radau, which integrates the solution and
its derivatives together at a tolerance of 1e-10. The second table solves an
Ornstein-Uhlenbeck process in steps that get larger, by solvers with a reversible
adjoint.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.integrate

import nodegrad

from .comparison import budgets, MEASURED, measured
from .measure import Clock, compile_in_turns, time_in_turns
from .problems import robertson_field
from .report import Column, Report, scientific


DTYPE = "float64"
_STEPS = Column("steps", "steps")
_ERROR = Column("error", "gradient error", scientific)
_TOLERANCE = Column("settings", "tolerance", str)
_COLUMNS = (_TOLERANCE, *MEASURED[:-1], _STEPS, _ERROR)


@dataclass(frozen=True)
class StiffProblem:
    """`y' = field(t, y, p)` over `[0, t1]`.

    - `scale`: the typical size of each component, for absolute tolerances.
    - `component`: the one whose value at the end is differentiated.
    - `size`: of the first step.
    """

    name: str
    field: Callable[[Any, Any, Any], Any]
    y0: Sequence[float]
    params: Sequence[float]
    t1: float
    scale: Sequence[float]
    component: int
    size: float


def _van_der_pol(t: Any, y: Any, p: Any) -> jax.Array:
    """The oscillator, with time in units of `mu`."""
    del t
    return jnp.stack([y[1], p[0] ** 2 * ((1 - y[0] ** 2) * y[1] - y[0])])


def _hires(t: Any, y: Any, p: Any) -> jax.Array:
    """How plants respond to light: eight concentrations (Schaefer, 1975)."""
    del t
    k1, k2, k3, k4, k5, k6, bind, split, fade, supply = p
    bound = bind * y[5] * y[7] - (k2 + split + fade) * y[6]
    return jnp.stack(
        [
            -k1 * y[0] + k2 * y[1] + k6 * y[2] + supply,
            k1 * y[0] - (k2 + k3) * y[1],
            -(k6 + k1) * y[2] + k2 * y[3] + k5 * y[4],
            k3 * y[1] + k1 * y[2] - (k4 + k2) * y[3],
            -(k1 + k5) * y[4] + k2 * y[5] + k2 * y[6],
            -bind * y[5] * y[7] + k4 * y[3] + k1 * y[4] - k2 * y[5] + split * y[6],
            bound,
            -bound,
        ]
    )


def _oregonator(t: Any, y: Any, p: Any) -> jax.Array:
    """The reaction of Belousov and Zhabotinsky (Field and Noyes, 1974)."""
    del t
    s, q, w = p
    return jnp.stack(
        [
            s * (y[1] + y[0] * (1 - q * y[0] - y[1])),
            (y[2] - (1 + y[0]) * y[1]) / s,
            w * (y[0] - y[2]),
        ]
    )


_PROBLEMS = (
    StiffProblem(
        name="Robertson, t = 40",
        field=robertson_field,
        y0=(1.0, 0.0, 0.0),
        params=(0.04, 3e7, 1e4),
        t1=40.0,
        scale=(1.0, 1e-5, 1.0),
        component=0,
        size=1e-5,
    ),
    StiffProblem(
        name="van der Pol, mu = 1000, t = 2",
        field=_van_der_pol,
        y0=(2.0, 0.0),
        params=(1e3,),
        t1=2.0,
        scale=(1.0, 1.0),
        component=0,
        size=1e-7,
    ),
    StiffProblem(
        name="HIRES, t = 321.8",
        field=_hires,
        y0=(1.0, 0, 0, 0, 0, 0, 0, 0.0057),
        params=(1.71, 0.43, 8.32, 0.69, 0.035, 8.32, 280.0, 0.69, 0.69, 0.0007),
        t1=321.8122,
        scale=(1e-3, 1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2, 1e-2),
        component=0,
        size=1e-4,
    ),
    StiffProblem(
        name="Oregonator, t = 360",
        field=_oregonator,
        y0=(1.0, 2.0, 3.0),
        params=(77.27, 8.375e-6, 0.161),
        t1=360.0,
        scale=(1.0, 1.0, 1.0),
        component=2,
        size=1e-3,
    ),
)


@dataclass(frozen=True)
class StiffMethod:
    """A solver, an adjoint, and the tolerance to use the solver at."""

    name: str
    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    tolerance: float


_MAX_STEPS = 16384
_DEFAULT = diffrax.RecursiveCheckpointAdjoint()
# By default there is room for the times of a quarter of the steps. The van der Pol
# equation takes more.
_ACA = nodegrad.ACAAdjoint(max_recorded_steps=_MAX_STEPS)
# The controller is cautious with Kvaerno5: at these tolerances its solutions are about
# as accurate as those of Rodas5P.
_METHODS = (
    StiffMethod("Kvaerno5, Diffrax default", diffrax.Kvaerno5(), _DEFAULT, 1e-6),
    StiffMethod("Kvaerno5, ACA", diffrax.Kvaerno5(), _ACA, 1e-6),
    StiffMethod("Rodas5P, ACA", nodegrad.Rodas5P(), _ACA, 1e-8),
    StiffMethod("Rodas5P, ACA, looser", nodegrad.Rodas5P(), _ACA, 1e-6),
    StiffMethod("Rosenbrock23, ACA", nodegrad.Rosenbrock23(), _ACA, 1e-4),
)
# Of the time and of the time to build, relative to Kvaerno5 with Diffrax's default.
_LIMITS = {"time": 0.5, "build": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a choice of problems."""
    names = [problem.name for problem in _PROBLEMS]
    parser.add_argument(
        "--only", nargs="+", choices=names, help="leave out all problems but these"
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures everything."""
    seconds, repeats = (0.3, 1) if arguments.quick else (3.0, 3)
    report.note(
        "Gradients of one component at the end with respect to the logarithms of the "
        "parameters, by diffeqsolve, AOT compiled; errors relative to SciPy's Radau."
    )
    for problem in _PROBLEMS:
        if problem.name in (arguments.only or [p.name for p in _PROBLEMS]):
            _measure(clock, report, problem, seconds, repeats)
    paths = 20 if arguments.quick else 200
    report.table("Ornstein-Uhlenbeck process", _NOISE_COLUMNS, _stiff_noise(paths))


def _measure(
    clock: Clock, report: Report, problem: StiffProblem, seconds: float, repeats: int
) -> None:
    """Compiles, times and compares the methods on one problem."""
    params = jnp.log(jnp.array(problem.params))
    makers = {m.name: partial(_gradient, problem, m) for m in _METHODS}
    programs = compile_in_turns(clock, makers, (params,), repeats)
    runs = {name: partial(p.run, params) for name, p in programs.items()}
    times = time_in_turns(clock, runs, seconds=seconds * len(runs))
    exact = _reference(problem)
    records = []
    for method, record in zip(_METHODS, measured(programs, times, {}), strict=True):
        gradient, steps = runs[method.name]()
        error = np.linalg.norm(gradient - exact) / np.linalg.norm(exact)
        found = {"steps": int(steps), "error": float(error)}
        records.append({**record, "settings": f"{method.tolerance:.0e}", **found})
        if method.name == "Rodas5P, ACA":
            peer = _METHODS[0].name
            report.budgets.extend(budgets(record, problem.name, peer, _LIMITS))
    report.table(problem.name, _COLUMNS, records)


def _gradient(problem: StiffProblem, method: StiffMethod) -> Callable[..., Any]:
    """`log_params -> (gradient, accepted steps)`, of which no trace is in a cache."""
    jax.clear_caches()
    tol = method.tolerance
    controller = diffrax.PIDController(tol, tol * jnp.array(problem.scale))

    def value(log_params):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            method.solver,
            0.0,
            problem.t1,
            problem.size,
            jnp.array(problem.y0),
            jnp.exp(log_params),
            stepsize_controller=controller,
            adjoint=method.adjoint,
            max_steps=_MAX_STEPS,
        )
        assert sol.ys is not None
        return sol.ys[0, problem.component], sol.stats["num_accepted_steps"]

    return jax.grad(value, has_aux=True)


def _reference(problem: StiffProblem) -> np.ndarray:
    """The same gradient, by SciPy: solution and derivatives in one equation."""
    n, params = len(problem.y0), jnp.array(problem.params)

    @jax.jit
    def augmented(t, z):
        y, s = z[:n], z[n:].reshape(n, -1)
        field = lambda y, log: problem.field(t, y, params * jnp.exp(log))
        zero = jnp.zeros_like(params)
        ds = jax.jacfwd(field, 0)(y, zero) @ s + jax.jacfwd(field, 1)(y, zero)
        return jnp.concatenate([field(y, zero), ds.ravel()])

    jacobian = jax.jit(jax.jacfwd(augmented, 1))
    scale = np.array(problem.scale)
    found = scipy.integrate.solve_ivp(
        lambda t, z: np.asarray(augmented(t, z)),
        (0, problem.t1),
        np.concatenate([problem.y0, np.zeros(n * len(problem.params))]),
        method="Radau",
        jac=lambda t, z: np.asarray(jacobian(t, z)),
        rtol=1e-10,
        atol=1e-10 * np.concatenate([scale, np.repeat(scale, len(problem.params))]),
    )
    return found.y[n:, -1].reshape(n, -1)[problem.component]


# Stiff noise, as in Shmelev, Salvi: Explicit and Effectively Symmetric Schemes for
# Neural SDEs, 2025: which solvers with a reversible adjoint survive large steps?

_SIZES = 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0
_FINE = 64
_HEUN = diffrax.Heun()
_NOISE_SOLVERS = {
    "Heun": _HEUN,
    "EES25": nodegrad.EES25(),
    "EES27": nodegrad.EES27(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "Reversible(Heun, resync_every=None)": nodegrad.Reversible(
        _HEUN, resync_every=None
    ),
    "Reversible(Heun)": nodegrad.Reversible(_HEUN),
    "Reversible(Heun, resync_every=1)": nodegrad.Reversible(_HEUN, resync_every=1),
}
_NOISE_COLUMNS = (
    Column("section", "rate times step"),
    Column("method", "method"),
    Column("error", "error, root mean square", lambda x: f"{x:.3g}"),
    Column("failed", "failed", str),
)


def _stiff_noise(paths: int) -> list[dict[str, Any]]:
    """The errors of dy = -rate (y - cos t) dt + dW at t = 10, in steps of 0.1."""
    h, t1, records = 0.1, 10.0, []
    keys = jr.split(jr.key(0), paths)

    def end(solver, size, rate, key):
        noise = diffrax.VirtualBrownianTree(0.0, t1, h / _FINE / 2, (), key)
        drift = lambda t, y, rate: -rate * (y - jnp.cos(t))
        diffusion = lambda *t__y__rate: jnp.sqrt(t__y__rate[-1])
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise)
        )
        sol = diffrax.diffeqsolve(
            terms, solver, 0.0, t1, size, 0.0, rate, throw=False, max_steps=10_000
        )
        assert sol.ys is not None
        return sol.ys[0], sol.result == diffrax.RESULTS.successful

    def over_paths(solver, size):
        each = partial(end, solver, size)
        return jax.jit(jax.vmap(jax.vmap(each, (None, 0)), (0, None)))

    rates = jnp.array(_SIZES) / h
    exact, _ = over_paths(_HEUN, h / _FINE)(rates, keys)
    for name, solver in _NOISE_SOLVERS.items():
        ys, successful = over_paths(solver, h)(rates, keys)
        errors = jnp.sqrt(jnp.mean((ys - exact) ** 2, axis=1))
        for size, error, ok in zip(_SIZES, errors, successful, strict=True):
            found = float(error) if jnp.isfinite(error) else 1e99
            records.append(
                {
                    "section": size,
                    "method": name,
                    "error": found,
                    "failed": int(jnp.sum(~ok)),
                }
            )
    return sorted(records, key=lambda r: r["section"])
