"""Running a solver loop so that it can be differentiated in every mode.

`recorded_loop` takes the place of the `while` loop of a solver, be it Diffrax's
(`recorded_adjoint.py`) or our own (`odesolve`). The forward pass runs that loop
unchanged, search for the step sizes included, and records for every accepted step its
times and, where the state source asks for it, the state it started from. The derivative
is the one primitive of `tangent_map.py`, which sees accepted steps only.

What the loop state must have is what Diffrax's has: `y`, `tprev`, `tnext`, `made_jump`,
`solver_state`, `num_accepted_steps`, `save_state` (with `ts`, `ys`, `save_index` and
`saveat_ts_index`), `dense_ts`, `dense_infos`, and, with events, `event_tprev`,
`event_tnext`, `event_dense_info`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.batch import Batch
from .._internal.closure_convert import closure_convert, Pure
from .._internal.compat import while_loop
from .._internal.tree import as_arrays, put
from .._reversible.reconstruction import reconstruction_error
from .._steps.step import SolverStep
from .._trajectory.recording import (
    all_axes,
    Inputs,
    none_like,
    Outputs,
    Plan,
    Recording,
    Saved,
)
from .._trajectory.state_source import AbstractStateSource
from .._trajectory.step_times import RATIO
from .._trajectory.trajectory import StepLog, Trajectory
from .plan import make_plan, Solve, with_first, without_first
from .saves import cursors, save_states
from .tangent_map import tangent_map


class Written(eqx.Module):
    """What the forward pass writes down beside the final state of the loop."""

    rows: PyTree[Array]
    log: StepLog
    at_end: Any


def recorded_loop(
    solve: Solve,
    cond_fun: Callable,
    body_fun: Callable,
    init_state: PyTree,
    *,
    max_steps: int,
    buffers: Callable,
) -> tuple[PyTree, Array | None]:
    """`while cond_fun(state): state = body_fun(state)`, with our derivative.

    **Arguments:**

    - `solve`: the step, the saves and the grid that the loop is made of.
    - `cond_fun`, `body_fun`, `max_steps`, `buffers`: as for
      `equinox.internal.while_loop`; one iteration attempts one step.
    - `init_state`: the state before the first step.

    **Returns:**

    - The final state. Its `y`, the outputs saved so far, and what an event needs are
      differentiable; everything else is constant.
    - The reconstruction error, if `solve.check`.
    """
    init_state = as_arrays(init_state)

    def run(state):
        return run_recording(solve, cond_fun, body_fun, state, max_steps, buffers)

    loop_consts, pure_run = closure_convert(run, init_state)
    plan, inputs = make_plan(solve, init_state)
    final_state, written = _differentiable(plan, pure_run)(
        loop_consts, init_state, without_first(inputs)
    )
    error = None
    if solve.check:
        constants = init_state, final_state, written, inputs
        init, final, written, inputs = jax.lax.stop_gradient(_arrays(constants))
        trajectory = make_trajectory(plan.states, init, final, written)
        recording = unmapped(plan, inputs, trajectory)
        error = reconstruction_error(plan.states, recording.steps)
    return _only_differentiable(solve, init_state, final_state), error


def _differentiable(plan: Plan, pure_run: Pure) -> Callable:
    """`(loop constants, first state, other inputs) -> (final state, Written)`.

    The loop's constants are those of its steps and saves, whose tangents are among
    those of the other inputs.
    """

    @eqx.filter_custom_jvp
    def differentiable_run(loop_consts, init_state, others):
        out = _arrays(pure_run(loop_consts, init_state))
        return _with_common_axes(out, _arrays((loop_consts, init_state, others)))

    @differentiable_run.def_jvp
    def _rule(primals, tangents):
        loop_consts, init_state, others = primals
        _, t_init, t_others = tangents
        final_state, written = differentiable_run(*primals)
        inputs = with_first(plan.states, others, init_state)
        t_inputs = with_first(plan.states, t_others, t_init)
        trajectory = make_trajectory(plan.states, init_state, final_state, written)
        struct = jax.eval_shape(lambda: _outputs(plan, final_state, written))
        out = tangent_map(plan, inputs, trajectory, t_inputs, struct)
        t_out = _tangents_of(plan, out, t_init, final_state, written)
        return (final_state, written), t_out

    def run(*args):
        # Results that are no arrays (such as the functions in a progress meter) are
        # those of the traced loop.
        return eqx.combine(differentiable_run(*args), pure_run.static_out)

    return run


@jax.custom_batching.custom_vmap
def _with_common_axes(out: PyTree[Array], inputs: PyTree[Array]) -> PyTree[Array]:
    """`out`, each of whose arrays has an axis for every `vmap` that `inputs` have.

    The tangents of a solve have all of them, and `vmap` of a function with a rule for
    forward mode wants the same axes for a result and for its tangent.
    """
    del inputs
    return out


@_with_common_axes.def_vmap
def _batch_common_axes(size: int, is_batched: Any, out: PyTree, inputs: PyTree) -> Any:
    is_out_batched, _ = is_batched

    def with_axis(x, has_axis):
        return x if has_axis else jnp.broadcast_to(x, (size, *x.shape))

    out = jax.tree.map(with_axis, out, is_out_batched)
    # There may be more `vmap`s around this one.
    out = _with_common_axes(out, inputs)
    return out, jax.tree.map(lambda _: True, out)


def make_trajectory(
    states: AbstractStateSource,
    init_state: PyTree,
    final_state: PyTree,
    written: Written,
) -> Trajectory:
    """What a derivative has to know of the steps that a loop has taken."""
    solver_state = final_state.solver_state
    lost = getattr(solver_state, "lost", jnp.zeros_like(written.at_end))
    return Trajectory(
        rows=written.rows,
        log=written.log,
        first_start=init_state.tprev,
        first_end=init_state.tnext,
        made_jump0=init_state.made_jump,
        num_steps=final_state.num_accepted_steps,
        at_end=written.at_end,
        step_offset=_steps_taken(init_state),
        y=final_state.y,
        replay_state=_arrays(states.replay_state(solver_state, final_state.made_jump)),
        lost=lost,
        first_cursors=cursors(init_state),
        last_cursors=cursors(final_state),
    )


def unmapped(plan: Plan, inputs: Inputs, trajectory: Trajectory) -> Recording:
    """A recording of one solve, of which nothing is to be differentiated."""
    batch = Batch()
    wrt = jax.tree.map(lambda _: False, inputs)
    return Recording(plan, inputs, trajectory, batch, all_axes(inputs, batch), wrt)


def run_recording(
    solve: Solve,
    cond_fun: Callable,
    body_fun: Callable,
    init_state: PyTree,
    max_steps: int,
    buffers: Callable,
) -> tuple[PyTree, Written]:
    """The loop itself: the final state, and what was written down."""
    states, grid, step_offset = solve.states, solve.grid, _steps_taken(init_state)
    logs_origin = grid.origin_dtype is not None
    rows = None
    if states.rows:
        empty_rows = lambda x: jnp.zeros((states.rows, *x.shape), x.dtype)
        rows = jax.tree.map(empty_rows, _to_store(states, init_state))
    # Further steps are not written down; a derivative then says so.
    size = solve.recorded_steps
    empty = jnp.zeros(size, init_state.tprev.dtype)
    log = StepLog(
        ends=empty if solve.stores_times else None,
        starts=empty if solve.jumps else None,
        made_jumps=empty.astype(bool) if solve.jumps else None,
        origins=jnp.zeros(size, grid.origin_dtype) if logs_origin else None,
    )
    origin = jnp.asarray(RATIO, jnp.int32) if logs_origin else None

    def body(carry):
        state, rows, log, origin = carry
        index = state.num_accepted_steps
        if rows is not None:
            row = states.row_to_write(
                index, step_offset, state.tprev, state.made_jump, grid
            )
            # A rejected attempt is overwritten by the next one.
            rows = put(rows, row, _to_store(states, state))
        now = StepLog(
            ends=state.tnext if solve.stores_times else None,
            starts=state.tprev if solve.jumps else None,
            made_jumps=state.made_jump if solve.jumps else None,
            origins=origin.astype(grid.origin_dtype) if logs_origin else None,
        )
        log = put(log, index, now)
        new_state = body_fun(state)
        if logs_origin:
            accepted = new_state.num_accepted_steps != state.num_accepted_steps
            origin = grid.origin(new_state.tprev, new_state.tnext, origin, accepted)
        return new_state, rows, log, origin

    final_state, rows, log, _ = while_loop(
        lambda carry: cond_fun(carry[0]),
        body,
        (init_state, rows, log, origin),
        max_steps=max_steps,
        buffers=lambda carry: (buffers(carry[0]), carry[1], carry[2]),
        kind="lax",
    )
    return final_state, Written(rows, log, final_state.tprev >= solve.t1)


def _steps_taken(init_state: PyTree) -> Array:
    """The steps that the solver has taken before this solve, as it counts them."""
    zero = jnp.zeros_like(init_state.num_accepted_steps)
    count = getattr(init_state.solver_state, "steps_taken", zero)
    return count.astype(zero.dtype)


def _to_store(states: AbstractStateSource, state: PyTree) -> PyTree[Array]:
    """The arrays to store of the state before a step."""
    replay_state = states.replay_state(state.solver_state, state.made_jump)
    return _arrays(as_arrays((state.y, replay_state)))


def _arrays(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_array)


def _outputs(plan: Plan, final_state: PyTree, written: Written) -> Outputs:
    """What depends differentiably on the inputs."""
    is_event = plan.event
    replay_state = plan.states.replay_state(final_state.solver_state, None)
    out = Outputs(
        y=final_state.y,
        replay_state=replay_state,
        saved=[
            Saved(s.ts, s.ys)
            if save.steps or save.inside is not None
            else Saved(None, None)
            for s, save in zip(save_states(final_state), plan.saves, strict=True)
        ],
        dense_ts=final_state.dense_ts if plan.dense else None,
        dense_infos=final_state.dense_infos if plan.dense else None,
        event_start=final_state.event_tprev if is_event else None,
        event_end=final_state.event_tnext if is_event else None,
        event_info=final_state.event_dense_info if is_event else None,
        rows=written.rows,
        ends=written.log.ends,
        starts=written.log.starts,
    )
    return eqx.filter(out, eqx.is_inexact_array)


def _tangents_of(
    plan: Plan, out: Outputs, t_init: PyTree, final_state: PyTree, written: Written
) -> tuple[PyTree, PyTree]:
    """Tangents of the final state and of `Written`; `None` for what is constant.

    Rows that were saved before the loop keep the tangents that they had.
    """
    constant = none_like(final_state)
    new: dict[str, Any] = {
        "y": out.y,
        "solver_state": plan.states.with_replay_state(
            constant.solver_state, out.replay_state
        ),
        "save_state": _sum(_with_saved(constant, out.saved), t_init.save_state),
    }
    if plan.dense:
        new["dense_ts"] = _sum(out.dense_ts, t_init.dense_ts)
        new["dense_infos"] = out.dense_infos
    if plan.event:
        new["event_tprev"] = out.event_start
        new["event_tnext"] = out.event_end
        new["event_dense_info"] = out.event_info
    log = replace(none_like(written.log), ends=out.ends, starts=out.starts)
    return replace(constant, **new), Written(out.rows, log, None)


def _with_saved(constant: PyTree, saved: list[Saved]) -> PyTree:
    """The tangents of the states of all saves."""
    rows, is_save = iter(saved), lambda x: hasattr(x, "save_index")

    def with_rows(state):
        if not is_save(state):
            return state
        new = next(rows)
        return replace(state, ts=new.ts, ys=new.ys)

    return jax.tree.map(with_rows, constant.save_state, is_leaf=is_save)


def _sum(left: PyTree, right: PyTree) -> PyTree:
    """The sum of two tangents, of which any array may be `None`."""

    def add(x, y):
        return y if x is None else x if y is None else x + y

    return jax.tree.map(add, left, right, is_leaf=lambda x: x is None)


def _only_differentiable(solve: Solve, init_state: PyTree, final_state: PyTree):
    """Makes constant what has no derivative, and leaves what the loop never wrote.

    The time reached moves with `t1` if it is `t1`, else with `t0`.
    """
    reached = final_state.tprev == solve.t1
    stopped = jax.lax.stop_gradient(final_state.tprev)
    moving = stopped + (solve.t0 - jax.lax.stop_gradient(solve.t0))
    new: dict[str, Any] = {"tprev": jnp.where(reached, solve.t1, moving)}
    constant = ["tnext", "controller_state", "event_values", "progress_meter_state"]
    if not isinstance(solve.step, SolverStep):
        constant.append("solver_state")
    for name in constant:
        if hasattr(final_state, name):
            new[name] = jax.lax.stop_gradient(getattr(final_state, name))
    final_state = replace(final_state, **new)
    idle = [save.ts is None and save.steps == 0 for save in solve.saves]
    get = lambda s: [x for x, skip in zip(save_states(s), idle, strict=True) if skip]
    return eqx.tree_at(get, final_state, get(init_state))
