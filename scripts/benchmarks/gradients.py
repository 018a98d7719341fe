"""First-order gradients through a solve: time, compile time, memory, accuracy.

Every method solves the same problem with the same solver and controller, and is
compared with Diffrax's default adjoint in the same run. The floor is a `lax.scan` over
the accepted grid, see `solves.frozen_grid_gradient`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from .measure import (
    Clock,
    compile_in_turns,
    compile_program,
    EvaluationCounter,
    Program,
    relative_error,
    time_in_turns,
)
from .problems import decay, lotka_volterra, perceptron, Problem, uneven_lanes
from .report import Budget, Column, fixed, Report, scientific, significant
from .solves import (
    ACA,
    ACA_IN_DIFFRAX,
    accepted_times,
    BATCHED_ACA,
    DIFFRAX,
    exact_gradient,
    frozen_grid_gradient,
    frozen_grid_reference,
    gradient_function,
    Method,
    METHODS,
    value_function,
    VMAP_ACA,
    VMAP_ACA_IN_DIFFRAX,
    VMAP_DIFFRAX,
)


DTYPE = "float32"
FLOOR = "floor: scan, frozen grid"
_MAIN = (DIFFRAX, ACA, ACA_IN_DIFFRAX)


@dataclass(frozen=True)
class Case:
    """A problem, and how thoroughly to look at it.

    - `steps`: the numbers of steps to take it in.
    - `limit`, `aim`: of the time of ACA over that of Diffrax's default, if there is a
      budget.
    - `compile_repeats`: with more than one, compile times are compared with their
      budgets.
    - `counted`: the methods whose evaluations to count; with any, the gradients are
      compared with the exact one too.
    """

    problem: Problem
    steps: Sequence[int]
    methods: Sequence[Method] = METHODS
    limit: float | None = None
    aim: float | None = None
    compile_repeats: int = 1
    counted: Sequence[Method] = ()


@dataclass(frozen=True)
class Settings:
    """What holds for all cases.

    `row_seconds` is for how long, about, one row of a table may be timed. From
    `max_row_seconds` on, expendable methods are left out; from five times that on, all.
    """

    clock: Clock
    report: Report
    controller: str
    row_seconds: float
    max_row_seconds: float


@dataclass
class Row:
    """One method on one problem in one number of steps. What is unknown is `None`."""

    section: Any
    method: str
    steps: Any
    rejected: Any
    seconds: float
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    temp_bytes: int
    forward_evaluations: int | None = None
    backward_evaluations: int | None = None
    grid_error: float | None = None
    exact_error: float | None = None

    @property
    def build_seconds(self) -> float:
        """From the Python function to the executable."""
        return self.trace_seconds + self.lower_seconds + self.compile_seconds

    def record(self, peer: "Row") -> dict[str, Any]:
        """The row with its ratios to `peer`."""
        return {
            **asdict(self),
            "time_ratio": self.seconds / peer.seconds,
            "build_ratio": self.build_seconds / peer.build_seconds,
            "memory_ratio": self.temp_bytes / max(peer.temp_bytes, 1),
        }


_COLUMNS = (
    Column("method", "method"),
    Column("steps", "steps"),
    Column("rejected", "rej."),
    Column("seconds", "time (ms)", significant(3, 1e3)),
    Column("time_ratio", "ratio", fixed(2)),
    Column("trace_seconds", "trace (s)", fixed(2)),
    Column("lower_seconds", "lower", fixed(2)),
    Column("compile_seconds", "compile", fixed(2)),
    Column("build_ratio", "ratio", fixed(2)),
    Column("temp_bytes", "temp (kB)", significant(3, 1e-3)),
    Column("memory_ratio", "ratio", fixed(2)),
    Column("forward_evaluations", "fwd evals"),
    Column("backward_evaluations", "bwd evals"),
    Column("grid_error", "err. grid", scientific),
    Column("exact_error", "err. exact", scientific),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument(
        "--controller",
        choices=("adaptive", "constant"),
        default="adaptive",
        help="the step size controller: PIDController with a greatest step size that "
        "pins the number of steps, or ConstantStepSize",
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures everything."""
    settings = Settings(
        clock=clock,
        report=report,
        controller=arguments.controller,
        row_seconds=0.25 if arguments.quick else 2.5,
        max_row_seconds=12.0,
    )
    report.note(
        f"Gradients with respect to y0 and args, Tsit5, {settings.controller} steps, "
        "AOT compiled. Ratios are to Diffrax's default adjoint. Errors are relative: "
        "to the same accepted grid, and to the exact gradient (tolerance 1e-11), both "
        "in float64."
    )
    _warm_up(settings)
    for case in _quick_cases() if arguments.quick else _full_cases():
        measure_case(settings, case)
    measure_lanes(settings)
    for max_steps in (4096, 65536) if arguments.quick else (1024, 4096, 65536):
        measure_memory(settings, max_steps)


