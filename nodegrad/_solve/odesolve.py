"""`odesolve`, which solves a differential equation with nodegrad's loop."""

# Annotations stay strings, so `help(odesolve)` shows them as they are written here.
from __future__ import annotations

import functools as ft
import os
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real

from .._internal.compat import while_loop
from .._internal.devices import on_each_device
from .._internal.results import RESULTS
from .._internal.tree import check_flag, is_traced, where
from .._reverse.recorded_loop import recorded_loop
from .aca_adjoint import ACAAdjoint
from .arguments import (
    as_state,
    as_terms,
    as_times,
    check_batched,
    check_no_others,
    check_supported,
    check_ts,
)
from .loop import loop_buffers, Problem, State
from .problem import make_problem, solution_of, solve_of
from .recorded_adjoint import AbstractRecordedAdjoint, without_gradient


if TYPE_CHECKING:
    from typing import Never as Unsupported
else:
    # Type checkers that run with the program do not know arguments of type `Never`.
    Unsupported = Any


_SAVE_T1 = diffrax.SaveAt(t1=True)
_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()


def odesolve(
    terms: Callable[[Array, PyTree, PyTree], PyTree] | PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Real[ArrayLike, ""],
    t1: Real[ArrayLike, ""],
    dt0: Real[ArrayLike, ""] | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    saveat: diffrax.SaveAt = _SAVE_T1,
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int | None = 4096,
    throw: bool = True,
    batched: bool = False,
    **others: Unsupported,
) -> diffrax.Solution:
    r"""Solves $y'(t) = f(t, y(t), \mathrm{args})$, $y(t_0) = y_0$, from `t0` to `t1`.

    The arguments and the result are those of `diffrax.diffeqsolve`, and so are the
    numbers: up to rounding, which moves adaptive steps slightly, or on a rough control
    enough to accept others. The differences: `odesolve` usually compiles faster,
    distinguishes more kinds of failure, counts vector field evaluations, and integrates
    batches.

    **Example:**

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    sol = nodegrad.odesolve(
        lambda t, y, rate: -rate * y, diffrax.Tsit5(), 0.0, 1.0, None, jnp.ones(2), 2.0,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
    )
    print(sol.ys[0].round(3))  # [0.135 0.135]
    ```

    **Arguments:**

    - `terms`: the vector field `f(t, y, args)`, or Diffrax terms.
    - `solver`: any Diffrax solver, also one of nodegrad.
    - `t0`, `t1`: start and end, real scalars; `t1 < t0` integrates backwards.
    - `dt0`: the first step size, or the size of all steps; `None` if the step size
      controller chooses it. It has the sign of `t1 - t0`.
    - `y0`: the initial state, any pytree of arrays.
    - `args`: passed to the vector field, any pytree.
    - `saveat`: what to save; any `diffrax.SaveAt` without `solver_state`,
      `controller_state` and `made_jump`.
    - `stepsize_controller`: any Diffrax step size controller.
    - `adjoint`: how to differentiate: `nodegrad.ACAAdjoint(...)`, or for reversible
      solvers `nodegrad.ReversibleAdjoint()`.
    - `max_steps`: a bound on the number of attempted steps. `None` is no bound; then
      only forward mode can differentiate the solve.
    - `throw`: whether to raise an error if the solve fails. Otherwise see `result`.
    - `batched`: whether every leaf of `y0` has a leading batch axis. The vector field
      is written for one sample; every sample takes its own steps; `args` and the terms
      are shared. Result, time and memory are those of `jax.vmap` over `y0`, but the
      error for a failure contains the number of the sample.

    **Returns:** a `diffrax.Solution`. Its `stats` are Diffrax's and
    `"num_vector_field_evaluations"` (`None` if not known, as for solvers that iterate)
    and `"time_reached"`. Its `result` is one of `nodegrad.RESULTS`, which can be
    compared with those of `diffrax.RESULTS`.

    If the solve fails, `ys` hold the finite solution up to `stats["time_reached"]`, and
    the gradient is that of this part. In a batch, or under `jax.vmap`, the failure of
    one sample does not affect the others.

    **Raises:** `ValueError` or `TypeError` for arguments that do not fit together, at
    trace time if they are known then. With `throw=True`, a `RuntimeError` that says
    what failed, when, and what to do.

    **Cost:** an explicit Runge-Kutta method with $s$ stages evaluates the vector field
    $s$ times a step, or $s - 1$ times if its first stage is the last stage of the
    previous step. For gradients see `nodegrad.ACAAdjoint`.

    **When not to use it:** for events, for progress meters, and to continue from a
    `solver_state`. Use `diffrax.diffeqsolve(..., adjoint=nodegrad.ACAAdjoint())`.
    """
    check_no_others(others)
    check_supported(adjoint, saveat)
    check_flag("throw", throw)
    check_flag("batched", batched)
    terms = as_terms(terms)
    t0, t1, dt0 = as_times(t0, t1, dt0, saveat)
    y0 = jax.tree.map(ft.partial(as_state, t0.dtype), y0)
    check_ts(saveat, t0, t1)
    if batched:
        check_batched(y0)
    solve = on_each_device(_raised if throw else _odesolve)
    return solve(
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


@eqx.filter_jit
def _odesolve(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    dt0: Float[Array, ""] | None,
    y0: PyTree[Array],
    args: PyTree,
    saveat: diffrax.SaveAt,
    controller: diffrax.AbstractStepSizeController,
    adjoint: AbstractRecordedAdjoint,
    max_steps: int | None,
    throw: bool,
    batched: bool,
) -> diffrax.Solution:
    """Solves for one sample, or (if `batched`) for every row of the leaves of `y0`."""

    def solve(y0: PyTree[Array]) -> diffrax.Solution:
        problem = make_problem(
            terms, solver, t0, t1, dt0, y0, args, saveat, controller, max_steps
        )
        state, error = _run(problem, adjoint, problem.initial_state(y0), throw)
        return solution_of(problem, saveat, y0, state, error)

    return eqx.filter_vmap(solve)(y0) if batched else solve(y0)


def _run(
    problem: Problem, adjoint: AbstractRecordedAdjoint, state: State, throw: bool
) -> tuple[State, Array | None]:
    """Runs the loop, and records it if there is a bound on the number of steps.

    Returns the state after the loop, and the reconstruction error, which is `None`
    unless `adjoint.check`.
    """
    # Without a bound there is no memory to record into. A `lax` loop has forward mode.
    if problem.max_steps is None:
        final_state = while_loop(
            problem.goes_on,
            problem.attempt_step,
            state,
            buffers=loop_buffers,
            kind="lax",
        )
        return without_gradient(final_state), None
    return recorded_loop(
        solve_of(problem, adjoint, throw),
        problem.goes_on,
        problem.attempt_step,
        state,
        max_steps=problem.max_steps,
        buffers=loop_buffers,
    )


def _raised(*args: Any) -> diffrax.Solution:
    """Solves, and raises an error if the solve fails."""
    # Outside of the jitted function, where the numbers for the message are known.
    return raised(_odesolve(*args))


def raised(sol: diffrax.Solution) -> diffrax.Solution:
    """Returns `sol` if it is successful; otherwise raises an error.

    The error says what failed, when, and what to do; in a batch, for the first sample
    that failed. `sol.result` is a scalar, or has shape `(batch,)`.
    """
    failed = sol.result != RESULTS.successful
    # The user may have asked Equinox to return NaN instead, or to open a debugger.
    if is_traced(failed) or os.environ.get("EQX_ON_ERROR", "raise") != "raise":
        # Inside of `jax.jit` the message cannot contain numbers. `error_if` puts what
        # it returns on one device: a scalar, on which the solution then depends.
        missing = sol.result.error_if(jnp.array(False), failed)
        arrays, others = eqx.partition(sol, eqx.is_array)
        arrays = _unless(missing, arrays)
        return eqx.combine(arrays, others)
    if not failed.any():
        return sol
    # The index of the sample, as a tuple: empty for a single solve.
    first: Any = tuple(int(i[0]) for i in failed.nonzero()) if failed.ndim else ()
    message = str(RESULTS[jax.tree.map(lambda x: x[first], sol.result)])

    def number(x: ArrayLike) -> str:
        # Derivatives by `t0` or `t1` that are not jitted hide these times.
        return "?" if is_traced(x) else f"{float(jnp.asarray(x)[first]):.9g}"

    sample = f" (sample {first[0]} of the batch)" if first else ""
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


# A solution of at most so many numbers is selected, and not branched on: the copy takes
# about a microsecond.
_FEW = 1000


# `jax_debug_nans` looks at what a jitted function returns, and not at NaNs inside.
@jax.jit
def _unless(missing: Bool[Array, ""], arrays: PyTree[Array]) -> PyTree[Array]:
    """Returns `arrays`, or others of their shapes if the solution is `missing`."""
    if sum(x.size for x in jax.tree.leaves(arrays)) <= _FEW:
        # Without code for a branch, and for its derivatives.
        return where(missing, _garbled(arrays), arrays)
    # A selection would copy the solution.
    return jax.lax.cond(missing, _garbled, lambda x: x, arrays)


def _garbled(arrays: PyTree[Array]) -> PyTree[Array]:
    """Returns arrays that nobody takes for the solution, where a check has failed."""
    is_inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if is_inexact(x) else ~x, arrays
    )
