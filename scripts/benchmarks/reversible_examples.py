"""The explicit ones of the ten examples, trained by solvers that store no states.

The solver of each is replaced: by `Reversible` of it, and by EES25. The error estimate
of EES25 is that of Euler's method, and its order is two, so it solves all examples in
constant steps: 100, or 1000 where the inverse of a longer step is not accurate enough,
as `ReversibleAdjoint` finds out (the stochastic one in steps half as long as its own).
"plain" solves with the solver of the example and Diffrax's default adjoint. Every
method trains for some iterations from the same start. The loss at the end and the
iteration in which a solve failed, if any did, are in the table.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import diffrax
import jax
import optax

import nodegrad

from .comparison import MEASURED, measured
from .examples import compile_and_time, EXAMPLES
from .measure import Clock, Program
from .report import Budget, Column, Report, significant
from .solves import DIFFRAX, Method


DTYPE = "float64"
#: Implicit solvers have no reversible form.
NAMES = tuple(
    name for name in EXAMPLES if name not in ("nonlinear heat equation", "Robertson")
)
_COLUMNS = (
    Column("section", "example"),
    *MEASURED[:-1],
    Column("loss", "loss", significant(4)),
    Column("final_loss", "training loss", significant(4)),
    Column("failed", "failed in iteration", str),
)
_MEMORY = 1.0


def _with_solver(
    make: Callable[[diffrax.AbstractSolver], diffrax.AbstractSolver],
) -> Callable[..., diffrax.Solution]:
    """`diffrax.diffeqsolve` with another solver."""

    def solve(terms: Any, solver: Any, *args: Any, **kwargs: Any) -> diffrax.Solution:
        return diffrax.diffeqsolve(terms, make(solver), *args, **kwargs)

    return solve


def _method(name: str, make: Callable[[Any], diffrax.AbstractSolver]) -> Method:
    return Method(name, _with_solver(make), lambda _: nodegrad.ReversibleAdjoint())


def _ees(steps: int) -> Method:
    def solve(
        terms: Any, solver: Any, t0: Any, t1: Any, dt0: Any, *args: Any, **kwargs: Any
    ) -> diffrax.Solution:
        del solver
        kwargs.pop("stepsize_controller", None)
        # A step half as long along noise, whose increments are larger.
        is_noisy = isinstance(terms, diffrax.MultiTerm)
        dt0 = dt0 / 2 if is_noisy else (t1 - t0) / steps
        solver = nodegrad.EES25(resync_every=10)
        return diffrax.diffeqsolve(terms, solver, t0, t1, dt0, *args, **kwargs)

    return Method("EES25", solve, lambda _: nodegrad.ReversibleAdjoint())


PLAIN = replace(DIFFRAX, name="plain: Diffrax default")
# Rates of 20 at the start of the filter, and a control with kinks.
_MANY_STEPS = "neural CDE", "Kalman filter"
# The rate of Adam. With 1e-2 the Kalman filter becomes stiff, and the solve of every
# method fails after 53 to 57 iterations.
_RATES = {"Kalman filter": 1e-3}


def _methods(name: str) -> tuple[Method, ...]:
    """What an example is solved with."""
    reversible = _method("Reversible", nodegrad.Reversible)
    return PLAIN, reversible, _ees(1000 if name in _MANY_STEPS else 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a choice of examples."""
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, help="leave out all but these"
    )
    parser.add_argument(
        "--iterations", type=int, default=200, help="of training (default: 200)"
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures every example, prints one table, and enters the budgets."""
    seconds = 0.1 if arguments.quick else 3.0
    iterations = min(arguments.iterations, 20 if arguments.quick else math.inf)
    report.note(
        f"value_and_grad of the loss, AOT compiled; {iterations} iterations of "
        f"Adam at 1e-2 (Kalman filter: 1e-3). Ratios are to {PLAIN.name}."
    )
    records: list[dict[str, Any]] = []
    for name in arguments.only or NAMES:
        found = _measure(clock, name, _methods(name), seconds, int(iterations))
        records.extend(found)
        for record in found[1:]:
            what = f"memory of {record['method']}"
            ratio = record["memory_ratio"]
            report.budgets.append(Budget(what, name, PLAIN.name, ratio, _MEMORY))
    report.table("explicit examples, without stored states", _COLUMNS, records)
    methods = _methods(NAMES[0])
    for index, method in enumerate(methods[1:], start=1):
        rows = records[index :: len(methods)]
        failures = sum(row["failed"] is not None for row in rows)
        case = f"{len(rows)} examples"
        time = statistics.median(row["time_ratio"] for row in rows)
        report.budgets += [
            Budget(f"failed with {method.name}", case, "none", failures, 0),
            Budget(f"median time of {method.name}", case, PLAIN.name, time, None),
        ]


def _measure(
    clock: Clock, name: str, methods: Sequence[Method], seconds: float, iterations: int
) -> list[dict[str, Any]]:
    """Compiles, times and trains. Returns a record for each method."""
    args, programs, times = compile_and_time(clock, name, methods, seconds, 1)
    trained = {
        method: _train(name, method, program, *args, iterations)
        for method, program in programs.items()
    }
    return [
        {"section": name, **record, **trained[record["method"]]}
        for record in measured(programs, times, {})
    ]


def _train(
    name: str, method: str, program: Program, params: Any, data: Any, iterations: int
) -> dict[str, float | int | None]:
    """The losses before and after training, and where a solve failed."""
    optimiser = optax.adam(_RATES.get(name, 1e-2))
    state = optimiser.init(params)

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state

    losses: list[float] = []
    for iteration in range(iterations):
        try:
            loss, gradient = program.run(params, data)
            losses.append(float(loss))
        except Exception as error:
            lines = str(error).splitlines()
            message = next((x for x in lines if "Error: " in x), lines[0])
            print(f"{name}, {method}, iteration {iteration}: {message[:200]}")
            last = losses[-1] if losses else math.nan
            first = losses[0] if losses else math.nan
            return {"loss": first, "final_loss": last, "failed": iteration}
        params, state = update(params, state, gradient)
    return {"loss": losses[0], "final_loss": losses[-1], "failed": None}
