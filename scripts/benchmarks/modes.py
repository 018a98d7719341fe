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

from .comparison import compare, MEASURED, measured
from .measure import Clock, compile_in_turns, time_in_turns
from .problems import loss, perceptron, Problem, uneven_lanes
from .report import Budget, Report
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
    return compare(clock, report, problem.name, makers, (inputs, span), limits, seconds)


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
    compare(clock, report, name, makers, (args, span), limits, seconds)


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
        report.table(name, MEASURED, measured(programs, times, {}))
        for kind in list(makers)[1:]:
            ratio = times[kind] / times["solve"]
            report.budgets.append(Budget(kind, name, "solve", ratio, limits[kind]))
