"""Converts between the user's arguments, a `Problem`, and a `diffrax.Solution`.

`odesolve` and the second derivatives along a solve share it. A problem is one solve,
without a batch axis, in a time that runs forwards.
"""

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Real

from .._internal.compat import assert_term_compatible, WrapTerm
from .._internal.results import coupling_stats
from .._internal.tree import check_counts, with_fields
from .._reverse.plan import nearly, Solve
from .._steps.step import make_step
from .._trajectory.output import write_final
from .._trajectory.step_times import may_jump, without_derivatives
from .arguments import check_methods, check_vector_field, forwards, with_tolerances
from .loop import Problem, State
from .recorded_adjoint import (
    AbstractRecordedAdjoint,
    make_solve,
    saves_of,
    subs_of,
)


def make_problem(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    dt0: Real[Array, ""] | None,
    y0: PyTree[Array],
    args: PyTree,
    saveat: diffrax.SaveAt,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int | None,
) -> Problem:
    """Returns the problem, with its time reversed if `t1 < t0`.

    `t0`, `t1`, `dt0` and `saveat` are in the user's time, those of the problem are
    multiplied by its `direction`.
    """
    check_methods(terms, solver, controller)
    check_counts(None, max_steps=max_steps)
    check_vector_field(terms, t0, y0, args)
    kwargs = solver.term_compatible_contr_kwargs
    assert_term_compatible(t0, y0, args, terms, solver.term_structure, kwargs)
    # A weakly typed integer, as Diffrax's controllers and terms expect. Its product
    # with a time or a complex derivative has the type of that.
    direction = jnp.where(t0 < t1, 1, -1)
    t0, t1 = t0 * direction, t1 * direction
    dt0 = None if dt0 is None else dt0 * direction
    # `wrap` changes the times that a controller has, such as `step_ts`.
    controller = without_derivatives(controller.wrap(direction))
    # `WrapTerm` evaluates a term at the user's times, and multiplies its control by
    # `direction`. The terms of a `MultiTerm` are wrapped one by one.
    terms = jax.tree.map(
        lambda x: WrapTerm(x, direction), terms, is_leaf=_is_single_term
    )
    solver = with_tolerances(solver, controller)
    subs = [forwards(sub, direction, t0, t1) for sub in subs_of(saveat)]
    jumps = may_jump(controller)
    return Problem(
        direction=direction,
        solver=solver,
        t0=t0,
        t1=t1,
        nearly_t1=nearly(t1),
        dt0=dt0,
        controller=controller,
        step=make_step(solver, terms, args, t0, t1, y0, jumps),
        subs=subs,
        saves=saves_of(subs),
        dense=saveat.dense,
        jumps=jumps,
        one_clock=isinstance(controller, diffrax.StepTo | diffrax.ConstantStepSize),
        max_steps=max_steps,
    )


def _is_single_term(x: object) -> bool:
    """Returns whether `x` is a term, and not a sum of terms."""
    is_term = isinstance(x, diffrax.AbstractTerm)
    return is_term and not isinstance(x, diffrax.MultiTerm)


def solve_of(problem: Problem, adjoint: AbstractRecordedAdjoint, throw: bool) -> Solve:
    """Returns what to record of a problem that has a bound on its number of steps."""
    assert problem.max_steps is not None
    return make_solve(
        adjoint,
        problem.step,
        problem.controller,
        problem.t0,
        problem.t1,
        problem.dt0,
        problem.max_steps,
        problem.saves,
        dense=problem.dense,
        event=False,
        throw=throw,
        first_jump=False,
    )


def solution_of(
    problem: Problem,
    saveat: diffrax.SaveAt,
    y0: PyTree[Array],
    state: State,
    error: Array | None,
) -> diffrax.Solution:
    """Returns the solution in the user's time, from the state after the loop.

    `error` is the reconstruction error, or `None` if it was not computed.
    """
    t, y, count = state.tprev, state.y, state.num_accepted_steps
    direction = problem.direction
    saved = [
        write_final(sub, old, problem.t0, problem.t1, t, y, count, problem.args)
        for sub, old in zip(problem.subs, state.save_state, strict=True)
    ]
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
    structure = jax.tree.structure(saveat.subs, is_leaf=is_sub)
    interpolation = None
    if problem.dense:
        # Its `ts` run forwards: Diffrax converts the user's times when it interpolates.
        interpolation = diffrax.DenseInterpolation(
            ts=state.dense_ts,
            ts_size=count + 1,
            infos=state.dense_infos,
            interpolation_cls=problem.solver.interpolation_cls,
            direction=direction,
            t0_if_trivial=problem.t0,
            y0_if_trivial=y0,
        )
    stats = {
        "num_steps": state.num_steps,
        "num_accepted_steps": count,
        "num_rejected_steps": state.num_steps - count,
        "num_vector_field_evaluations": state.num_evaluations,
        "time_reached": t * direction,
        "max_steps": problem.max_steps,
        **coupling_stats(state.solver_state),
    }
    if error is not None:
        stats["reconstruction_error"] = error
    sol = diffrax.Solution(
        t0=problem.t0 * direction,
        t1=problem.t1 * direction,
        ts=jax.tree.unflatten(
            structure, [_in_user_time(s.ts, direction) for s in saved]
        ),
        ys=jax.tree.unflatten(structure, [s.ys for s in saved]),
        interpolation=interpolation,
        stats=stats,
        result=diffrax.RESULTS.successful,
        solver_state=None,
        controller_state=None,
        made_jump=None,
        event_mask=None,
    )
    # Where types are checked at run time, the constructor refuses items of
    # `nodegrad.RESULTS`.
    return with_fields(sol, result=problem.result(state))


def _in_user_time(
    ts: Real[Array, " num_saved"], direction: Int[Array, ""]
) -> Real[Array, " num_saved"]:
    """Returns saved times in the user's time. Rows not written stay plus infinity."""
    return jnp.where(jnp.isinf(ts), jnp.inf, ts * direction)
