"""Pulls cotangents of saved outputs back to the steps that saved them.

The forward pass wrote the rows of a save in the order of the steps. The sweep visits
the steps in reverse order, so one `Cursor` per save finds the rows of each step: it
moves down the rows (for `SaveAt(steps=n)`) and down the times (for `SaveAt(ts=...)`).

For a batch of solves, arrays that belong to one solve have the shape `(*batch, ...)`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.batch import Axes, take
from .._internal.tree import add, filled_like, inexact_spec, where, zeros_like
from .._trajectory.recording import Outputs, Recording
from .._trajectory.state_source import BackwardStep
from .._trajectory.trajectory import Cursor


class Save(eqx.Module):
    """The part of a `diffrax.SubSaveAt` that saves during the loop.

    - `ts`: the times to save at, of shape `(num_ts,)`; `None` without `SaveAt(ts=...)`.
    - `steps`: every how many accepted steps to save; 0 without `SaveAt(steps=...)`.
    - `fn`: computes what is saved from `(t, y, args)`.
    """

    ts: Real[Array, " num_ts"] | None
    steps: int = eqx.field(static=True)
    fn: Callable


class StepCotangents(eqx.Module):
    """Cotangents of the results of a step.

    - `y1`: of the state at the end of the step.
    - `info`: of the dense information, from which rows inside the step are computed.
    - `start`, `end`: of the times of the step.
    """

    y1: PyTree
    info: PyTree
    start: Real[Array, "..."]
    end: Real[Array, "..."]


class SaveCarry(eqx.Module):
    """What the sweep carries from step to step for one save.

    - `cursor`: how many times and rows of the save belong to earlier steps.
    - `at_end`, `inside`: cotangents of the constants of the functions that compute a
      row at the end of a step, and inside it (see `PureSave`).
    - `ts`: the cotangent of the times to save at, of shape `(*batch, num_ts)`, also
      where solves share these times; `None` without `SaveAt(ts=...)`.
    """

    cursor: Cursor
    at_end: list[Any]
    inside: list[Any]
    ts: Array | None


def save_states(state: PyTree) -> list[Any]:
    """Returns the `SaveState`s of a loop state (or of its tangent), in order."""

    def is_save(x: Any) -> bool:
        # By an attribute: Diffrax's loop has a `SaveState` class that is not public.
        return hasattr(x, "save_index")

    leaves = jax.tree.leaves(state.save_state, is_leaf=is_save)
    return [x for x in leaves if is_save(x)]


def cursors(state: PyTree) -> list[Cursor]:
    """Returns how many times and rows each save of a loop state has written."""
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
    """Adds the cotangents of what a step saved to `carries` and to `cts`.

    **Arguments:**

    - `ct`: cotangents of all outputs of the solve; `None` where known to be zero.
    - `carries`: one for each save, from the step visited before (the next one in time).
    - `cts`: cotangents of the results of the step.
    - `y1`, `info`: the state at the end of the step, and its dense information.
    """
    cts = _pull_back_dense(recording, ct, cts, step)
    new = []
    # An output may have been saved at the end of this step, inside it, or both.
    for which, (save, carry) in enumerate(
        zip(recording.plan.saves, carries, strict=True)
    ):
        # A save without cotangents does not affect the loss. Its cursor stays unread.
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
    """Adds the cotangents of dense output and of an event to `cts`.

    Row `i` of the dense information belongs to step `i`, and its end is row `i + 1` of
    `dense_ts` (row 0 is `t0`). The time of an event is found inside the last step.
    """
    row, index = recording.batch.take, step.index
    info, start, end = cts.info, cts.start, cts.end
    if recording.plan.dense:
        info = _add_known(info, row(ct.dense_infos, index))
        end = _add_known(end, row(ct.dense_ts, index + 1))
    if recording.plan.event:
        last = index == recording.trajectory.num_steps - 1

        # Solves of a batch may differ in their last step.
        def only_last(tree: PyTree[Array]) -> PyTree[Array]:
            return where(last, tree, zeros_like(tree))

        info = _add_known(info, only_last(ct.event_info))
        start = _add_known(start, only_last(ct.event_start))
        end = _add_known(end, only_last(ct.event_end))
    return replace(cts, info=info, start=start, end=end)


class _Rows(eqx.Module):
    """The cotangents of the rows of save number `which`, and how rows are computed."""

    recording: Recording
    ct: Outputs
    which: int = eqx.field(static=True)

    @property
    def ts(self) -> tuple[Real[Array, "..."], Axes]:
        """The times to save at, and the batch axes that they have."""
        return self.recording.inputs.ts[self.which], self.recording.axes.ts[self.which]

    def pull(
        self,
        kind: int,
        args: tuple[PyTree[Array], ...],
        spec: PyTree[bool],
        row: Int[Array, "..."],
        active: Bool[Array, "..."],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Pulls the cotangent of `row` back to what the row was computed from.

        **Arguments:**

        - `kind`: 0 for a row saved at the end of a step, 1 for one saved inside it.
        - `args`, `spec`: the arguments of the function that computed the row, and which
          of their leaves to differentiate.
        - `row`: for each solve, the number of the row.
        - `active`: for each solve, whether it has such a row. Otherwise the cotangent
          is zero.

        **Returns:** cotangents of the constants of the function, and of `args`.
        """
        recording, which = self.recording, self.which
        _, *functions = recording.plan.saves[which]
        # The caller asks only for functions that exist.
        pure: Any = functions[kind]
        value, pull = pure.pullback(
            recording.batch,
            recording.inputs.save_constants[which][kind],
            recording.axes.save_constants[which][kind],
            recording.wrt.save_constants[which][kind],
            args,
            spec,
        )
        # The row of a solve that is not active may be -1. Its cotangent is masked.
        read = recording.batch.map(take)
        ct = filled_like(read(self.ct.saved[which].ys, jnp.maximum(row, 0)), value)
        return pull(where(active, ct, zeros_like(ct)))

    def time(
        self, row: Int[Array, "..."], active: Bool[Array, "..."]
    ) -> Real[Array, "..."]:
        """Returns the cotangent of the time in `row` of `Solution.ts`, or zero."""
        ct_ts = self.ct.saved[self.which].ts
        if ct_ts is None:
            return jnp.zeros(active.shape, self.recording.inputs.first_start.dtype)
        ct = self.recording.batch.map(take)(ct_ts, jnp.maximum(row, 0))
        return jnp.where(active, ct, 0)


