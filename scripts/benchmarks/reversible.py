"""Reversible solvers: time and memory of a gradient against the number of steps.

The steps are constant and `max_steps` is their number, as in the published runs
(McCallum, Foster, arXiv:2410.11648): Diffrax's default is then 44 checkpoints for 1000
steps. Every method is compared with Diffrax's default adjoint on the coupled scheme
in the same run, those marked "plain" as well: they solve with the base solver alone,
which is what whoever need not have a reversible solver would do. Those marked "EES25"
and "EES27" solve with these; the error of their gradients is that against ACA.
The coupled scheme is `Reversible(..., resync_every=None)`, which stores no state, as
published; those marked "resyncs" are `Reversible(...)` with its defaults.

All in float64, as the published runs: in float32 it is rounding on the way back, and
not the method, that a comparison of gradients would see.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import diffrax
import numpy as np

import nodegrad

from .measure import (
    Clock,
    compile_in_turns,
    compile_program,
    EvaluationCounter,
    Program,
    relative_error,
    time_in_turns,
)
from .problems import Problem, white_dwarf, white_dwarf_network
from .report import Budget, Column, fixed, Report, scientific, significant
from .solves import ACA, DIFFRAX, gradient_function, Method, value_function


DTYPE = "float64"

REVERSIBLE = Method(
    "ReversibleAdjoint", nodegrad.odesolve, lambda _: nodegrad.ReversibleAdjoint()
)
REVERSIBLE_IN_DIFFRAX = Method(
    "ReversibleAdjoint in diffeqsolve",
    diffrax.diffeqsolve,
    lambda _: nodegrad.ReversibleAdjoint(),
)
_PLAIN = "plain: "
PLAIN_DIFFRAX = replace(DIFFRAX, name=_PLAIN + DIFFRAX.name)
PLAIN_ACA = replace(ACA, name=_PLAIN + ACA.name)
# Solvers other than the coupled one, by the first words of the names of methods.
_SOLVERS: dict[str, Callable[[diffrax.AbstractSolver], diffrax.AbstractSolver]] = {
    _PLAIN: lambda base: base,
    "resyncs: ": nodegrad.Reversible,
    "EES25: ": lambda _: nodegrad.EES25(),
    "EES27: ": lambda _: nodegrad.EES27(),
}
RESYNCS = replace(REVERSIBLE, name="resyncs: " + REVERSIBLE.name)
_EES = tuple(
    replace(method, name=name + method.name)
    for name in ("EES25: ", "EES27: ")
    for method in (ACA, REVERSIBLE)
)


def few(checkpoints: int) -> Method:
    """Diffrax with that many checkpoints: with two, time grows as the steps squared."""
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints)
    name = f"Diffrax, {checkpoints} checkpoints"
    return Method(name, diffrax.diffeqsolve, lambda _: adjoint, expendable=True)


def mapped(method: Method) -> Method:
    """`jax.vmap` over the batch, instead of a batch inside the state."""
    return replace(method, name=f"vmap of {method.name}", lanes="vmap")


BATCHED = replace(REVERSIBLE, name="ReversibleAdjoint, batched=True", lanes="batched")
_OURS = (REVERSIBLE, REVERSIBLE_IN_DIFFRAX)
_MAIN = (DIFFRAX, *_OURS, ACA, PLAIN_ACA, PLAIN_DIFFRAX)
# Of the time of a gradient in 1000 steps: relative to what, limit and aim. The aims
# against few and many checkpoints are what was published.
_BUDGETS = (
    (DIFFRAX.name, 0.80, 0.60),
    (few(2).name, 1 / 50, 1 / 148),
    (few(44).name, 1.0, 1 / 2.6),
)
_LANES = (mapped(DIFFRAX), mapped(REVERSIBLE), BATCHED)


@dataclass(frozen=True)
class Case:
    """A problem, and the methods to differentiate it by.

    - `base`: the solver; unless a method is "plain", it is coupled.
    - `steps`: the numbers of steps to take it in.
    - `limited`: whether the budgets for time hold.
    - `counted`: the methods whose evaluations to count, in the least number of steps.
    """

    problem: Problem
    base: diffrax.AbstractSolver
    steps: Sequence[int]
    methods: Sequence[Method]
    limited: bool = False
    counted: Sequence[Method] = ()

    @property
    def title(self) -> str:
        """What is solved, and how."""
        return f"{self.problem.name}, {type(self.base).__name__}"

    def problem_for(self, method: Method, steps: int) -> Problem:
        """The problem with the solver of `method`."""
        solver = nodegrad.Reversible(self.base, resync_every=None)
        for words, make in _SOLVERS.items():
            if method.name.startswith(words):
                solver = make(self.base)
        return replace(self.problem, solver=solver, max_steps=steps)


@dataclass(frozen=True)
class Settings:
    """What holds for all cases.

    `row_seconds` is for how long, about, one row of a table may be timed. What takes
    more than ten times that is called once; an expendable method that takes more than
    `max_seconds`, not at all.
    """

    clock: Clock
    report: Report
    row_seconds: float
    max_seconds: float


@dataclass
class Row:
    """One method in one number of steps. What is unknown is `None`."""

    section: int
    method: str
    seconds: float
    temp_bytes: int
    build_seconds: float
    error: float | None = None
    forward_evaluations: float | None = None
    backward_evaluations: float | None = None

    def record(self, peer: "Row") -> dict[str, Any]:
        """The row with its ratios to `peer`."""
        return {
            **asdict(self),
            "time_ratio": self.seconds / peer.seconds,
            "memory_ratio": self.temp_bytes / max(peer.temp_bytes, 1),
        }


@dataclass
class Expected:
    """How long a call takes, going by fewer steps."""

    seconds: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __call__(self, method: Method, steps: int) -> float:
        """In seconds; zero where nothing is known."""
        before, seconds = self.seconds.get(method.name, (steps, 0.0))
        return seconds * (steps / before) ** (2 if method.expendable else 1)


_COLUMNS = (
    Column("method", "method"),
    Column("section", "steps"),
    Column("seconds", "time (ms)", significant(3, 1e3)),
    Column("time_ratio", "ratio", fixed(3)),
    Column("temp_bytes", "temp (kB)", significant(3, 1e-3)),
    Column("memory_ratio", "ratio", fixed(2)),
    Column("build_seconds", "build (s)", fixed(2)),
    Column("forward_evaluations", "fwd evals / step", fixed(2)),
    Column("backward_evaluations", "bwd evals / step", fixed(2)),
    Column("error", "gradient error", scientific),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument(
        "--max-steps",
        type=int,
        default=10_000,
        help="leave out what takes more steps than this (default: 10000)",
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures everything."""
    settings = Settings(
        clock=clock,
        report=report,
        row_seconds=0.1 if arguments.quick else 0.5,
        max_seconds=3.0 if arguments.quick else 20.0,
    )
    report.note(
        "Gradients of the final state with respect to y0 and args, constant steps, AOT "
        f'compiled. Ratios are to "{DIFFRAX.name}" on the coupled scheme. Gradient '
        "errors are relative to Diffrax's default on the same scheme. Evaluations are "
        "of the vector field; a pullback is not one."
    )
    for case in _quick_cases() if arguments.quick else _full_cases():
        steps = [n for n in case.steps if n <= arguments.max_steps]
        if steps:
            measure_case(settings, replace(case, steps=steps))


