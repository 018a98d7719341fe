"""Batches and forward mode: gradients of vmapped solves, tangents of single ones.

Batches are compared with `jax.vmap` of Diffrax's default adjoint, tangents with the
solve itself.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .measure import Clock, compile_in_turns, Program, relative_error, time_in_turns
from .problems import loss, perceptron, Problem, uneven_lanes
from .report import Budget, Column, fixed, Report, scientific, significant
from .solves import (
    ACA,
    ACA_IN_DIFFRAX,
    BATCHED_ACA,
    gradient_function,
    Method,
    VMAP_ACA,
    VMAP_ACA_IN_DIFFRAX,
    VMAP_DIFFRAX,
)


DTYPE = "float64"
_METHODS = VMAP_DIFFRAX, VMAP_ACA, VMAP_ACA_IN_DIFFRAX, BATCHED_ACA
_COLUMNS = (
    Column("method", "method"),
    Column("seconds", "time (ms)", significant(3, 1e3)),
    Column("time_ratio", "ratio", fixed(2)),
    Column("build_seconds", "build (s)", fixed(2)),
    Column("build_ratio", "ratio", fixed(2)),
    Column("temp_bytes", "temp (kB)", significant(3, 1e-3)),
    Column("memory_ratio", "ratio", fixed(2)),
    Column("difference", "diff. to first", scientific),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but the shared options."""
    del parser


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures everything."""
    seconds = 1.0 if arguments.quick else 6.0
    report.note(
        "Tsit5, AOT compiled. A batch of gradients is value_and_grad of the mean over "
        "`jax.vmap` of a solve, with parameters shared by all samples of a model. "
        "Tangents are those with respect to y0, of a state of 8 numbers."
    )
    training = replace(
        perceptron(8, 128, 64), name="MLP 8-128-128-8, batch 64, 30 steps", max_steps=31
    )
    limits = {"time": 0.30, "memory": 0.12}
    seconds_of = _measure_batch(
        clock, report, training, 30, "constant", limits, seconds
    )
    ratio = seconds_of[BATCHED_ACA.name] / seconds_of[VMAP_ACA.name]
    difference = abs(np.log(ratio))
    what = f"time of {BATCHED_ACA.name}, off by"
    report.budgets.append(Budget(what, training.name, VMAP_ACA.name, difference, 0.05))
    lanes = uneven_lanes(128)
    _measure_batch(clock, report, lanes, 50, "adaptive", {"time": 0.33}, seconds)
    _measure_ensemble(clock, report, training, seconds)
    _measure_tangents(clock, report, training, seconds)


def _table(
    report: Report,
    name: str,
    programs: Mapping[str, Program],
    seconds: Mapping[str, float],
    results: Mapping[str, Any],
) -> None:
    """Prints one row for each program, with ratios to the first one."""
    first = next(iter(programs))
    peer = programs[first]
    records = [
        {
            "method": method,
            "seconds": seconds[method],
            "time_ratio": seconds[method] / seconds[first],
            "build_seconds": program.build_seconds,
            "build_ratio": program.build_seconds / peer.build_seconds,
            "temp_bytes": program.temp_bytes,
            "memory_ratio": program.temp_bytes / max(peer.temp_bytes, 1),
            "difference": relative_error(results[method], results[first])
            if method in results
            else None,
        }
        for method, program in programs.items()
    ]
    report.table(name, _COLUMNS, records)


def _measure_batch(
    clock: Clock,
    report: Report,
    problem: Problem,
    steps: int,
    controller: str,
    limits: Mapping[str, float],
    seconds: float,
) -> dict[str, float]:
    """Gradients of one model over many samples. Returns the time of each method."""
    makers = {
        m.name: partial(gradient_function, problem, m, controller) for m in _METHODS
    }
    inputs = problem.y0, problem.args
    span = np.float64(problem.t1), np.float64(problem.t1 / steps)
    return _measure_gradients(
        clock, report, problem.name, makers, (inputs, span), limits, seconds
    )


def _measure_ensemble(
    clock: Clock, report: Report, problem: Problem, seconds: float, models: int = 4
) -> None:
    """Gradients of several models over the same samples."""
    y0 = problem.y0[:32]
    scales = jnp.linspace(0.9, 1.1, models)
    args = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, problem.args))(scales)

    def gradients(method: Method) -> Callable[..., Any]:
        def value(args, span):
            field = lambda t, y, args: problem.vector_field(t, y, args)

            def of_model(args):
                sol = method(problem, field, y0, args, span, "constant")
                return loss(sol.ys)

            return jnp.mean(jax.vmap(of_model)(args)), None

        return jax.value_and_grad(value, has_aux=True)

    makers = {m.name: partial(gradients, m) for m in _METHODS[:3]}
    name = f"{models} models of that kind, 32 samples"
    span = np.float64(problem.t1), np.float64(problem.t1 / 30)
    limits = {"time": 0.30, "memory": 0.12}
    _measure_gradients(clock, report, name, makers, (args, span), limits, seconds)


def _measure_gradients(
    clock: Clock,
    report: Report,
    name: str,
    makers: Mapping[str, Callable[[], Callable[..., Any]]],
    args: tuple[Any, ...],
    limits: Mapping[str, float],
    seconds: float,
) -> dict[str, float]:
    """Compiles, times and compares; enters a budget for each of `limits`."""
    programs = compile_in_turns(clock, makers, args, 1)
    runs = {name: partial(program.run, *args) for name, program in programs.items()}
    times = time_in_turns(clock, runs, seconds=seconds * len(runs))
    results = {method: run()[1] for method, run in runs.items()}
    _table(report, name, programs, times, results)
    peer, *others = programs
    for method in others:
        ratios = {
            "time": times[method] / times[peer],
            "memory": programs[method].temp_bytes / programs[peer].temp_bytes,
        }
        for kind, limit in limits.items():
            budget = Budget(f"{kind} of {method}", name, peer, ratios[kind], limit)
            report.budgets.append(budget)
    return times


def _measure_tangents(
    clock: Clock, report: Report, problem: Problem, seconds: float
) -> None:
    """One tangent and eight, of one solve and of a batch of them."""
    span = np.float64(problem.t1), np.float64(problem.t1 / 30)
    field = lambda t, y, args: problem.vector_field(t, y, args)
    limits = {"jvp": 3.0, "jacfwd": 6.0}
    for method in ACA, ACA_IN_DIFFRAX, VMAP_ACA:
        batched = method is VMAP_ACA
        y0 = problem.y0 if batched else problem.y0[0]

        def solve(y0, args, method=method):
            return method(problem, field, y0, args, span, "constant").ys

        def jvp(y0, args, solve=solve):
            return jax.jvp(lambda y: solve(y, args), (y0,), (y0,))

        def jacfwd(y0, args, solve=solve):
            return jax.jacfwd(lambda y: solve(y, args))(y0)

        makers = {"solve": lambda solve=solve: solve, "jvp": lambda jvp=jvp: jvp}
        if not batched:
            makers["jacfwd"] = lambda jacfwd=jacfwd: jacfwd
        args = y0, problem.args
        programs = compile_in_turns(clock, makers, args, 1)
        runs = {name: partial(p.run, *args) for name, p in programs.items()}
        times = time_in_turns(clock, runs, seconds=seconds * len(runs))
        name = f"tangents of {method.name}"
        _table(report, name, programs, times, {})
        for kind in list(makers)[1:]:
            ratio = times[kind] / times["solve"]
            report.budgets.append(Budget(kind, name, "solve", ratio, limits[kind]))