def _quick_cases() -> list[Case]:
    small, medium = perceptron(4, 64, 128), perceptron(64, 256, 128)
    mechanistic = [method for method in METHODS if not method.expendable]
    return [
        Case(lotka_volterra(), [100], mechanistic, 0.75, 0.40, counted=mechanistic),
        Case(small, [10, 100], _MAIN, 0.80, 0.50, compile_repeats=2),
        Case(medium, [10], _MAIN, 0.85, 0.60),
    ]


def _full_cases() -> list[Case]:
    steps = [10, 100, 1000]
    cases = [
        Case(lotka_volterra(), steps, METHODS, 0.75, 0.40, 2, METHODS),
        Case(perceptron(4, 64, 128), steps, METHODS, 0.80, 0.50, 2, METHODS),
        Case(perceptron(64, 256, 128), steps, METHODS, 0.85, 0.60, 2, METHODS),
    ]
    others = [(4, 64, 1), (4, 64, 32), (4, 64, 256)]
    others += [(64, 256, 1), (64, 256, 32), (64, 256, 256)]
    return cases + [Case(perceptron(*sizes), steps) for sizes in others]


def _warm_up(settings: Settings) -> None:
    """Pays for what only the first solve of a process pays for."""
    problem = decay(1, 16)
    for method in _MAIN:
        value_and_grad = gradient_function(problem, method, "adaptive")
        args = (problem.y0, problem.args), _span(problem, 10)
        compile_program(settings.clock, value_and_grad, *args)


def _span(problem: Problem, steps: int) -> tuple[np.floating, np.floating]:
    return np.float32(problem.t1), np.float32(problem.t1 / steps)


# One problem, all methods.


def measure_case(settings: Settings, case: Case) -> None:
    """Prints the table of one problem, and enters its budgets."""
    problem, inputs = case.problem, (case.problem.y0, case.problem.args)
    programs = _compile_methods(settings, case)
    counters = _compile_counters(settings, case)
    exact = exact_gradient(problem) if case.counted else None
    times_of_steps = jax.jit(accepted_times(problem, settings.controller))
    sections: list[list[Row]] = []
    for steps in case.steps:
        methods = _affordable(settings, case, steps, sections)
        if not methods:
            break
        span = _span(problem, steps)
        times = np.asarray(times_of_steps(inputs, span))
        times = times[np.isfinite(times)]
        kept = {method.name: programs[method.name] for method in methods}
        rows = _measure_section(settings, problem, kept, span, times, exact)
        for row in rows:
            if row.method in counters:
                row.forward_evaluations, row.backward_evaluations = counters[
                    row.method
                ](inputs, span)
        sections.append(rows)
        _enter_time_budgets(settings.report, case, steps, rows)
    records = [row.record(rows[0]) for rows in sections for row in rows]
    settings.report.table(problem.name, _COLUMNS, records)
    if case.compile_repeats > 1:
        _enter_compile_budgets(settings.report, problem.name, sections[0])


