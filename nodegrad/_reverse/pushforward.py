"""A recorded solve again, without its search for step sizes, as a function of inputs.

`replay` makes the accepted steps of one solve again, from its first state on, and
writes what the solve returned. Its derivative by forward mode is the tangent map of the
solve: step sizes are constant, and step times move as in `step_times.py`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Real

from .._internal.compat import buffer_at_set, while_loop
from .._internal.tree import as_arrays
from .._trajectory.output import SaveState, write_dense, write_step
from .._trajectory.recording import Inputs, moving_times, Outputs, Plan, Saved
from .._trajectory.step_times import moving_end, StepTimes
from .._trajectory.trajectory import refuse, Trajectory


class _State(eqx.Module):
    """What the loop carries: the state before step `index`, and what was written.

    - `previous_end`, `previous_size`: of the step before, with their tangents.
    """

    index: Int[Array, ""]
    y: PyTree
    replay_state: PyTree
    previous_end: Real[Array, ""]
    previous_size: Real[Array, ""]
    saved: list[SaveState]
    dense_ts: Any
    dense_infos: PyTree
    event: tuple[Array, Array, PyTree] | None
    rows: PyTree
    ends: Any
    starts: Any


def push_forward(
    plan: Plan,
    inputs: Inputs,
    trajectory: Trajectory,
    tangents: Inputs,
    struct: Outputs,
) -> Outputs:
    """The tangents of what one solve returned, from those of its inputs.

    `tangents` has `None` for inputs without one; `struct` are shapes and dtypes of the
    results.
    """
    perturbed = jax.tree.map(lambda _, t: t is not None, inputs, tangents)
    wanted, fixed = eqx.partition(inputs, perturbed)
    moves = moving_times(perturbed)

    def fn(wanted):
        inputs = eqx.combine(wanted, fixed)
        return replay(plan, inputs, trajectory, struct, moves)

    _, out = jax.jvp(fn, (wanted,), (eqx.filter(tangents, perturbed),))
    failed = refuse(trajectory.is_cut, plan.throw)
    if plan.throw and not plan.event:
        # As `pull_back` does: the exception may have been dropped.
        failed = failed | ~trajectory.at_end
    return jax.tree.map(lambda t: jnp.where(failed, jnp.nan, t), out)


def replay(
    plan: Plan,
    inputs: Inputs,
    trajectory: Trajectory,
    struct: Outputs,
    moves: bool,
) -> Outputs:
    """What the solve returned; step times have tangents only if it `moves`."""
    # The recorded steps are constants: all that depends on inputs is computed again.
    trajectory = jax.lax.stop_gradient(trajectory)
    grid = jax.lax.stop_gradient(inputs.grid)

    def body(state: _State) -> _State:
        times = trajectory.times(grid, state.index)
        start, end = times.start, times.end
        if moves:
            previous_end = state.previous_end
            start = start + (previous_end - jax.lax.stop_gradient(previous_end))
            end = moving_end(inputs.grid, times, start, state.previous_size)
        return _make_step(plan, inputs, state, times, start, end)

    final = while_loop(
        lambda state: state.index < trajectory.num_steps,
        body,
        _first_state(plan, inputs, trajectory, struct),
        buffers=_buffers,
        kind="lax",
    )
    event_start, event_end, event_info = final.event or (None, None, None)
    return eqx.filter(
        Outputs(
            y=final.y,
            replay_state=final.replay_state,
            saved=[Saved(save.ts, save.ys) for save in final.saved],
            dense_ts=final.dense_ts,
            dense_infos=final.dense_infos,
            event_start=event_start,
            event_end=event_end,
            event_info=event_info,
            rows=final.rows,
            ends=final.ends,
            starts=final.starts,
        ),
        eqx.is_inexact_array,
    )


def _first_state(
    plan: Plan, inputs: Inputs, trajectory: Trajectory, struct: Outputs
) -> _State:
    """The state before the first step, with nothing written."""
    empty = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    return _State(
        index=jnp.zeros_like(trajectory.num_steps),
        y=inputs.y,
        replay_state=inputs.replay_state,
        previous_end=inputs.first_start,
        previous_size=inputs.first_end - inputs.first_start,
        saved=[
            SaveState(cursor.ts_index, ys.ts, ys.ys, cursor.row)
            for cursor, ys in zip(
                trajectory.first_cursors, empty(struct.saved), strict=True
            )
        ],
        dense_ts=empty(struct.dense_ts),
        dense_infos=empty(struct.dense_infos),
        event=None
        if not plan.event
        else empty((struct.event_start, struct.event_end, struct.event_info)),
        rows=empty(struct.rows),
        ends=empty(struct.ends),
        starts=empty(struct.starts),
    )


def _make_step(
    plan: Plan, inputs: Inputs, state: _State, times: StepTimes, start, end
) -> _State:
    """The next step, from `start` to `end`, and what is written of it."""

    def evaluate(part, key, *args):
        del key
        return plan.parts[part](inputs.constants[part], *args)

    index = times.index
    y1, replay_state1, info = plan.states.step(
        evaluate, times, start, end, state.y, state.replay_state
    )
    saved = [
        _save(pure, consts, ts, old, index, start, end, y1, info)
        for pure, consts, ts, old in zip(
            plan.saves, inputs.save_constants, inputs.ts, state.saved, strict=True
        )
    ]
    # Only what has a tangent is written.
    info = eqx.filter(info, eqx.is_inexact_array)
    dense_ts, dense_infos = state.dense_ts, state.dense_infos
    if plan.dense:
        dense_ts, dense_infos = write_dense(
            dense_ts, dense_infos, index, end, info, True
        )
    grid = jax.lax.stop_gradient(inputs.grid)
    row = plan.states.row_to_write(
        index, times.step_offset, times.start, times.made_jump, grid
    )
    stored = eqx.filter((state.y, state.replay_state), eqx.is_inexact_array)
    put_row = lambda row: lambda buffer, x: buffer_at_set(buffer, row, x, pred=True)
    put_index = put_row(index)
    return _State(
        index=index + 1,
        y=y1,
        replay_state=eqx.filter(as_arrays(replay_state1), eqx.is_array),
        previous_end=end,
        previous_size=end - start,
        saved=saved,
        dense_ts=dense_ts,
        dense_infos=dense_infos,
        event=None if state.event is None else (start, end, info),
        rows=None
        if state.rows is None
        else jax.tree.map(
            lambda x, buffer: put_row(row)(buffer, x), stored, state.rows
        ),
        ends=None if state.ends is None else put_index(state.ends, end),
        starts=None if state.starts is None else put_index(state.starts, start),
    )


def _save(pure, consts, ts, old: SaveState, index, start, end, y1, info) -> SaveState:
    at_end_consts, inside_consts = consts
    with_tangents = lambda row: eqx.filter(row, eqx.is_inexact_array)
    return write_step(
        old,
        ts,
        pure.steps,
        lambda: (end, with_tangents(pure.at_end(at_end_consts, end, y1))),
        lambda t: with_tangents(pure.inside(inside_consts, t, start, end, info)),
        jnp.array(True),
        index + 1,
        end,
    )


def _buffers(state: _State) -> PyTree:
    """The parts of the state that are written row by row."""
    saved = [(save.ts, save.ys) for save in state.saved]
    return (
        saved,
        state.dense_ts,
        state.dense_infos,
        state.rows,
        state.ends,
        state.starts,
    )
