"""Second derivatives of the numbers that a solve computed: record, then sweep back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._block_sweep import BlockSweep, Carry
from ._door import RecordedAdjoint
from ._integrate import loop_buffers, Problem
from ._log import Record
from ._odesolve import make_problem, solution_of
from ._record import make_record, run_recording, Solve
from ._tree import add, as_arrays, flatten


_SAVE_T1 = diffrax.SaveAt(t1=True)


def differentiate_steps(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0,
    t1,
    dt0,
    y0: PyTree[Array],
    args: PyTree,
    *,
    loss: Callable[[PyTree], Array],
    without_curvature: PyTree[diffrax.AbstractTerm] | None,
    curved: bool,
    ts: Array | None,
    stepsize_controller: diffrax.AbstractStepSizeController,
    adjoint: RecordedAdjoint,
    max_steps: int,
    dtype,
) -> tuple[diffrax.Solution, Array, Carry]:
    """The solution, `loss` of its final state, and the expansion of that at `t0`.

    Second derivatives of the steps count if `curved`. If `without_curvature` are terms,
    they are those of steps with these terms.
    """
    if ts is not None:
        stepsize_controller = _stepping_to(ts, stepsize_controller)
    direction = jnp.where(t0 < t1, 1, -1).astype(t0.dtype)

    def prepare(terms) -> tuple[Problem, Solve]:
        problem = make_problem(
            direction, terms, solver, t0, t1, dt0, y0, args, _SAVE_T1,
            stepsize_controller, max_steps,
        )  # fmt: skip
        return problem, _make_solve(problem, adjoint)

    problem, solve = prepare(terms)
    differentiated = solve
    if without_curvature is not None:
        _, differentiated = prepare(without_curvature)
    u, args_of = flatten(args, dtype)
    init_state = as_arrays(problem.initial_state(y0))
    if ts is not None:
        _check_one_step(solve, init_state)
    final_state, record = _recorded(problem, solve, init_state)
    sweep = BlockSweep(
        solve=solve,
        record=record,
        init_state=init_state,
        final_state=final_state,
        u=u,
        solve_at=lambda u: _with_args(differentiated, args_of(u)),
        curved=curved,
        max_steps=max_steps,
    )
    carry = sweep(loss, None if ts is None else ts * direction)
    sol = solution_of(problem, _SAVE_T1, direction, y0, final_state, None)
    return sol, loss(final_state.y), carry


def linearized(field: Callable) -> Callable:
    """`field` with its first derivatives, but no second ones."""

    def flat(t, y, args):
        inexact, rest = eqx.partition((y, args), eqx.is_inexact_array)
        at = jax.lax.stop_gradient(inexact)
        away = jax.tree.map(jnp.subtract, inexact, at)
        value, change = jax.jvp(
            lambda x: field(t, *eqx.combine(x, rest)), (at,), (away,)
        )
        return add(value, change)

    return flat


def _make_solve(problem: Problem, adjoint: RecordedAdjoint) -> Solve:
    assert problem.max_steps is not None
    return adjoint.make_solve(
        problem.step,
        problem.solver,
        problem.terms,
        problem.args,
        problem.controller,
        problem.t0,
        problem.t1,
        problem.dt0,
        problem.max_steps,
        saves=problem.saves,
        dense=False,
        event=False,
        lanes=False,
        throw=True,
    )


def _with_args(solve: Solve, args: PyTree) -> Solve:
    """`solve` with other values for its `args`."""
    step: Any = replace(solve.step, args=args)
    reversal = solve.reversal
    if reversal is not None:
        reversal = replace(reversal, args=args)
    return replace(solve, step=step, reversal=reversal, args=args)


def _recorded(problem: Problem, solve: Solve, init_state) -> tuple[Any, Record]:
    """The final state, and what the sweep needs to know."""
    final_state, written = run_recording(
        solve,
        problem.is_running,
        problem.attempt_step,
        init_state,
        problem.max_steps,
        loop_buffers,
    )
    return final_state, make_record(init_state, final_state, written)


def _stepping_to(ts: Array, controller):
    """`controller`, made to end steps at `ts` if it chooses where steps end."""
    if isinstance(controller, diffrax.ConstantStepSize | diffrax.StepTo):
        return controller
    return diffrax.ClipStepSizeController(controller, step_ts=ts)


def _check_one_step(solve: Solve, state):
    kept = solve.kept(state.solver_state, state.made_jump)
    if jax.tree.leaves(eqx.filter(kept, eqx.is_inexact_array)):
        msg = (
            "`hessian_blocks(ts=...)` needs a solver whose steps depend on nothing but "
            "the state they start from, such as `diffrax.Tsit5()`: with any other one "
            "the derivative with respect to the state alone, at a time between, has no "
            "meaning. Pass `continuous=True`, or leave out `ts`."
        )
        raise ValueError(msg)