def _quick_cases() -> Iterator[Case]:
    network, midpoint = white_dwarf_network(1), diffrax.Midpoint()
    methods = (*_MAIN[:-1], few(2), RESYNCS, *_EES)
    counted = DIFFRAX, REVERSIBLE, _EES[1], _EES[3]
    yield Case(network, midpoint, [100, 1000], methods, counted=counted)
    methods = DIFFRAX, REVERSIBLE, PLAIN_ACA
    yield Case(white_dwarf_network(1000), midpoint, [100], methods)
    methods = (DIFFRAX, *_OURS, few(2), few(44))
    yield Case(network, diffrax.Bosh3(), [1000], methods, limited=True)


def _full_cases() -> Iterator[Case]:
    midpoint, bosh3 = diffrax.Midpoint(), diffrax.Bosh3()
    one, some, many = map(white_dwarf_network, (1, 32, 1000))
    two, few_methods = few(2), tuple(map(few, (2, 4, 8, 16, 32, 44)))
    methods = (*_MAIN, *few_methods)
    yield Case(one, midpoint, [100, 1000, 10_000], methods, counted=methods)
    for problem in (some, many):
        others = *_LANES, RESYNCS, *_EES
        yield Case(problem, midpoint, [100, 1000], (*methods, *others))
    methods = (*_MAIN, two, few(44), RESYNCS)
    yield Case(one, bosh3, [100, 1000], methods, True, counted=methods)
    # Two checkpoints and a thousand samples would take minutes.
    for problem in (white_dwarf(), some, many):
        kept = tuple(m for m in methods if m is not two or problem is not many)
        yield Case(problem, bosh3, [1000], kept, limited=True)
    yield Case(white_dwarf(), midpoint, [100, 1000], methods)


