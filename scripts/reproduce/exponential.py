"""The gradient of `z' = k z` by three methods, against the end time."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from .experiment import Claim, Experiment, Report, Result, Setting, Table
from .methods import gradients, METHODS


RTOLS = (1e-3, 1e-5)


def _measure(method: str, k: float, end_times: list[float]) -> Result:
    """Relative errors of the state and of both derivatives, by tolerance."""

    def field(t: Any, z: Any, k: Any) -> Any:
        del t
        return k * z

    @jax.jit
    def at(t1: Any, rtol: Any) -> Any:
        loss = lambda z: z[0] ** 2
        start = jnp.ones(1), jnp.asarray(k)
        value, (dz0, dk) = gradients(
            field, method, loss, t1, *start, tol=(rtol, rtol / 10)
        )
        exact = jnp.exp(2 * k * t1)
        return (
            jnp.abs(jnp.sqrt(value / exact) - 1),
            jnp.abs(dz0[0] / (2 * exact) - 1),
            jnp.abs(dk / (2 * t1 * exact) - 1),
        )

    found = {}
    for rtol in RTOLS:
        rows = [at(jnp.asarray(t1), jnp.asarray(rtol)) for t1 in end_times]
        found[str(rtol)] = np.asarray(rows).T.tolist()
    return {"end_times": end_times, "errors": found}


def _tasks(setting: Setting) -> dict[str, Any]:
    times = setting.pick(2, 20, 40)
    end_times = np.linspace(10 / times, 10, times).tolist()
    return {
        f"{method}-{sign}": partial(_measure, method, k, end_times)
        for sign, k in (("growth", 1.0), ("decay", -1.0))
        for method in METHODS
    }


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    del setting
    rows = []
    for sign, k in (("growth", 1), ("decay", -1)):
        for rtol in RTOLS:
            for method in METHODS:
                state, dz0, dk = results[f"{method}-{sign}"]["errors"][str(rtol)]
                rows.append([k, rtol, method, state[-1], dz0[-1], dk[-1]])
    last = lambda method: results[f"{method}-decay"]["errors"]["0.001"][1][-1]
    ratio = last("adjoint") / last("ACA")
    growing = lambda method: results[f"{method}-growth"]["errors"]["0.001"][1][-1]
    ratio_of_growth = growing("adjoint") / growing("ACA")
    claims = (
        Claim(
            "k = -1, T = 10, rtol 1e-3: the adjoint method's error of dL/dz0 exceeds "
            "ACA's by 1000",
            "a figure: the error explodes",
            f"{last('adjoint'):.2g} against {last('ACA'):.2g}: {ratio:.2g} times",
            ratio >= 1e3,
        ),
        Claim(
            "k = 1, T = 10, rtol 1e-3: the adjoint method's error exceeds ACA's",
            "a figure: larger",
            f"{growing('adjoint'):.2g} against {growing('ACA'):.2g}: "
            f"{ratio_of_growth:.2g} times",
            ratio_of_growth > 1,
            "backwards the solution decays, and so do the errors of the state; ACA's "
            "is the exact gradient of the computed solution, whose own error doubles",
        ),
    )
    columns = "k", "rtol", "method", "error of z(T)", "error of dL/dz0", "of dL/dk"
    table = Table("Relative errors at T = 10", columns, rows)
    figures = {
        f"k = {k}, rtol 1e-3": partial(_draw, results, sign)
        for sign, k in (("growth", 1), ("decay", -1))
    }
    notes = (
        "L = z(T)^2, z(0) = 1, Dopri5, atol = rtol / 10. The slides give neither k, "
        "nor T, nor the tolerance.",
        "ACA: `ACAAdjoint`. Adjoint: Diffrax's `BacksolveAdjoint`. Naive: a loop of "
        "our own whose search for step sizes is differentiated as well.",
    )
    return Report((table,), claims, figures, notes)


def _draw(results: Mapping[str, Result], sign: str, axes: Axes) -> None:
    for method, style in zip(METHODS, ("o-", "x--", "s-"), strict=True):
        result = results[f"{method}-{sign}"]
        error = result["errors"]["0.001"][1]
        axes.semilogy(result["end_times"], error, style, label=method, markersize=4)
    axes.set(xlabel="T", ylabel="relative error of dL/dz0")
    axes.legend()


EXPERIMENT = Experiment(
    name="exponential",
    title="The gradient of z' = kz against the end time",
    source="ACA, the toy example",
    tasks=_tasks,
    report=_report,
)
