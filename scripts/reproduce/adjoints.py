"""The ways to differentiate a solve that the reversible solvers are compared with.

Each is called like `diffrax.diffeqsolve`, without an adjoint.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import Clock, compile_program, Program, time_in_turns

import nodegrad


Solve = Callable[..., Any]

#: Other programs on the same machine do not add to these seconds.
CLOCK = Clock(time.process_time, "CPU time of this process")


def coupled(
    base: Any, resync_every: int | Literal["auto"] | None = None, **options: Any
) -> nodegrad.Reversible:
    """The coupled method; as published, without resyncs."""
    return nodegrad.Reversible(base, resync_every=resync_every, **options)


def reversible(base: Any, **options: Any) -> Solve:
    """The coupled method with `ReversibleAdjoint`; `options` are those of `coupled`."""
    solver = coupled(base, **options)
    return _with(nodegrad.odesolve, solver, nodegrad.ReversibleAdjoint())


def aca(base: Any) -> Solve:
    """The base method with `ACAAdjoint`."""
    return _with(nodegrad.odesolve, base, nodegrad.ACAAdjoint())


def checkpointed(base: Any, checkpoints: int | None = None) -> Solve:
    """The base method with so many of Diffrax's checkpoints; `None` is its default."""
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints)
    return _with(diffrax.diffeqsolve, base, adjoint)


def backpropagated(base: Any) -> Solve:
    """The base method in a loop that keeps everything: plain backpropagation.

    The number of steps is `max_steps`, and the result has only the final state.
    """
    return partial(_backpropagated, base)


def _with(solve: Solve, solver: Any, adjoint: Any) -> Solve:
    def run(terms: Any, *times_and_values: Any, **options: Any) -> Any:
        # The solver is the second argument.
        return solve(terms, solver, *times_and_values, adjoint=adjoint, **options)

    return run


def states(
    solver: Any, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, steps: int
) -> Any:
    """The states after each of so many equal steps, in a loop that keeps everything."""
    times = jnp.linspace(t0, t1, steps + 1)

    def step(carry: Any, ends: Any) -> Any:
        y, state = carry
        y, _, _, state, _ = solver.step(terms, *ends, y, args, state, False)
        return (y, state), y

    state = solver.init(terms, times[0], times[1], y0, args)
    return jax.lax.scan(step, (y0, state), (times[:-1], times[1:]))[1]


class _FinalState(NamedTuple):
    """What of a `diffrax.Solution` the callers need."""

    ys: Any
    result: Any = diffrax.RESULTS.successful


def _backpropagated(
    solver: Any,
    terms: Any,
    t0: Any,
    t1: Any,
    dt0: Any,
    y0: Any,
    args: Any = None,
    *,
    max_steps: int,
    throw: bool = True,
) -> _FinalState:
    # There is nothing that would notice a failure.
    del dt0, throw
    times = jnp.linspace(t0, t1, max_steps + 1)
    field = lambda t, y: terms.vf(t, y, args)

    def step(y: Any, ends: Any) -> Any:
        start, end = ends
        return explicit_step(solver.tableau, field, start, end, y), None

    y1, _ = jax.lax.scan(step, y0, (times[:-1], times[1:]))
    return _FinalState(jax.tree.map(lambda y: y[None], y1))


def explicit_step(tableau: Any, field: Any, t0: Any, t1: Any, y: Any) -> Any:
    """A step of a Runge-Kutta method, written out.

    That of Diffrax computes its stages again in the backward pass.
    """
    # The last stage may be for the error estimate alone.
    weights = np.trim_zeros(tableau.b_sol, "b")
    slopes: list[Any] = []

    def after(row: Any) -> Any:
        add = lambda y, *ks: (
            y + (t1 - t0) * sum(float(w) * k for w, k in zip(row, ks, strict=True))
        )
        return jax.tree.map(add, y, *slopes)

    for row, c in zip([[], *tableau.a_lower], [0.0, *tableau.c], strict=True):
        if len(slopes) < len(weights):
            stage = after(row) if slopes else y
            slopes.append(field(t0 + float(c) * (t1 - t0), stage))
    return after(weights)


def failed(sol: Any) -> Any:
    """Whether a solve has failed, as one whose copies have diverged."""
    return sol.result != diffrax.RESULTS.successful


def compiled(function: Callable[..., Any], *args: Any) -> Program:
    """The program of `function` for arguments like these, with its temporary memory."""
    return compile_program(CLOCK, function, *args)


def seconds_per_call(
    programs: dict[str, Program], args: Any, seconds: float, once_above: float = 1e9
) -> dict[str, float]:
    """The median time of a call of each program, called in turns.

    `seconds` is for how long to call all of them together. A call that takes longer
    than `once_above` is made once.
    """
    runs = {name: partial(p.run, *args) for name, p in programs.items()}
    return time_in_turns(CLOCK, runs, seconds=seconds, once_above=once_above)
