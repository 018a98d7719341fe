"""The order of convergence of a coupled method, against that of its base method.

The problem is y' = y / 2 with y(0) = 1, until time 5. The published script takes five
step sizes from 1 to 1/32. Here they are the six powers of two in that range. A slope is
fitted to the last four, because the first two are too long for the low orders.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

import nodegrad

from .experiment import Claim, Experiment, Report, Result, Setting, Table


T1 = 5.0
SIZES = tuple(2.0**-k for k in range(6))
FITTED = 4
COUPLINGS = 0.99, 0.999
#: Bosh3 without its last stage, which only the error estimate uses, is the method of
#: order three that the paper calls Ralston3.
SOLVERS: dict[str, tuple[Any, int]] = {
    "Euler": (diffrax.Euler(), 1),
    "Midpoint": (diffrax.Midpoint(), 2),
    "Ralston3": (diffrax.Bosh3(), 3),
    "RK4": (nodegrad.RK4(), 4),
}
TOLERANCE = 0.15


def growth(t: Any, y: Any, args: Any) -> Any:
    """The vector field."""
    del t, args
    return 0.5 * y


def errors(solver: diffrax.AbstractSolver) -> list[float]:
    """The errors at the end time, one for each step size."""

    @jax.jit
    def error(size: Any) -> Any:
        sol: Any = nodegrad.odesolve(growth, solver, 0.0, T1, size, jnp.array(1.0))
        return jnp.abs(sol.ys[0] - jnp.exp(0.5 * T1))

    return [float(error(size)) for size in SIZES]


def slope(values: Sequence[float]) -> float:
    """The exponent of the power law through the last `FITTED` errors."""
    logs = np.log(SIZES[-FITTED:]), np.log(values[-FITTED:])
    return float(np.polyfit(*logs, 1)[0])


def measure(name: str, couplings: Sequence[float]) -> Result:
    """Errors of a base method, and of its coupling for each coupling parameter."""
    solver, _ = SOLVERS[name]
    couple = partial(nodegrad.Reversible, solver)
    coupled = [errors(couple(coupling_parameter=c)) for c in couplings]
    return {"base": errors(solver), "coupled": coupled}


def tasks(setting: Setting) -> dict[str, Any]:
    """One for each base method."""
    if setting.size == "smoke":
        return {"Midpoint": partial(measure, "Midpoint", COUPLINGS[-1:])}
    return {name: partial(measure, name, COUPLINGS) for name in SOLVERS}


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """The slopes, and whether they are those of the orders."""
    couplings = COUPLINGS[-1:] if setting.size == "smoke" else COUPLINGS
    rows, shortfalls = [], {}
    for name, result in results.items():
        order, curves = SOLVERS[name][1], [result["base"], *result["coupled"]]
        slopes = [slope(values) for values in curves]
        last = [f"{values[-1]:.1e}" for values in curves]
        rows.append([name, order, *(f"{s:.2f}" for s in slopes), *last])
        shortfalls[name] = max(order - s for s in slopes[1:])
    which = ["base", *(f"λ = {c}" for c in couplings)]
    columns = [
        "base method",
        "published order",
        *(f"slope, {w}" for w in which),
        *(f"error at h = 1/32, {w}" for w in which),
    ]
    worst = max(shortfalls, key=lambda name: shortfalls[name])
    holds = shortfalls[worst] < TOLERANCE
    claim = Claim(
        f"a coupled method has the order of its base method ({', '.join(results)})",
        "slopes 1, 2, 3 and 4",
        f"no slope is more than {max(shortfalls[worst], 0):.2f} below the order",
        holds,
        "" if holds else f"the slope of {worst} is more than {TOLERANCE} below",
    )
    notes = (
        "Slopes are fitted to the four shortest step sizes, 1/4 to 1/32.",
        "Slopes of Euler and Ralston3 exceed their order: for odd orders the error of "
        "the coupled method changes its sign at some step size, and is small near it. "
        "The nearer λ is to 1, the shorter are these steps. Over shorter ones still, "
        "the slope is the order.",
        "The paper draws this figure and prints the orders, but no slopes and no λ.",
    )
    table = Table("Slope of the error against the step size", columns, rows)
    figure = {"coupled with λ = 0.999, base dashed": partial(draw, results)}
    return Report((table,), (claim,), figure, notes)


def draw(results: Mapping[str, Result], axes: Axes) -> None:
    """Error against step size."""
    for index, (name, curves) in enumerate(results.items()):
        color = f"C{index}"
        axes.loglog(SIZES, curves["base"], "--", color=color)
        axes.loglog(SIZES, curves["coupled"][-1], "o-", color=color, label=name)
    axes.set(xlabel="step size", ylabel="error at the end time")
    axes.legend()


EXPERIMENT = Experiment(
    name="orders",
    title="Order of convergence of the coupled methods",
    source="McCallum and Foster (2024), figure of convergence",
    tasks=tasks,
    report=report,
)
