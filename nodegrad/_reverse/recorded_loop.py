"""Runs a solver loop, and records it such that every mode of JAX can differentiate it.

`recorded_loop` replaces the `while` loop of a solver: that of Diffrax
(`recorded_adjoint.py`) or that of `odesolve`. The forward pass runs the loop unchanged,
with its search for step sizes. For every accepted step it records the times and, where
the state source asks for it, the state at the start. The derivative is the primitive of
`tangent_map.py`, which depends on accepted steps only.

The loop state has the fields that Diffrax's has: `y`, `tprev`, `tnext`, `made_jump`,
`solver_state`, `num_accepted_steps`, `save_state` (with `ts`, `ys`, `save_index` and
`saveat_ts_index`), `dense_ts`, `dense_infos`, and, with events, `event_tprev`,
`event_tnext`, `event_dense_info`. Its class differs, so it is annotated as a `PyTree`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._internal.batch import Batch, put, with_common_axes
from .._internal.closure_convert import closure_convert, Pure
from .._internal.compat import while_loop
from .._internal.devices import hidden_axes, keep_on_devices
from .._internal.tree import as_arrays, only_arrays, with_fields
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
from .._trajectory.step_times import RATIO, UniformGrid
from .._trajectory.trajectory import resync_of, StepLog, steps_taken, Trajectory
from .plan import make_plan, Solve, with_first, without_first
from .saves import cursors, save_states
from .tangent_map import tangent_map


class Written(eqx.Module):
    """What the forward pass records in addition to the final state of the loop.

    - `rows`: the stored states, with one leading axis of size `states.rows`; `None` if
      no state is stored.
    - `num_stored`: the number of states that were stored; 0 if all are.
    - `log`: times of the accepted steps, with one leading axis of `log_size + 1` rows;
      the last one is for all further steps.
    - `at_end`: whether the solve reached its `t1`.
    """

    rows: PyTree[Array]
    # Pytrees, since they are `None` in a tangent.
    num_stored: PyTree[Int[Array, ""]]
    log: StepLog
    at_end: PyTree[Bool[Array, ""]]


def recorded_loop(
    solve: Solve,
    cond_fun: Callable[[PyTree], Bool[Array, ""]],
    body_fun: Callable[[PyTree], PyTree],
    init_state: PyTree,
    *,
    max_steps: int,
    buffers: Callable[[PyTree], PyTree],
) -> tuple[PyTree, Float[Array, ""] | None]:
    """Runs `while cond_fun(state): state = body_fun(state)`, differentiable by `solve`.

    **Arguments:**

    - `solve`: the step, the saves and the grid of the loop.
    - `cond_fun`, `body_fun`, `max_steps`, `buffers`: as for
      `equinox.internal.while_loop`; one iteration attempts one step.
    - `init_state`: the state before the first step.

    **Returns:**

    - The final state. Its `y`, the saved outputs, the time reached, the solver state of
      a `SolverStep`, and what an event needs are differentiable. All else is constant.
    - The reconstruction error; `None` unless `solve.check`.
    """
    init_state = as_arrays(init_state)

    def run(state: PyTree) -> tuple[PyTree, Written]:
        return run_recording(solve, cond_fun, body_fun, state, max_steps, buffers)

    # The loop closes over arrays to differentiate with respect to (`args`, parameters).
    # `closure_convert` turns these into arguments of the function with a derivative.
    loop_consts, pure_run = closure_convert(run, init_state)
    plan, inputs = make_plan(solve, init_state)
    final_state, written = _differentiable(plan, pure_run)(
        loop_consts, init_state, without_first(inputs)
    )
    error = None
    if solve.check:
        # Undo the steps once, and compare with stored states.
        # This is a statistic of the solve, so it has no derivative.
        constants = init_state, final_state, written, inputs
        init, final, written, inputs = jax.lax.stop_gradient(only_arrays(constants))
        trajectory = make_trajectory(plan.states, init, final, written)
        recording = unmapped(plan, inputs, trajectory)
        error = reconstruction_error(plan.states, recording.steps)
    return _only_differentiable(solve, init_state, final_state), error


def _differentiable(plan: Plan, pure_run: Pure) -> Callable[..., Any]:
    """Gives `pure_run` the derivative of `tangent_map`.

    The result maps `(loop constants, first state, other inputs)` to `(final state,
    Written)`. The rule ignores the tangents of the loop constants: these arrays are
    also constants of the steps and saves, and have the same tangents in `others`.
    """
    # The rule may be traced later, where the axes cannot be known.
    axes = hidden_axes()

    @eqx.filter_custom_jvp
    def differentiable_run(
        loop_consts: list[Any], init_state: PyTree, others: Inputs
    ) -> tuple[PyTree, Written]:
        out = only_arrays(pure_run(loop_consts, init_state))
        return with_common_axes(out, only_arrays((loop_consts, init_state, others)))

    @differentiable_run.def_jvp
    def _rule(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        # Without `jit` (`jax.disable_jit`) values and tangents that the user gave as
        # Python numbers still are, and would be left out below.
        primals, tangents = as_arrays((primals, tangents))
        _, init_state, others = primals
        _, t_init, t_others = tangents
        final_state, written = keep_on_devices(differentiable_run(*primals), axes)
        inputs = with_first(plan.states, others, init_state)
        t_inputs = with_first(plan.states, t_others, t_init)
        trajectory = make_trajectory(plan.states, init_state, final_state, written)
        # The outputs have values already. Only their tangents are computed here.
        struct = jax.eval_shape(lambda: _outputs(plan, final_state, written))
        out = tangent_map(plan, inputs, trajectory, t_inputs, struct)
        t_out = _tangents_of(plan, out, t_init, final_state, written)
        return (final_state, written), t_out

    def run(*args: PyTree) -> tuple[PyTree, Written]:
        # Leaves of the final state that are not arrays (such as the functions in a
        # progress meter) are taken from the trace of the loop.
        return eqx.combine(differentiable_run(*args), pure_run.static_out)

    return run


def make_trajectory(
    states: AbstractStateSource,
    init_state: PyTree,
    final_state: PyTree,
    written: Written,
) -> Trajectory:
    """Collects what a derivative needs to know of the accepted steps of a loop."""
    # Only the reversible solvers of nodegrad have this flag.
    solver_state = final_state.solver_state
    lost = getattr(solver_state, "lost", jnp.zeros_like(written.at_end))
    return Trajectory(
        rows=written.rows,
        num_stored=written.num_stored,
        log=written.log,
        made_jump0=init_state.made_jump,
        num_steps=final_state.num_accepted_steps,
        at_end=written.at_end,
        step_offset=steps_taken(init_state),
        y=final_state.y,
        replay_state=only_arrays(
            states.replay_state(solver_state, final_state.made_jump)
        ),
        lost=lost,
        first_cursors=cursors(init_state),
        last_cursors=cursors(final_state),
    )


def unmapped(plan: Plan, inputs: Inputs, trajectory: Trajectory) -> Recording:
    """Returns a recording of one solve, with nothing to differentiate."""
    batch = Batch()
    wrt = jax.tree.map(lambda _: False, inputs)
    return Recording(plan, inputs, trajectory, batch, all_axes(inputs, batch), wrt)


def run_recording(
    solve: Solve,
    cond_fun: Callable[[PyTree], Bool[Array, ""]],
    body_fun: Callable[[PyTree], PyTree],
    init_state: PyTree,
    max_steps: int,
    buffers: Callable[[PyTree], PyTree],
) -> tuple[PyTree, Written]:
    """Runs the loop, and returns its final state and the record."""
    states, grid, step_offset = solve.states, solve.grid, steps_taken(init_state)
    logs_origin = grid.origin_dtype is not None
    # Allocate the record: a row per stored state, and a row per accepted step.
    rows = None
    if states.rows:
        empty_rows = lambda x: jnp.zeros((states.rows, *x.shape), x.dtype)
        rows = jax.tree.map(empty_rows, _to_store(states, init_state))
    # Further steps share a last row; `Trajectory.is_cut` then makes a derivative fail.
    size = solve.log_size + 1
    empty = jnp.zeros(size, init_state.tprev.dtype)
    log = StepLog(
        ends=empty if solve.stores_times else None,
        starts=empty if solve.jumps else None,
        made_jumps=empty.astype(bool) if solve.jumps else None,
        origins=jnp.zeros(size, grid.origin_dtype) if logs_origin else None,
        resyncs=empty.astype(bool) if states.chooses_resyncs else None,
    )
    # The first step size is a ratio: that of the size proposed at the start.
    origin = jnp.asarray(RATIO, jnp.int32) if logs_origin else None

    def body(carry: tuple) -> tuple:
        state, rows, num_stored, log, origin = carry
        index = state.num_accepted_steps
        log = put(log, index, _attempted(solve, state, origin))
        new_state = body_fun(state)
        accepted = new_state.num_accepted_steps != index
        if rows is not None:
            at = index, step_offset, state.made_jump, resync_of(state)
            stores = states.is_stored(*at)
            # Only states before accepted steps are stored: one before a step that the
            # solve never takes could replace a state that the backward pass needs.
            number, now = index, accepted
            if stores is not True:
                number, now = num_stored, accepted & stores
                num_stored = num_stored + now.astype(num_stored.dtype)
            stored = _to_store(states, state)
            rows = put(rows, states.row_to_write(number, now), stored)
        if logs_origin:
            origin = grid.origin(new_state.tprev, new_state.tnext, origin, accepted)
        return new_state, rows, num_stored, log, origin

    # The record consists of loop buffers, so that each write is done in place.
    none_stored = jnp.zeros_like(init_state.num_accepted_steps)
    final_state, rows, num_stored, log, _ = while_loop(
        lambda carry: cond_fun(carry[0]),
        body,
        (init_state, rows, none_stored, log, origin),
        max_steps=max_steps,
        buffers=lambda carry: (buffers(carry[0]), carry[1], carry[3]),
        kind="lax",
    )
    return final_state, Written(rows, num_stored, log, final_state.tprev >= solve.t1)


def _attempted(solve: Solve, state: PyTree, origin: Int[Array, ""] | None) -> StepLog:
    """Returns the record of the step that is attempted from `state`."""
    return StepLog(
        ends=state.tnext if solve.stores_times else None,
        starts=state.tprev if solve.jumps else None,
        made_jumps=state.made_jump if solve.jumps else None,
        origins=None if origin is None else origin.astype(solve.grid.origin_dtype),
        resyncs=resync_of(state) if solve.states.chooses_resyncs else None,
    )


def _to_store(states: AbstractStateSource, state: PyTree) -> PyTree[Array]:
    """Returns the arrays to store of the loop state before a step."""
    replay_state = states.replay_state(state.solver_state, state.made_jump)
    return only_arrays(as_arrays(states.to_store(state.y, replay_state)))


def _outputs(plan: Plan, final_state: PyTree, written: Written) -> Outputs:
    """Collects the results of the loop that depend on its inputs differentiably."""
    is_event = plan.event
    replay_state = plan.states.replay_state(final_state.solver_state, None)
    out = Outputs(
        y=final_state.y,
        replay_state=replay_state,
        saved=[
            Saved(s.ts, s.ys)
            if save.steps or save.inside is not None
            # The loop writes no row of this save. The rows of `t0` and `t1`, if any,
            # are written before and after it.
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
    """Returns the tangents of the final state and of `Written`; `None` for constants.

    Rows that were saved before the loop (at `t0`) keep their tangents in `t_init`: both
    tangents have the shape of the whole buffer, with zeros in the rows of the other.
    """
    constant = none_like(final_state)
    # Fields that are not listed here have no tangent.
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
    log = with_fields(none_like(written.log), ends=out.ends, starts=out.starts)
    return with_fields(constant, **new), Written(out.rows, None, log, None)


def _with_saved(constant: PyTree, saved: list[Saved]) -> PyTree:
    """Puts the tangents `saved` into `constant.save_state`, in order."""
    rows = iter(saved)

    def is_save(x: Any) -> bool:
        return hasattr(x, "save_index")

    def with_rows(state: PyTree) -> PyTree:
        if not is_save(state):
            return state
        new = next(rows)
        return with_fields(state, ts=new.ts, ys=new.ys)

    return jax.tree.map(with_rows, constant.save_state, is_leaf=is_save)


def _sum(left: PyTree, right: PyTree) -> PyTree:
    """Adds two tangents. Arrays may be `None`, which stands for zero."""

    def add(x: Any, y: Any) -> Any:
        return y if x is None else x if y is None else x + y

    return jax.tree.map(add, left, right, is_leaf=lambda x: x is None)


def _only_differentiable(
    solve: Solve, init_state: PyTree, final_state: PyTree
) -> PyTree:
    """Makes results without a derivative constant, and undoes idle saves.

    The time reached has the derivative of `t1` if it is `t1`, and otherwise that of the
    end of the last step where there are events, which end a solve there, or of `t0`.
    """
    reached = final_state.tprev == solve.t1
    stopped = jax.lax.stop_gradient(final_state.tprev)
    moving = solve.t0
    if solve.event:
        has_steps = final_state.num_accepted_steps > 0
        moving = jnp.where(has_steps, final_state.event_tnext, moving)
    moving = stopped + (moving - jax.lax.stop_gradient(moving))
    new: dict[str, Any] = {"tprev": jnp.where(reached, solve.t1, moving)}
    constant = ["tnext", "controller_state", "event_values", "progress_meter_state"]
    if not isinstance(solve.step, SolverStep):
        constant.append("solver_state")
    for name in constant:
        if hasattr(final_state, name):
            new[name] = jax.lax.stop_gradient(getattr(final_state, name))
    if isinstance(solve.grid, UniformGrid):
        # The interval of constant steps stays as it is, and moves with the user's
        # times. Another solve may go on with it.
        new["controller_state"] = eqx.combine(
            eqx.filter(init_state.controller_state, eqx.is_inexact_array),
            new["controller_state"],
        )
    final_state = with_fields(final_state, **new)
    # The loop writes nothing for these saves. Return their state from before the loop,
    # which may already hold a row at `t0`, with its derivative.
    idle = [save.ts is None and save.steps == 0 for save in solve.saves]
    get = lambda s: [x for x, skip in zip(save_states(s), idle, strict=True) if skip]
    return eqx.tree_at(get, final_state, get(init_state))