def measure_case(settings: Settings, case: Case) -> None:
    """Prints the table of one problem, and enters its budgets."""
    expected, sections = Expected(), []
    for steps in case.steps:
        methods = _affordable(settings, case, steps, expected)
        rows = _measure_section(settings, case, methods, steps)
        if not sections:
            _count_evaluations(settings, case, rows)
        expected.seconds.update({row.method: (steps, row.seconds) for row in rows})
        sections.append(rows)
    records = [row.record(rows[0]) for rows in sections for row in rows]
    settings.report.table(case.title, _COLUMNS, records)
    for rows in sections:
        _enter_budgets(settings.report, case, rows)
    if len(sections) > 1:
        _enter_growth(settings.report, case, sections)


def _affordable(settings: Settings, case: Case, steps: int, expected: Expected):
    """The methods that there is time for, going by the section before."""
    methods = []
    for method in case.methods:
        seconds = expected(method, steps)
        if not method.expendable or seconds <= settings.max_seconds:
            methods.append(method)
            continue
        where = f"{case.title}, {steps} steps"
        text = f"{where}: {method.name} left out, at about {seconds:.0f} s a gradient."
        settings.report.note(text)
    return methods


def _arguments(case: Case, steps: int) -> tuple[Any, Any]:
    problem = case.problem
    span = np.float64(problem.t1), np.float64(problem.t1 / steps)
    return (problem.y0, problem.args), span


def _measure_section(
    settings: Settings, case: Case, methods: Sequence[Method], steps: int
) -> list[Row]:
    """All methods in one number of steps."""
    args = _arguments(case, steps)
    makers = {
        m.name: partial(gradient_function, case.problem_for(m, steps), m, "constant")
        for m in methods
    }
    programs = compile_in_turns(settings.clock, makers, args, 1)
    runs = {name: partial(program.run, *args) for name, program in programs.items()}
    seconds = time_in_turns(
        settings.clock,
        runs,
        seconds=settings.row_seconds * len(runs),
        once_above=10 * settings.row_seconds,
    )
    gradients = {name: run()[1] for name, run in runs.items()}
    return [
        _row(steps, name, seconds[name], program, gradients)
        for name, program in programs.items()
    ]


def _row(
    steps: int, name: str, seconds: float, program: Program, gradients: dict[str, Any]
) -> Row:
    row = Row(steps, name, seconds, program.temp_bytes, program.build_seconds)
    peer = PLAIN_DIFFRAX.name if name.startswith(_PLAIN) else DIFFRAX.name
    if name.startswith("EES"):
        peer = name.split()[0] + " " + ACA.name
    # With resyncs the solution is another one.
    if name.startswith("resyncs"):
        return row
    if peer in gradients and name != peer:
        row.error = relative_error(gradients[name], gradients[peer])
    return row


def _count_evaluations(settings: Settings, case: Case, rows: list[Row]) -> None:
    """Fills in how often the vector field is evaluated."""
    steps = rows[0].section
    args, by_name = _arguments(case, steps), {row.method: row for row in rows}
    for method in case.counted:
        counter = EvaluationCounter()
        described = case.problem_for(method, steps), method, "constant", counter
        forward, both = (
            compile_program(settings.clock, make(*described), *args)
            for make in (value_function, gradient_function)
        )
        forwards = counter.count(partial(forward.run, *args))
        all_of_them = counter.count(partial(both.run, *args))
        row = by_name[method.name]
        row.forward_evaluations = forwards / steps
        row.backward_evaluations = (all_of_them - forwards) / steps


def _enter_budgets(report: Report, case: Case, rows: list[Row]) -> None:
    """Of time, against Diffrax and against the base solver with ACA."""
    seconds, steps = {row.method: row.seconds for row in rows}, rows[0].section
    where = f"{case.title}, {steps} steps"

    def enter(method: str, peer: str, limit=None, aim=None) -> None:
        if peer in seconds:
            ratio = seconds[method] / seconds[peer]
            budget = Budget(f"time of {method}", where, peer, ratio, limit, aim)
            report.budgets.append(budget)

    if case.limited and steps == 1000:
        for peer, limit, aim in _BUDGETS:
            for method in _OURS:
                enter(method.name, peer, limit, aim)
    else:
        enter(REVERSIBLE.name, DIFFRAX.name)
    enter(REVERSIBLE.name, PLAIN_ACA.name)


def _enter_growth(report: Report, case: Case, sections: list[list[Row]]) -> None:
    """Of memory, from the least to the greatest number of steps."""
    first, last = sections[0], sections[-1]
    least = {row.method: row.temp_bytes for row in first}
    for row in last:
        if row.method not in (DIFFRAX.name, *(method.name for method in _OURS)):
            continue
        limit, aim = (None, None) if row.method == DIFFRAX.name else (1.05, 1.0)
        where = f"{case.title}, {row.section} steps"
        ratio = row.temp_bytes / least[row.method]
        what, peer = f"memory of {row.method}", f"itself, {first[0].section} steps"
        report.budgets.append(Budget(what, where, peer, ratio, limit, aim))
