"""Pulling back what a solve saved, one step at a time and backwards.

An output row was written by the step that covers its time, in order; so walking back,
each save needs only a cursor that moves down its rows (`SaveAt(steps=n)`) and down its
times (`SaveAt(ts=...)`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._tree import add, each, filled_like, where, zeros_like


class Save(eqx.Module):
    """One `diffrax.SubSaveAt`, as far as it saves during the loop."""

    ts: Array | None
    steps: int = eqx.field(static=True)
    fn: Callable


class StepCotangents(eqx.Module):
    """Cotangents of what one step hands out: its result, dense information, times."""

    y1: PyTree
    info: PyTree
    start: Array
    end: Array


class Cursor(eqx.Module):
    """How many times and how many rows of a save are left."""

    ts_index: Array
    row: Array


def save_states(state: PyTree) -> list[Any]:
    """The `SaveState`s of a loop state (or of its cotangent), in order."""
    is_save = lambda x: hasattr(x, "save_index")
    leaves = jax.tree.leaves(state.save_state, is_leaf=is_save)
    return [x for x in leaves if is_save(x)]


def initial_cursors(final_state: PyTree) -> list[Cursor]:
    """Every save at its end."""
    saves = save_states(final_state)
    return [Cursor(s.saveat_ts_index, s.save_index) for s in saves]


def pull_back_saves(sweep, carry, cts: StepCotangents, index, live, args, y1, info):
    """Adds to `cts` and to the `carry` of `sweep` what step `index` saved.

    `args` are the step's arguments, `y1` and `info` its results; `live` marks the lanes
    whose step this is. Returns the new `(carry, cts)`.
    """
    start, end, _, _ = args
    cts = _pull_back_dense(sweep, cts, index)
    for which, save in enumerate(sweep.solve.saves):
        if not _is_used(sweep, which):
            continue
        if save.steps:
            carry, cts = _pull_back_steps(
                sweep, which, carry, cts, index, live, end, y1
            )
        if save.ts is not None:
            carry, cts = _pull_back_ts(
                sweep, which, carry, cts, index, live, args, info
            )
    return carry, cts


def _is_used(sweep, which: int) -> bool:
    ct = save_states(sweep.ct_state)[which]
    return len(jax.tree.leaves((ct.ts, ct.ys))) > 0


def _pull_back_dense(sweep, cts: StepCotangents, index) -> StepCotangents:
    """What dense output and events ask of the step."""
    ct, row = sweep.ct_state, each(sweep.lanes, lambda tree, i: _row(tree, i))
    info, start, end = cts.info, cts.start, cts.end
    if sweep.solve.dense:
        info = _add_known(info, row(ct.dense_infos, index))
        end = _add_known(end, row(ct.dense_ts, index + 1))
    if sweep.solve.event:
        last = index == sweep.record.num_steps - 1
        only_last = lambda tree: jax.tree.map(lambda x: jnp.where(last, x, 0), tree)
        info = _add_known(info, only_last(ct.event_dense_info))
        start = _add_known(start, only_last(ct.event_tprev))
        end = _add_known(end, only_last(ct.event_tnext))
    return replace(cts, info=info, start=start, end=end)


def _pull_back_steps(sweep, which, carry, cts, index, live, end, y1):
    """`SaveAt(steps=n)`: every `n`-th accepted step saved its end."""
    saved = ((index + 1) % sweep.solve.saves[which].steps == 0) & live
    row = carry.cursors[which].row - jnp.where(saved, 1, 0)
    args, spec = (end, y1), (sweep.wrt_times, _inexact(y1))
    ct_consts, (ct_t, ct_y1) = _pull_back_row(sweep, which, 0, args, spec, row, saved)
    if sweep.wrt_times:
        ct_t = ct_t + _row_time(sweep, which, row, saved)
    cts = replace(cts, y1=add(cts.y1, ct_y1), end=_add_known(cts.end, ct_t))
    consts = add(carry.save_consts[which][0], ct_consts)
    return replace(
        carry,
        cursors=_with(carry.cursors, which, replace(carry.cursors[which], row=row)),
        save_consts=_with(
            carry.save_consts, which, [consts, carry.save_consts[which][1]]
        ),
    ), cts


def _pull_back_ts(sweep, which, carry, cts, index, live, step_args, info):
    """`SaveAt(ts=...)`: the times in `(end of the step before, end]`."""
    ts, wrt_ts = sweep.inputs.ts[which], sweep.wrt.ts[which]
    start, end, _, _ = step_args
    end_before = lambda record, index: record.end(sweep.inputs.grid, index - 1)
    previous_end = each(sweep.lanes, end_before)(sweep.record, index)
    spec = (wrt_ts, sweep.wrt_times, sweep.wrt_times, _inexact(info))

    def is_inside(state):
        cursor, *_ = state
        t = ts[jnp.maximum(cursor.ts_index - 1, 0)]
        return live & (cursor.ts_index > 0) & ((index == 0) | (t > previous_end))

    def body(state):
        inside = is_inside(state)
        cursor, consts, ct_ts, cts = state
        one = jnp.where(inside, 1, 0)
        ts_index, row = cursor.ts_index - one, cursor.row - one
        args = ts[jnp.minimum(ts_index, len(ts) - 1)], start, end, info
        ct_consts, ct_args = _pull_back_row(sweep, which, 1, args, spec, row, inside)
        ct_t, ct_start, ct_end, ct_info = ct_args
        if wrt_ts:
            ct_t = ct_t + _row_time(sweep, which, row, inside)
            add_at = each(sweep.lanes, lambda cts, i, ct: cts.at[i].add(ct))
            ct_ts = add_at(ct_ts, ts_index, ct_t)
        cts = replace(
            cts,
            info=add(cts.info, ct_info),
            start=_add_known(cts.start, ct_start),
            end=_add_known(cts.end, ct_end),
        )
        return Cursor(ts_index, row), add(consts, ct_consts), ct_ts, cts

    at_steps, inside = carry.save_consts[which]
    state = carry.cursors[which], inside, carry.ts[which], cts
    cursor, inside, ct_ts, cts = sweep.while_loop(is_inside, body, state)
    return replace(
        carry,
        cursors=_with(carry.cursors, which, cursor),
        save_consts=_with(carry.save_consts, which, [at_steps, inside]),
        ts=_with(carry.ts, which, ct_ts),
    ), cts


def _pull_back_row(sweep, which, kind, args, spec, row, live):
    """Pulls the cotangent of output row `row` back to what it was computed from.

    `kind` is 0 for a row saved at the end of a step, 1 for one saved inside it. Where
    not `live` the cotangent is zero.
    """
    consts = sweep.inputs.save_consts[which][kind]
    wrt_consts = sweep.wrt.save_consts[which][kind]
    value, pull = sweep.pullback(
        sweep.pure_saves[which][kind], consts, wrt_consts, args, spec
    )
    ct_ys = save_states(sweep.ct_state)[which].ys
    ct = filled_like(each(sweep.lanes, _row)(ct_ys, jnp.maximum(row, 0)), value)
    return pull(where(live, ct, zeros_like(ct)))


def _row_time(sweep, which, row, live):
    """The cotangent of the time saved in `row`."""
    ct_ts = save_states(sweep.ct_state)[which].ts
    if ct_ts is None:
        return jnp.zeros_like(sweep.final_state.tprev)
    ct = each(sweep.lanes, _row)(ct_ts, jnp.maximum(row, 0))
    return jnp.where(live, ct, 0)


def _with(items: list, which: int, item: Any) -> list:
    return [*items[:which], item, *items[which + 1 :]]


def _row(tree: PyTree, row) -> PyTree:
    return jax.tree.map(lambda x: x[row], tree)


def _inexact(tree: PyTree) -> PyTree[bool]:
    return jax.tree.map(eqx.is_inexact_array, tree)


def _add_known(total: PyTree, part: PyTree) -> PyTree:
    """`total + part`, where `part` may lack leaves that are zero."""
    return jax.tree.map(
        lambda x, p: x if p is None else x + p,
        total,
        part,
        is_leaf=lambda x: x is None,
    )
