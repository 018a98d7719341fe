"""Pushes tangents of the inputs of a recorded solve forward to its outputs.

`replay` makes the accepted steps of one solve again, without the search for step sizes,
and writes the outputs again, as a function of `Inputs`. Its derivative by forward mode
is the tangent map of the solve: step sizes are constant, and the times of steps depend
on the inputs as described in `step_times.py`.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Real

from .._internal.batch import put
from .._internal.compat import while_loop
from .._internal.tree import as_arrays, filled_like, zeros_like
from .._trajectory.output import SaveState, write_dense, write_step
from .._trajectory.recording import (
    Inputs,
    moving_times,
    none_like,
    Outputs,
    Plan,
    Saved,
)
from .._trajectory.step_times import moving_end, StepTimes
from .._trajectory.trajectory import refuse, Trajectory


class _State(eqx.Module):
    """What the loop carries: the state before step `index`, and the outputs so far.

    - `previous_end`, `previous_size`: the end and the size of the previous step, as
      functions of the inputs.
    - `saved`: the rows of the saves. These and the fields below hold only arrays that
      have tangents, and are `None` where the solve has no such output.
    - `event`: start, end and dense information of the last step, or `None`.
    - `rows`, `ends`, `starts`: stored states and recorded times of steps.
    - `num_stored`: the number of states that were stored.

    Inside of the loop, the arrays with rows are its buffers: `Any`.
    """

    index: Int[Array, ""]
    y: PyTree
    replay_state: PyTree
    previous_end: Real[Array, ""]
    previous_size: Real[Array, ""]
    saved: list[SaveState]
    dense_ts: Any
    dense_infos: PyTree[Array]
    event: tuple[Array, Array, PyTree] | None
    rows: PyTree[Array]
    ends: Any
    starts: Any
    num_stored: Int[Array, ""]


def push_forward(
    plan: Plan,
    inputs: Inputs,
    trajectory: Trajectory,
    tangents: Inputs,
    struct: Outputs,
) -> Outputs:
    """Returns the tangents of the outputs of one solve, given those of its inputs.

    `tangents` has `None` for inputs without a tangent. `struct` has the shapes and
    dtypes of the outputs. The tangents are NaN if the solve has no derivative; with
    `plan.throw` this is an error.
    """
    perturbed = jax.tree.map(lambda _, t: t is not None, inputs, tangents)
    moves = moving_times(perturbed)
    # The steps give tangents to the state and to what is written of it. Explicit zeros
    # say so in advance. Otherwise JAX differentiates the loop several times, until it
    # has found out what gets a tangent.
    blank = zeros_like(struct)
    t_blank = none_like(struct)
    if moves or any(jax.tree.leaves(replace(perturbed, save_constants=[], ts=[]))):
        tangents = replace(
            tangents,
            y=filled_like(tangents.y, inputs.y),
            replay_state=filled_like(tangents.replay_state, inputs.replay_state),
        )
        t_blank = replace(
            blank,
            saved=[Saved(none_like(save.ts), save.ys) for save in blank.saved],
            dense_ts=none_like(blank.dense_ts),
        )
    perturbed = jax.tree.map(
        lambda _, t: t is not None, (inputs, blank), (tangents, t_blank)
    )
    wanted, fixed = eqx.partition((inputs, blank), perturbed)

    def fn(wanted: tuple[Inputs, Outputs]) -> Outputs:
        inputs, blank = eqx.combine(wanted, fixed)
        return replay(plan, inputs, trajectory, blank, moves)

    _, out = jax.jvp(fn, (wanted,), (eqx.filter((tangents, t_blank), perturbed),))
    # Steps that were not recorded could not be made again: there is no derivative.
    failed = refuse(trajectory.is_cut, plan.throw)
    if plan.throw and not plan.event:
        # JAX may have dropped the error of the solve, as in `gradient.pull_back`.
        failed = failed | ~trajectory.at_end
    return jax.tree.map(lambda t: jnp.where(failed, jnp.nan, t), out)


def replay(
    plan: Plan,
    inputs: Inputs,
    trajectory: Trajectory,
    blank: Outputs,
    moves: bool,
) -> Outputs:
    """Returns the outputs of the solve, written to `blank`.

    Times of steps have tangents if `moves`.
    """
    # Recorded arrays are constants: everything is computed from the inputs again.
    trajectory = jax.lax.stop_gradient(trajectory)
    clock = jax.lax.stop_gradient(inputs.clock)

    def body(state: _State) -> _State:
        times = trajectory.times(clock, state.index)
        start, end = times.start, times.end
        if moves:
            # The values stay those recorded, to the last bit. Only tangents are added:
            # the start moves with the previous end (at a jump the two differ).
            previous_end = state.previous_end
            start = start + (previous_end - jax.lax.stop_gradient(previous_end))
            end = moving_end(inputs.grid, times, start, state.previous_size)
        return _make_step(plan, inputs, state, times, start, end)

    # Rows that no step writes stay zero, and not infinite as in the solve: so do their
    # tangents. Only forward mode differentiates this loop, so `kind="lax"` is enough.
    final = while_loop(
        lambda state: state.index < trajectory.num_steps,
        body,
        _first_state(plan, inputs, trajectory, blank),
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
    plan: Plan, inputs: Inputs, trajectory: Trajectory, blank: Outputs
) -> _State:
    """Returns the state before the first step; its outputs are `blank`."""
    return _State(
        index=jnp.zeros_like(trajectory.num_steps),
        y=inputs.y,
        replay_state=inputs.replay_state,
        previous_end=inputs.first_start,
        previous_size=inputs.first_end - inputs.first_start,
        # A save may have written the row of `t0` before the loop.
        saved=[
            SaveState(cursor.ts_index, ys.ts, ys.ys, cursor.row)
            for cursor, ys in zip(trajectory.first_cursors, blank.saved, strict=True)
        ],
        dense_ts=blank.dense_ts,
        dense_infos=blank.dense_infos,
        event=None
        if not plan.event
        else (blank.event_start, blank.event_end, blank.event_info),
        rows=blank.rows,
        ends=blank.ends,
        starts=blank.starts,
        num_stored=jnp.zeros_like(trajectory.num_steps),
    )


def _make_step(
    plan: Plan,
    inputs: Inputs,
    state: _State,
    times: StepTimes,
    start: Real[Array, ""],
    end: Real[Array, ""],
) -> _State:
    """Makes the step from `start` to `end`, and writes its rows of the outputs."""

    def evaluate(part: str, key: str, *args: PyTree) -> PyTree[Array]:
        # A key tells calls of a part apart; only a reverse sweep needs that.
        del key
        return plan.parts[part](inputs.constants[part], *args)

    index = times.index
    y1, replay_state1, info = plan.states.step(
        evaluate, times, start, end, state.y, state.replay_state
    )
    # Write the rows that the saves have at the end of this step, and inside it.
    saved = [
        _push_saves(pure, consts, ts, old, index, start, end, y1, info)
        for pure, consts, ts, old in zip(
            plan.saves, inputs.save_constants, inputs.ts, state.saved, strict=True
        )
    ]
    # Outputs hold only arrays that have tangents.
    info = eqx.filter(info, eqx.is_inexact_array)
    dense_ts, dense_infos = state.dense_ts, state.dense_infos
    if plan.dense:
        dense_ts, dense_infos = write_dense(
            dense_ts, dense_infos, index, end, info, True
        )
    rows, num_stored = _store(plan, state, times)
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
        rows=rows,
        ends=None if state.ends is None else put(state.ends, index, end),
        starts=None if state.starts is None else put(state.starts, index, start),
        num_stored=num_stored,
    )


def _store(plan: Plan, state: _State, times: StepTimes) -> tuple[Any, Any]:
    """Writes the state before the step to the row where the solve stored it.

    Returns the rows and how many states were stored.
    """
    states, rows, number = plan.states, state.rows, state.num_stored
    if rows is None:
        return rows, number
    at = times.index, times.step_offset, times.made_jump, times.resync
    stores = states.is_stored(*at)
    stored = states.to_store(state.y, state.replay_state)
    stored = eqx.filter(stored, eqx.is_inexact_array)
    if stores is True:
        return put(rows, states.row_to_write(times.index, True), stored), number
    rows = put(rows, states.row_to_write(number, stores), stored)
    return rows, number + jnp.asarray(stores, number.dtype)


def _push_saves(
    pure: Any,
    consts: list[list[Array]],
    ts: Real[Array, " num_ts"] | None,
    old: SaveState,
    index: Int[Array, ""],
    start: Real[Array, ""],
    end: Real[Array, ""],
    y1: PyTree[Array],
    info: PyTree[Array],
) -> SaveState:
    """Writes the rows of one save that belong to step `index`.

    `pure` is a `PureSave`, and `consts` the constants of its two functions. (It is
    annotated as `Any`, because a function that is not needed is `None`.)
    """
    at_end_consts, inside_consts = consts

    def with_tangents(row: PyTree[Array]) -> PyTree[Array]:
        return eqx.filter(row, eqx.is_inexact_array)

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
    """Returns the parts of the state that are written row by row, in place."""
    saved = [(save.ts, save.ys) for save in state.saved]
    return (
        saved,
        state.dense_ts,
        state.dense_infos,
        state.rows,
        state.ends,
        state.starts,
    )
