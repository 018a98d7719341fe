"""The van der Pol equation, forwards and back again, and gradients through it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import relative_error
from matplotlib.axes import Axes

from .experiment import Claim, Experiment, number, Report, Result, Setting, Table
from .methods import gradients, METHODS


# The coefficients p and q, and the names under which rows list them.
SYSTEMS = {"p = 0.15, q = 1": (0.15, 1.0), "mu = 1": (1.0, 1.0), "mu = 5": (5.0, 5.0)}
ROUND_TRIPS = (
    ("p = 0.15, q = 1", 5.0),
    ("p = 0.15, q = 1", 10.0),
    ("p = 0.15, q = 1", 25.0),
    ("mu = 1", 10.0),
    ("mu = 1", 25.0),
    ("mu = 5", 5.0),
)
TOLERANCES = ((1e-3, 1e-6), (1e-6, 1e-9))
GRADIENTS = (
    ("p = 0.15, q = 1", 25.0, 1e-6),
    ("mu = 1", 10.0, 1e-3),
    ("mu = 1", 10.0, 1e-6),
    ("mu = 1", 25.0, 1e-6),
)
START = (2.0, 0.0)
POINTS = 200


def _field(t: Any, y: Any, args: Any) -> Any:
    del t
    p, q = args
    return jnp.stack([y[1], (p - q * y[0] ** 2) * y[1] - y[0]])


@jax.jit
def _both_ways(t1: Any, args: Any, rtol: Any, atol: Any) -> Any:
    """The solutions on a grid, forwards from the start and backwards from its end."""

    def solve(y0: Any, ts: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_field),
            diffrax.Dopri5(),
            ts[0],
            ts[-1],
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol, atol),
            max_steps=4096,
            throw=False,
        ).ys

    ts = jnp.linspace(0, t1, POINTS)
    there = solve(jnp.asarray(START), ts)
    return there, solve(there[-1], ts[::-1])


def _round_trips() -> Result:
    """How far from its start each solution ends; infinity if the solve fails."""
    rows, paths = [], {}
    for name, t1 in ROUND_TRIPS:
        row: list[Any] = [name, t1]
        for tolerance in TOLERANCES:
            t1_, args, *tol = jax.tree.map(jnp.asarray, (t1, SYSTEMS[name], *tolerance))
            there, back = _both_ways(t1_, args, *tol)
            # A solve that fails leaves infinity where it did not come to.
            row.append(relative_error(back[-1], START))
            if (name, t1) == ROUND_TRIPS[2] and tolerance == TOLERANCES[0]:
                paths = {"there": there.tolist(), "back": back.tolist()}
        rows.append(row)
    return {"rows": rows, **paths}


def _errors(name: str, t1: float, rtol: float) -> Result:
    """The relative error of every method's gradient, and of the state."""
    y0, args = jnp.asarray(START), jnp.asarray(SYSTEMS[name])

    def measured(method: str, rtol: float, atol: float) -> Any:
        run = jax.jit(partial(gradients, _field, method, jnp.sum))
        return run(jnp.asarray(t1), y0, args, tol=(rtol, atol))

    # Independent of what is compared.
    value, exact = measured("exact", 1e-11, 1e-11)
    found = {}
    for method in METHODS:
        state, gradient = measured(method, rtol, rtol / 1000)
        errors = [relative_error(g, e) for g, e in zip(gradient, exact, strict=True)]
        found[method] = [abs(float(state / value - 1)), *errors]
    return found


def _key(name: str, t1: float, rtol: float) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in name)
    return f"gradient-{stem}-{t1:g}-{rtol:g}"


def _tasks(setting: Setting) -> dict[str, Any]:
    cases = GRADIENTS[: setting.pick(1, 4, 4)]
    tasks: dict[str, Any] = {"round_trips": _round_trips}
    return tasks | {_key(*case): partial(_errors, *case) for case in cases}


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    trips = results["round_trips"]
    columns = "system", "T", *(f"rtol {r:g}, atol {a:g}" for r, a in TOLERANCES)
    back = Table("Distance from the start after 0 to T to 0", columns, trips["rows"])
    rows, better = [], []
    for case in GRADIENTS[: setting.pick(1, 4, 4)]:
        found = results[_key(*case)]
        rows += [[*case, method, *found[method]] for method in METHODS]
        better.append(found["adjoint"][1] / found["ACA"][1])
    columns = "system", "T", "rtol", "method", "error of L", "of dL/dy0", "of dL/d(p,q)"
    table = Table("Relative errors of gradients, L = y1(T) + y2(T)", columns, rows)
    worst = trips["rows"][2][2]
    claims = (
        Claim(
            "the solution backwards in time does not return to its start (T = 25)",
            "a figure: it does not",
            f"distance {number(worst)} of the norm of the start",
            worst > 0.1,
        ),
        Claim(
            "ACA's gradient is more accurate than the adjoint method's in every row",
            "more accurate",
            f"{number(min(better), 2)} to {number(max(better), 2)} times in dL/dy0",
            min(better) > 1,
        ),
    )
    notes = (
        "y1' = y2, y2' = (p - q y1^2) y2 - y1, y(0) = (2, 0); mu = m is p = q = m. "
        "Dopri5 for MATLAB's ode45, with its default tolerances. The slides give no "
        "parameters.",
        "Gradients at atol = rtol / 1000, against Diffrax's Dopri8 at 1e-11, "
        "differentiated forwards.",
    )
    figures = {"p = 0.15, q = 1, rtol 1e-3": partial(_draw, trips)}
    return Report((back, table), claims, figures, notes)


def _draw(trips: Result, axes: Axes) -> None:
    for name, style in (("there", "-"), ("back", "--")):
        path = np.asarray(trips[name])
        axes.plot(path[:, 0], path[:, 1], style, label=name)
    axes.set(xlabel="y1", ylabel="y2")
    axes.legend()


EXPERIMENT = Experiment(
    name="van_der_pol",
    title="The van der Pol equation: reverse time and gradients",
    source="ACA, the reverse-time trajectories",
    tasks=_tasks,
    report=_report,
)
