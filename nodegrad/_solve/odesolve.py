"""`odesolve`: the native door."""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._internal.compat import while_loop
from .._internal.results import RESULTS
from .._internal.tree import is_traced
from .._reverse.recorded_loop import recorded_loop
from .adjoints import ACAAdjoint
from .arguments import (
    as_state,
    as_times,
    check_batched,
    check_supported,
    check_ts,
    is_terms,
)
from .loop import loop_buffers, Problem, State
from .problem import make_problem, solution_of, solve_of
from .recorded_adjoint import AbstractRecordedAdjoint, without_gradient


_Time = Real[ArrayLike, ""]

_SAVE_T1 = diffrax.SaveAt(t1=True)
_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()


def odesolve(
    terms: Callable[[Array, PyTree, PyTree], PyTree] | PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: _Time,
    t1: _Time,
    dt0: _Time | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    saveat: diffrax.SaveAt = _SAVE_T1,
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int | None = 4096,
    throw: bool = True,
    batched: bool = False,
) -> diffrax.Solution:
    r"""Solves $y'(t) = f(t, y(t), \mathrm{args})$, $y(t_0) = y_0$, from `t0` to `t1`.

    The arguments and the result are those of `diffrax.diffeqsolve`, and so are the
    numbers (up to rounding, which can move adaptive steps by as little). What is
    different: it traces and compiles in a fraction of the time, tells apart more kinds
    of failure, counts vector field evaluations, and integrates batches.

    **Arguments:**

    - `terms`: the vector field `f(t, y, args)`, or Diffrax terms.
    - `solver`: any Diffrax solver, or `nodegrad.RK4()`.
    - `t0`, `t1`: start and end, real scalars; `t1 < t0` integrates backwards.
    - `dt0`: the first step size, or the size of all steps; `None` where the step size
      controller finds it. It has the sign of `t1 - t0`.
    - `y0`: the initial state, any pytree of arrays.
    - `args`: anything, handed on to the vector field.
    - `saveat`: what to save; any `diffrax.SaveAt` but for the `solver_state`,
      `controller_state` and `made_jump`.
    - `stepsize_controller`: any Diffrax step size controller.
    - `adjoint`: how to differentiate: `nodegrad.ACAAdjoint(...)`, or for reversible
      solvers `nodegrad.ReversibleAdjoint()`.
    - `max_steps`: a bound on the number of attempted steps. `None` for none, which can
      be differentiated by forward mode only.
    - `throw`: whether to raise if the solve fails. Otherwise look at `result`.
    - `batched`: whether every leaf of `y0` has a leading batch axis. The vector field
      is written for one sample; every sample takes its own steps; `args` and the terms
      are shared. This is `jax.vmap` over `y0`, in result, time and memory; a failure
      raises with the number of the sample.

    **Returns:** a `diffrax.Solution`. Its `stats` have, besides Diffrax's,
    `"num_vector_field_evaluations"` (`None` for solvers that iterate) and
    `"time_reached"`. Its `result` is one of `nodegrad.RESULTS`, which compare with
    those of `diffrax.RESULTS`.

    If the solve fails, `ys` hold the finite solution up to `stats["time_reached"]`, and
    the gradient is that of this part. In a batch, or under `jax.vmap`, one sample's
    failure changes nothing for the others.

    **Raises:** `ValueError` or `TypeError` for arguments that do not fit together, at
    trace time where they are known then. With `throw=True`, a `RuntimeError` saying
    what failed, when, and what to do.

    **Cost:** an explicit Runge-Kutta method with $s$ stages evaluates the vector field
    $s$ times a step, or $s - 1$ times if its first stage is the last one of the step
    before. For gradients see `nodegrad.ACAAdjoint`.

    **When not to use it:** for events, progress meters, and continuing with a
    `solver_state`, take `diffrax.diffeqsolve(..., adjoint=nodegrad.ACAAdjoint())`.
    """
    check_supported(adjoint, saveat)
    if not is_terms(terms):
        terms = diffrax.ODETerm(terms)  # pyright: ignore[reportArgumentType]
    t0, t1, dt0 = as_times(t0, t1, dt0, saveat)
    y0 = jax.tree.map(ft.partial(as_state, t0.dtype), y0)
    check_ts(saveat, t0, t1)
    if batched:
        check_batched(y0)
    sol = _odesolve(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat,
        stepsize_controller,
        adjoint,
        max_steps,
        throw,
        batched,
    )
    return raised(sol) if throw else sol


@eqx.filter_jit
def _odesolve(
    terms,
    solver,
    t0,
    t1,
    dt0,
    y0,
    args,
    saveat,
    controller,
    adjoint,
    max_steps,
    throw,
    batched,
) -> diffrax.Solution:
    def solve(y0):
        problem = make_problem(
            terms, solver, t0, t1, dt0, y0, args, saveat, controller, max_steps
        )
        state, error = _run(problem, adjoint, problem.initial_state(y0), throw)
        return solution_of(problem, saveat, y0, state, error)

    return eqx.filter_vmap(solve)(y0) if batched else solve(y0)


def _run(
    problem: Problem, adjoint: AbstractRecordedAdjoint, state: State, throw: bool
) -> tuple[State, Array | None]:
    """Runs the loop, recorded if there is a bound on the number of steps.

    Returns the state after it, and the reconstruction error if `adjoint` checks that.
    """
    if problem.max_steps is None:
        final_state = while_loop(
            problem.is_running,
            problem.attempt_step,
            state,
            buffers=loop_buffers,
            kind="lax",
        )
        return without_gradient(final_state), None
    return recorded_loop(
        solve_of(problem, adjoint, throw),
        problem.is_running,
        problem.attempt_step,
        state,
        max_steps=problem.max_steps,
        buffers=loop_buffers,
    )


def raised(sol: diffrax.Solution) -> diffrax.Solution:
    """`sol`, or an error saying what went wrong, where, and what to do."""
    failed = sol.result != RESULTS.successful
    if is_traced(failed):
        return sol.result.error_if(sol, failed)
    if not failed.any():
        return sol
    lane: Any = tuple(int(i[0]) for i in failed.nonzero()) if failed.ndim else ()
    message = str(RESULTS[jax.tree.map(lambda x: x[lane], sol.result)])
    number = lambda x: f"{float(jnp.asarray(x)[lane]):.9g}"
    sample = f" (sample {lane[0]} of the batch)" if lane else ""
    reached, steps = sol.stats["time_reached"], sol.stats["num_accepted_steps"]
    distance = sol.stats.get("coupling_distance")
    apart = "" if distance is None else f", its copies apart by {number(distance)}"
    msg = (
        f"{message}\nThe solve{sample} reached t = {number(reached)}, of "
        f"[{number(sol.t0)}, {number(sol.t1)}], after {number(steps)} accepted steps"
        f"{apart}. "
        "Pass `throw=False` to get the solution up to there, with its `result`."
    )
    raise eqx.EquinoxRuntimeError(msg)