def _compile_methods(settings: Settings, case: Case) -> dict[str, Program]:
    problem, controller = case.problem, settings.controller
    makers = {
        method.name: partial(gradient_function, problem, method, controller)
        for method in case.methods
    }
    args = (problem.y0, problem.args), _span(problem, case.steps[0])
    return compile_in_turns(settings.clock, makers, args, case.compile_repeats)


def _affordable(settings, case, steps, sections) -> list[Method]:
    """The methods that there is time for, going by the section before."""
    if not sections:
        return list(case.methods)
    growth = steps / sections[-1][0].section
    expected = {row.method: row.seconds * growth for row in sections[-1]}
    where = f"{case.problem.name}, {steps} steps"
    if expected[DIFFRAX.name] * 3 > 5 * settings.max_row_seconds:
        settings.report.note(
            f"{where}: left out, at about {expected[DIFFRAX.name]:.0f} s a gradient."
        )
        return []
    measured = [method for method in case.methods if method.name in expected]
    slow = {
        method.name
        for method in measured
        if method.expendable and expected[method.name] * 3 > settings.max_row_seconds
    }
    if slow:
        settings.report.note(f"{where}: {', '.join(sorted(slow))} left out, too slow.")
    return [method for method in measured if method.name not in slow]


def _measure_section(settings, problem, programs, span, times, exact) -> list[Row]:
    """All methods, and the floor, in one number of steps."""
    inputs = problem.y0, problem.args
    times = times.astype(np.float32)
    floor = compile_program(
        settings.clock, frozen_grid_gradient(problem), inputs, times
    )
    runs = {name: partial(p.run, inputs, span) for name, p in programs.items()}
    runs[FLOOR] = partial(floor.run, inputs, times)
    seconds = time_in_turns(
        settings.clock, runs, seconds=settings.row_seconds * len(runs)
    )
    slow = seconds[FLOOR] > settings.max_row_seconds / 4
    on_grid = None if slow else frozen_grid_reference(problem, times)
    section = round(problem.t1 / float(span[1]))
    rows = []
    for name, program in {**programs, FLOOR: floor}.items():
        value, gradient = runs[name]()
        stats = (len(times) - 1, None) if name == FLOOR else map(int, value[1])
        row = _row(section, name, stats, seconds[name], program)
        if on_grid is not None:
            row.grid_error = relative_error(gradient, on_grid)
        if exact is not None:
            row.exact_error = relative_error(gradient, exact)
        rows.append(row)
    return rows


def _row(section, name: str, stats, seconds: float, program: Program) -> Row:
    steps, rejected = stats
    return Row(
        section,
        name,
        steps,
        rejected,
        seconds,
        program.trace_seconds,
        program.lower_seconds,
        program.compile_seconds,
        program.temp_bytes,
    )


def _compile_counters(settings: Settings, case: Case) -> dict[str, Callable[..., Any]]:
    """For each method a function that counts its evaluations, forwards and back."""

    def make(method: Method) -> Callable[..., tuple[int, int]]:
        counter = EvaluationCounter()
        described = case.problem, method, settings.controller, counter
        args = (case.problem.y0, case.problem.args), _span(case.problem, case.steps[0])
        forward = compile_program(settings.clock, value_function(*described), *args)
        both = compile_program(settings.clock, gradient_function(*described), *args)

        def count(*args: Any) -> tuple[int, int]:
            forwards = counter.count(partial(forward.run, *args))
            return forwards, counter.count(partial(both.run, *args)) - forwards

        return count

    return {method.name: make(method) for method in case.counted}