def _pull_back_steps(
    rows: _Rows, carry: SaveCarry, cts: StepCotangents, step: BackwardStep, y1: PyTree
) -> tuple[SaveCarry, StepCotangents]:
    """Pulls back `SaveAt(steps=n)`: every `n`-th accepted step saved its end."""
    recording = rows.recording
    every = recording.plan.saves[rows.which].steps

    def pulled(
        carry__cts: tuple[SaveCarry, StepCotangents],
    ) -> tuple[SaveCarry, StepCotangents]:
        carry, cts = carry__cts
        # The cursor counts the rows written up to the end of this step, so the row of
        # this step is the last of them.
        row = carry.cursor.row - jnp.where(step.active, 1, 0)
        args, spec = (step.times.end, y1), (recording.wrt_times, inexact_spec(y1))
        ct_consts, (ct_t, ct_y1) = rows.pull(0, args, spec, row, step.active)
        # The end of the step is an argument of the row, and is also saved as its time.
        if recording.wrt_times:
            ct_t = ct_t + rows.time(row, step.active)
        cts = replace(cts, y1=add(cts.y1, ct_y1), end=_add_known(cts.end, ct_t))
        cursor = Cursor(carry.cursor.ts_index, row)
        at_end = add(carry.at_end, ct_consts)
        return replace(carry, cursor=cursor, at_end=at_end), cts

    if every == 1:
        return pulled((carry, cts))
    # A branch: where nothing was saved, `fn` may have a derivative of NaN.
    saved = (step.index + 1) % every == 0
    return jax.lax.cond(saved, pulled, lambda carry__cts: carry__cts, (carry, cts))


def _pull_back_ts(
    rows: _Rows, carry: SaveCarry, cts: StepCotangents, step: BackwardStep, info: PyTree
) -> tuple[SaveCarry, StepCotangents]:
    """Pulls back `SaveAt(ts=...)`: the step saved the times in `(previous end, end]`.

    The solves of a batch may have saved different numbers of times in this step. The
    loop takes one time per solve and iteration, and ends when no solve has any left.
    """
    recording, times = rows.recording, step.times
    batch, (ts, ts_axes) = recording.batch, rows.ts
    num_ts = ts.shape[-1]
    wrt_ts, wrt_times = recording.wrt.ts[rows.which], recording.wrt_times
    spec = (wrt_ts, wrt_times, wrt_times, inexact_spec(info))
    # The times may be shared by solves; each solve reads its own position.
    time_at = batch.map_shared(lambda ts, index: ts[index], ts, ts_axes)
    previous_end = recording.steps.end(step.index - 1)

    def is_inside(state: tuple[SaveCarry, StepCotangents]) -> Bool[Array, "..."]:
        """Returns, for each solve, whether this step saved the next time down."""
        ts_index = state[0].cursor.ts_index
        t = time_at(jnp.maximum(ts_index - 1, 0))
        # The first step saved every time up to its end, also `t0` itself.
        inside = (step.index == 0) | (t > previous_end)
        return step.active & (ts_index > 0) & inside

    def body(
        state: tuple[SaveCarry, StepCotangents],
    ) -> tuple[SaveCarry, StepCotangents]:
        inside = is_inside(state)
        carry, cts = state
        # Only the cursors of solves that are inside move. The others add zeros.
        one = jnp.where(inside, 1, 0)
        ts_index, row = carry.cursor.ts_index - one, carry.cursor.row - one
        # Others evaluate the end of their step: extrapolated far away from it, `fn` may
        # have a derivative of NaN, and 0 * NaN is NaN.
        t = time_at(jnp.minimum(ts_index, num_ts - 1))
        t = jnp.where(inside, t, times.end)
        ct_consts, ct_args = rows.pull(
            1, (t, times.start, times.end, info), spec, row, inside
        )
        ct_t, ct_start, ct_end, ct_info = ct_args
        ct_ts = carry.ts
        if wrt_ts:
            # `ct_t` is the derivative of the interpolation. The time itself was saved
            # as well, in `Solution.ts`.
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
    """Returns `total + part`. Leaves of `part` may be `None`, which stands for zero."""
    return jax.tree.map(
        lambda x, p: x if p is None else x + p,
        total,
        part,
        is_leaf=lambda x: x is None,
    )
