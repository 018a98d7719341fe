"""Second derivatives of the numbers that a solve computed: record, then sweep back."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

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
    adjoint: AbstractRecordedAdjoint,
    max_steps: int,
    dtype,
) -> tuple[diffrax.Solution, Array, Carry]:
    """The solution, `loss` of its final state, and the expansion of that at `t0`.

    Second derivatives of the steps count if `curved`. If `without_curvature` are terms,
    they are those of steps with these terms.
    """
    if ts is not None:
        stepsize_controller = _stepping_to(ts, stepsize_controller)

    def prepare(terms, args) -> tuple[Problem, Solve]:
        problem = make_problem(
            terms, solver, t0, t1, dt0, y0, args, _SAVE_T1, stepsize_controller,
            max_steps,
        )  # fmt: skip
        return problem, solve_of(problem, adjoint, throw=True)

    problem, solve = prepare(terms, args)
    differentiated = terms if without_curvature is None else without_curvature
    u, args_of = flatten(args, dtype)
    init_state = as_arrays(problem.initial_state(y0))
    if ts is not None:
        _check_one_step(solve, init_state)
    final_state, written = run_recording(
        solve,
        problem.is_running,
        problem.attempt_step,
        init_state,
        max_steps,
        loop_buffers,
    )
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
    carry = visitor(loss, None if ts is None else ts * problem.direction)
    sol = solution_of(problem, _SAVE_T1, y0, final_state, None)
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


def _stepping_to(ts: Array, controller):
    """`controller`, made to end steps at `ts` if it chooses where steps end."""
    if isinstance(controller, diffrax.ConstantStepSize | diffrax.StepTo):
        return controller
    return diffrax.ClipStepSizeController(controller, step_ts=ts)


def _check_one_step(solve: Solve, state):
    replay_state = solve.states.replay_state(state.solver_state, state.made_jump)
    if jax.tree.leaves(eqx.filter(replay_state, eqx.is_inexact_array)):
        msg = (
            "`hessian_blocks(ts=...)` needs a solver whose steps depend on nothing but "
            "the state they start from, such as `diffrax.Tsit5()`: with any other one "
            "the derivative with respect to the state alone, at a time between, has no "
            "meaning. Use `nodegrad.theorem1_blocks`, or leave out `ts`."
        )
        raise ValueError(msg)
