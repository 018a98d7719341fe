"""Pulling back what a solve saved, one step at a time and backwards.

An output row was written by the step that covers its time, in order. So on the way back
each save needs only a cursor that moves down its rows (`SaveAt(steps=n)`) and down its
times (`SaveAt(ts=...)`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.batch import Axes
from .._internal.tree import add, filled_like, inexact_spec, take, where, zeros_like
from .._trajectory.recording import Outputs, Recording
from .._trajectory.state_source import BackwardStep
from .._trajectory.trajectory import Cursor


class Save(eqx.Module):
    """One `diffrax.SubSaveAt`, as far as it saves during the loop."""

    ts: Array | None
    steps: int = eqx.field(static=True)
    fn: Callable


class StepCotangents(eqx.Module):
    """Cotangents of the results of a step: its state, dense information, times."""

    y1: PyTree
    info: PyTree
    start: Real[Array, "..."]
    end: Real[Array, "..."]


class SaveCarry(eqx.Module):
    """What is carried from step to step for one save.

    - `cursor`: how many times and rows are left.
    - `at_end`, `inside`: cotangents of the constants of the two functions.
    - `ts`: the cotangent of the times to save at, one for every solve.
    """

    cursor: Cursor
    at_end: list[Any]
    inside: list[Any]
    ts: Array | None


def save_states(state: PyTree) -> list[Any]:
    """The `SaveState`s of a loop state (or of its tangent), in order."""
    is_save = lambda x: hasattr(x, "save_index")
    leaves = jax.tree.leaves(state.save_state, is_leaf=is_save)
    return [x for x in leaves if is_save(x)]


def cursors(state: PyTree) -> list[Cursor]:
    """How much every save has written."""
    return [Cursor(s.saveat_ts_index, s.save_index) for s in save_states(state)]


def pull_back_saves(
    recording: Recording,
    ct: Outputs,
    carries: list[SaveCarry],
    cts: StepCotangents,
    step: BackwardStep,
    y1: PyTree,
    info: PyTree,
) -> tuple[list[SaveCarry], StepCotangents]:
    """Adds to `carries` and to `cts` the cotangents of what a step saved.

    `ct` are the cotangents of the whole solve; `y1` and `info` are results of the step.
    """
    cts = _pull_back_dense(recording, ct, cts, step)
    new = []
    for which, (save, carry) in enumerate(
        zip(recording.plan.saves, carries, strict=True)
    ):
        if jax.tree.leaves(ct.saved[which]):
            rows = _Rows(recording, ct, which)
            if save.at_end is not None:
                carry, cts = _pull_back_steps(rows, carry, cts, step, y1)
            if save.inside is not None:
                carry, cts = _pull_back_ts(rows, carry, cts, step, info)
        new.append(carry)
    return new, cts


def _pull_back_dense(
    recording: Recording, ct: Outputs, cts: StepCotangents, step: BackwardStep
) -> StepCotangents:
    """Adds the cotangents of dense output and of an event."""
    row, index = recording.batch.take, step.index
    info, start, end = cts.info, cts.start, cts.end
    if recording.plan.dense:
        info = _add_known(info, row(ct.dense_infos, index))
        end = _add_known(end, row(ct.dense_ts, index + 1))
    if recording.plan.event:
        last = index == recording.trajectory.num_steps - 1
        only_last = lambda tree: where(last, tree, zeros_like(tree))
        info = _add_known(info, only_last(ct.event_info))
        start = _add_known(start, only_last(ct.event_start))
        end = _add_known(end, only_last(ct.event_end))
    return replace(cts, info=info, start=start, end=end)


class _Rows(eqx.Module):
    """The cotangents of the rows of one save, and how the rows were computed."""

    recording: Recording
    ct: Outputs
    which: int = eqx.field(static=True)

    @property
    def ts(self) -> tuple[Array, Axes]:
        """The times to save at."""
        return self.recording.inputs.ts[self.which], self.recording.axes.ts[self.which]

    def pull(
        self, kind: int, args: tuple, spec: PyTree[bool], row: Array, active: Array
    ) -> tuple[PyTree, PyTree]:
        """Pulls the cotangent of `row` back to what the row was computed from.

        `kind` is 0 for a row saved at the end of a step, 1 for one saved inside it.
        Where not `active` the cotangent is zero.
        """
        recording, which = self.recording, self.which
        _, *functions = recording.plan.saves[which]
        pure: Any = functions[kind]
        value, pull = pure.pullback(
            recording.batch,
            recording.inputs.save_constants[which][kind],
            recording.axes.save_constants[which][kind],
            recording.wrt.save_constants[which][kind],
            args,
            spec,
        )
        read = recording.batch.map(take)
        ct = filled_like(read(self.ct.saved[which].ys, jnp.maximum(row, 0)), value)
        return pull(where(active, ct, zeros_like(ct)))

    def time(self, row: Int[Array, "..."], active: Bool[Array, "..."]) -> Array:
        """The cotangent of the time saved in `row`."""
        ct_ts = self.ct.saved[self.which].ts
        if ct_ts is None:
            return jnp.zeros_like(self.recording.trajectory.first_start)
        ct = self.recording.batch.map(take)(ct_ts, jnp.maximum(row, 0))
        return jnp.where(active, ct, 0)


def _pull_back_steps(
    rows: _Rows, carry: SaveCarry, cts: StepCotangents, step: BackwardStep, y1: PyTree
) -> tuple[SaveCarry, StepCotangents]:
    """`SaveAt(steps=n)`: every `n`-th accepted step saved its end."""
    recording = rows.recording
    every = recording.plan.saves[rows.which].steps
    saved = ((step.index + 1) % every == 0) & step.active
    row = carry.cursor.row - jnp.where(saved, 1, 0)
    args, spec = (step.times.end, y1), (recording.wrt_times, inexact_spec(y1))
    ct_consts, (ct_t, ct_y1) = rows.pull(0, args, spec, row, saved)
    if recording.wrt_times:
        ct_t = ct_t + rows.time(row, saved)
    cts = replace(cts, y1=add(cts.y1, ct_y1), end=_add_known(cts.end, ct_t))
    cursor = Cursor(carry.cursor.ts_index, row)
    at_end = add(carry.at_end, ct_consts)
    return replace(carry, cursor=cursor, at_end=at_end), cts


def _pull_back_ts(
    rows: _Rows, carry: SaveCarry, cts: StepCotangents, step: BackwardStep, info: PyTree
) -> tuple[SaveCarry, StepCotangents]:
    """`SaveAt(ts=...)`: the times in `(end of the step before, end]`.

    Every solve of a batch saved another number of times in its step, so this is a loop
    until the last of them is through.
    """
    recording, times = rows.recording, step.times
    batch, (ts, ts_axes) = recording.batch, rows.ts
    num_ts = ts.shape[-1]
    wrt_ts, wrt_times = recording.wrt.ts[rows.which], recording.wrt_times
    spec = (wrt_ts, wrt_times, wrt_times, inexact_spec(info))
    time_at = batch.map_shared(lambda ts, index: ts[index], ts, ts_axes)
    previous_end = recording.steps.end(step.index - 1)

    def is_inside(state):
        ts_index = state[0].cursor.ts_index
        t = time_at(jnp.maximum(ts_index - 1, 0))
        # The first step saved whatever was due by its end.
        inside = (step.index == 0) | (t > previous_end)
        return step.active & (ts_index > 0) & inside

    def body(state):
        inside = is_inside(state)
        carry, cts = state
        one = jnp.where(inside, 1, 0)
        ts_index, row = carry.cursor.ts_index - one, carry.cursor.row - one
        t = time_at(jnp.minimum(ts_index, num_ts - 1))
        ct_consts, ct_args = rows.pull(
            1, (t, times.start, times.end, info), spec, row, inside
        )
        ct_t, ct_start, ct_end, ct_info = ct_args
        ct_ts = carry.ts
        if wrt_ts:
            add_at = batch.map(lambda cts, i, ct: cts.at[i].add(ct))
            ct_ts = add_at(ct_ts, ts_index, ct_t + rows.time(row, inside))
        cts = replace(
            cts,
            info=add(cts.info, ct_info),
            start=_add_known(cts.start, ct_start),
            end=_add_known(cts.end, ct_end),
        )
        carry = replace(
            carry,
            cursor=Cursor(ts_index, row),
            inside=add(carry.inside, ct_consts),
            ts=ct_ts,
        )
        return carry, cts

    return batch.while_loop(is_inside, body, (carry, cts))


def _add_known(total: PyTree, part: PyTree) -> PyTree:
    """`total + part`, where `part` may lack leaves that are zero."""
    return jax.tree.map(
        lambda x, p: x if p is None else x + p,
        total,
        part,
        is_leaf=lambda x: x is None,
    )
