"""Differentiates the computed solution of a solve twice, in one sweep over its steps.

The forward pass records the solve, as for a gradient. The sweep pulls the expansion of
the loss back through the recorded steps (`expansion.py`).
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from .._internal.tree import add, as_arrays, flatten
from .._reverse.plan import make_plan, Solve
from .._reverse.recorded_loop import make_trajectory, run_recording, unmapped
from .._solve.loop import loop_buffers, Problem
from .._solve.problem import make_problem, solution_of, solve_of
from .._solve.recorded_adjoint import AbstractRecordedAdjoint
from .expansion import Carry, ExpansionVisitor


_SAVE_T1 = diffrax.SaveAt(t1=True)


def differentiate_steps(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    dt0: Float[Array, ""] | None,
    y0: PyTree[Array],
    args: PyTree,
    *,
    loss: Callable[[PyTree], Array],
    without_curvature: PyTree[diffrax.AbstractTerm] | None,
    curved: bool,
    ts: Real[Array, " times"] | None,
    stepsize_controller: diffrax.AbstractStepSizeController,
    adjoint: AbstractRecordedAdjoint,
    max_steps: int,
    dtype: Any,
) -> tuple[diffrax.Solution, Float[Array, ""], Carry]:
    """Returns the solution, the `loss` of its final state, and its expansion at `t0`.

    **Arguments:**

    - `loss`: a function of the final state to a scalar.
    - `without_curvature`: terms to differentiate instead of `terms`, with the same
      values but other second derivatives. `None`: differentiate `terms`.
    - `curved`: whether to include the second derivatives of the steps.
    - `ts`: the times at which to keep the expansion, too; `None` for `t0` alone.
    - `dtype`: the type of the expansion.
    """
    if ts is not None:
        stepsize_controller = _stepping_to(ts, stepsize_controller)

    def prepare(terms: PyTree, args: PyTree) -> tuple[Problem, Solve]:
        problem = make_problem(
            terms, solver, t0, t1, dt0, y0, args, _SAVE_T1, stepsize_controller,
            max_steps,
        )  # fmt: skip
        return problem, solve_of(problem, adjoint, throw=True)

    problem, solve = prepare(terms, args)
    differentiated = terms if without_curvature is None else without_curvature
    u, args_of = flatten(args, dtype)

    # Solve, and record.
    init_state = as_arrays(problem.initial_state(y0))
    if ts is not None:
        _check_one_step(solve, init_state)
    final_state, written = run_recording(
        solve,
        problem.goes_on,
        problem.attempt_step,
        init_state,
        max_steps,
        loop_buffers,
    )

    # Sweep over the recorded steps, last to first.
    plan, inputs = make_plan(solve, init_state)
    trajectory = make_trajectory(plan.states, init_state, final_state, written)
    visitor = ExpansionVisitor(
        recording=unmapped(plan, inputs, trajectory),
        init_state=init_state,
        u=u,
        solve_at=lambda u: prepare(differentiated, args_of(u))[1],
        curved=curved,
        max_steps=max_steps,
    )
    # The recording is in the time that runs forwards.
    carry = visitor(loss, None if ts is None else ts * problem.direction)
    sol = solution_of(problem, _SAVE_T1, y0, final_state, None)
    return sol, loss(final_state.y), carry


def linearized(field: Callable) -> Callable:
    """Returns `field` with its value and first derivatives, and zero second ones.

    The derivatives are those with respect to `y` and `args`.
    """

    def flat(t: Real[Array, ""], y: PyTree[Array], args: PyTree) -> PyTree[Array]:
        # The first-order Taylor polynomial at the current point `at`. Its distance from
        # that point, `away`, has the value zero and the identity for derivative.
        inexact, rest = eqx.partition((y, args), eqx.is_inexact_array)
        at = jax.lax.stop_gradient(inexact)
        away = jax.tree.map(jnp.subtract, inexact, at)
        value, change = jax.jvp(
            lambda x: field(t, *eqx.combine(x, rest)), (at,), (away,)
        )
        return add(value, change)

    return flat


def _stepping_to(
    ts: Real[Array, " times"], controller: Any
) -> diffrax.AbstractStepSizeController:
    """Returns a controller that ends steps at `ts`, if `controller` is adaptive.

    `controller` is any step size controller. A type checker cannot know that all but
    two are adaptive.
    """
    # The steps of these two are prescribed. `Rows` checks that they end at `ts`.
    if isinstance(controller, diffrax.ConstantStepSize | diffrax.StepTo):
        return controller
    return diffrax.ClipStepSizeController(controller, step_ts=ts)


def _check_one_step(solve: Solve, state: PyTree) -> None:
    """Raises an error if a step depends on more than `y`, such as a previous stage."""
    replay_state = solve.states.replay_state(state.solver_state, state.made_jump)
    if jax.tree.leaves(eqx.filter(replay_state, eqx.is_inexact_array)):
        msg = (
            "`hessian_blocks(ts=...)` needs a solver whose steps depend on nothing but "
            "the state they start from, such as `diffrax.Tsit5()`. For other solvers "
            "the derivative with respect to that state alone is not defined. Use "
            "`nodegrad.theorem1_blocks`, or leave out `ts`."
        )
        raise ValueError(msg)