def _enter_time_budgets(
    report: Report, case: Case, steps: int, rows: list[Row]
) -> None:
    if case.limit is None:
        return
    seconds = {row.method: row.seconds for row in rows}
    where = f"{case.problem.name}, {steps} steps"
    for name in (ACA.name, ACA_IN_DIFFRAX.name):
        ratio = seconds[name] / seconds[DIFFRAX.name]
        enter = partial(Budget, f"time of {name}", where)
        report.budgets.append(enter(DIFFRAX.name, ratio, case.limit, case.aim))
        ratio = seconds[name] / seconds[FLOOR]
        report.budgets.append(enter("floor", ratio, 1.25, 1.0))


def _enter_compile_budgets(report: Report, where: str, rows: list[Row]) -> None:
    seconds = {row.method: row.build_seconds for row in rows}
    for name, limit in ((ACA.name, 0.55), (ACA_IN_DIFFRAX.name, 0.80)):
        ratio = seconds[name] / seconds[DIFFRAX.name]
        what = f"trace + lower + compile of {name}"
        report.budgets.append(Budget(what, where, DIFFRAX.name, ratio, limit, 0.40))


# Many solves at once.


def _measure_methods(
    settings: Settings, problem: Problem, methods: Sequence[Method], controller: str
) -> list[Row]:
    """Times `methods`, of which the first is the peer, and prints the table."""
    inputs, span = (problem.y0, problem.args), _span(problem, 50)
    makers = {
        m.name: partial(gradient_function, problem, m, controller) for m in methods
    }
    programs = compile_in_turns(settings.clock, makers, (inputs, span), 1)
    runs = {name: partial(p.run, inputs, span) for name, p in programs.items()}
    seconds = time_in_turns(
        settings.clock, runs, seconds=settings.row_seconds * len(runs)
    )
    exact = exact_gradient(problem)
    rows = []
    for name, program in programs.items():
        (_, stats), gradient = runs[name]()
        stats = (f"{x.min()}..{x.max()}" for x in map(np.asarray, stats))
        row = _row(None, name, stats, seconds[name], program)
        row.exact_error = relative_error(gradient, exact)
        rows.append(row)
    settings.report.table(problem.name, _COLUMNS, [row.record(rows[0]) for row in rows])
    return rows


def measure_lanes(settings: Settings) -> None:
    """Lanes with step sizes of their own."""
    problem = uneven_lanes(128)
    methods = (VMAP_DIFFRAX, VMAP_ACA, VMAP_ACA_IN_DIFFRAX, BATCHED_ACA)
    peer, *rows = _measure_methods(settings, problem, methods, "adaptive")
    for row in rows:
        ratio = row.seconds / peer.seconds
        what = f"time of {row.method}"
        budget = Budget(what, problem.name, peer.method, ratio, 0.33, 0.25)
        settings.report.budgets.append(budget)


# Memory against the bound on the number of steps.


def measure_memory(settings: Settings, max_steps: int) -> None:
    """Memory for a state of 1000 numbers; it is known without running anything."""
    problem = decay(1000, max_steps)
    args = (problem.y0, problem.args), _span(problem, 100)
    methods = DIFFRAX, ACA
    makers = {
        m.name: partial(gradient_function, problem, m, settings.controller)
        for m in methods
    }
    programs = compile_in_turns(settings.clock, makers, args, 1)
    temp_bytes = [programs[method.name].temp_bytes for method in methods]
    where = f"dim 1000, max_steps {max_steps}"
    records = [
        {
            "method": method.name,
            "temp_bytes": size,
            "memory_ratio": size / temp_bytes[0],
            "states": size / problem.y0.nbytes,
        }
        for method, size in zip(methods, temp_bytes, strict=True)
    ]
    columns = [c for c in _COLUMNS if c.key in records[0]]
    columns.append(Column("states", "in states", fixed(0)))
    settings.report.table(f"memory, {where}", columns, records)
    limit = 1.0 if max_steps in (4096, 65536) else None
    ratio = temp_bytes[1] / temp_bytes[0]
    budget = Budget("memory of ACA", where, DIFFRAX.name, ratio, limit)
    settings.report.budgets.append(budget)
