"""Allocates and writes the output of a native solve.

Rows are written in the order of their times, as in Diffrax: first `t0`, then during the
loop `ts` and every `steps`-th step, then `t1`. Rows that were not written hold
infinity. All functions are for one solve.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real, Shaped

from .._internal.batch import put
from .._internal.compat import unvmap_any, while_loop
from .._internal.tree import where


class SaveState(eqx.Module):
    """The output of one `diffrax.SubSaveAt` so far; the names are Diffrax's.

    - `saveat_ts_index`: how many of `SubSaveAt.ts` have been saved.
    - `ts`, `ys`: times and values, with one row for each.
    - `save_index`: how many rows have been written.

    In a tangent any field may be `None`.
    """

    saveat_ts_index: Any
    ts: Any
    ys: PyTree
    save_index: Any


def allocate(
    sub: diffrax.SubSaveAt,
    t0: Real[Array, ""],
    y0: PyTree[Array],
    args: PyTree,
    max_steps: int | None,
) -> SaveState:
    """Returns an empty output with rows for everything that `sub` may save.

    **Raises:** `ValueError` if `sub` saves every few steps and `max_steps` is `None`.
    """
    size = int(sub.t0) + (0 if sub.ts is None else len(sub.ts))
    if sub.steps:
        if max_steps is None:
            msg = (
                "`SaveAt(steps=...)` needs a bound on the steps: pass `max_steps=...`."
            )
            raise ValueError(msg)
        size += max_steps // sub.steps
    # If `steps` divides `max_steps`, `t1` needs no further row: it is either the end of
    # step `max_steps`, or there are fewer steps and one of their rows is free.
    if sub.t1 and (not sub.steps or max_steps % sub.steps):  # pyright: ignore
        size += 1
    struct = eqx.filter_eval_shape(sub.fn, t0, y0, args)
    full = lambda x: jnp.full((size, *x.shape), jnp.inf, x.dtype)
    ts = jnp.full(size, jnp.inf, t0.dtype)
    ys = jax.tree.map(full, struct)
    return SaveState(saveat_ts_index=0, ts=ts, ys=ys, save_index=0)


def write(
    state: SaveState,
    t: Real[Array, ""],
    value: PyTree[Array],
    pred: Any = True,
) -> SaveState:
    """Writes `t` and `value` to the next row if `pred`, and otherwise nothing.

    `pred` is a boolean or a scalar array. Equinox annotates it as `bool` only.
    """
    row = state.save_index
    ts, ys = put((state.ts, state.ys), row, (t, value), pred)
    return SaveState(state.saveat_ts_index, ts, ys, row + jnp.where(pred, 1, 0))


def write_step(
    state: SaveState,
    ts: Array | None,
    steps: int,
    at_end: Callable[[], tuple[Array, PyTree]],
    inside: Callable[[Array], PyTree],
    accepted: Bool[Array, ""],
    count: Int[Array, ""],
    tnext: Real[Array, ""],
) -> SaveState:
    """Writes the rows of a save that are inside a step or at its end, if `accepted`.

    - `ts`: the times of `SaveAt(ts=...)`, or `None`.
    - `steps`: a row is due after every `steps`-th step; 0 for no such rows.
    - `at_end`: returns the time and the value at the end of the step.
    - `inside`: returns the value at a time inside the step.
    - `count`: the number of accepted steps, this one included.
    - `tnext`: where the step ends.
    """
    if ts is not None:
        state = _write_ts(ts, inside, state, accepted, tnext)
    if steps:
        state = write(state, *at_end(), accepted & (count % steps == 0))
    return state


def _write_ts(
    ts: Real[Array, " ts"],
    inside: Callable[[Real[Array, ""]], PyTree[Array]],
    state: SaveState,
    accepted: Bool[Array, ""],
    tnext: Real[Array, ""],
) -> SaveState:
    """Writes the rows of all `ts` up to `tnext` that have not been written."""

    def is_inside(state: SaveState) -> Bool[Array, ""]:
        # The index is clamped: all `ts` may have been written.
        index = state.saveat_ts_index
        due = ts[jnp.minimum(index, len(ts) - 1)] <= tnext
        return accepted & (index < len(ts)) & due

    def body(state: SaveState) -> SaveState:
        t = ts[state.saveat_ts_index]
        new = write(state, t, inside(t))
        index = state.saveat_ts_index + 1
        return SaveState(index, new.ts, new.ys, new.save_index)

    return while_loop(
        is_inside,
        body,
        state,
        max_steps=len(ts),
        buffers=lambda state: (state.ts, state.ys),
        kind="lax",
    )


def write_final(
    sub: diffrax.SubSaveAt,
    state: SaveState,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    t: Real[Array, ""],
    y: PyTree[Array],
    num_accepted: Int[Array, ""],
    args: PyTree,
) -> SaveState:
    """Writes the rows that are saved after the loop, which ended at `t` with `y`."""
    if sub.ts is not None:
        # If `t0 == t1` the loop made no step. All `ts` are then equal to `t0`. It is a
        # branch, as `fn` may have no derivative at `t0`.
        num_ts = len(sub.ts)

        def filled(state: SaveState) -> SaveState:
            ys = jax.tree.map(
                lambda buffer, x: _fill(buffer, sub, x), state.ys, sub.fn(t0, y, args)
            )
            index = state.save_index + num_ts
            new = SaveState(state.saveat_ts_index, _fill(state.ts, sub, t0), ys, index)
            return where(t0 == t1, new, state)

        state = jax.lax.cond(unvmap_any(t0 == t1), filled, lambda state: state, state)
    # With `steps`, the row of `t1` may have been written after the last step.
    if sub.t1 and sub.steps != 1:
        pred = True if sub.steps == 0 else num_accepted % sub.steps != 0
        state = write(state, t, sub.fn(t, y, args), pred)
    return state


def _fill(
    buffer: Shaped[Array, "rows ..."],
    sub: diffrax.SubSaveAt,
    value: Shaped[Array, "..."],
) -> Shaped[Array, "rows ..."]:
    """Returns `buffer` with `value` in the rows of all `sub.ts`, after that of `t0`."""
    start = int(sub.t0)
    assert sub.ts is not None
    return buffer.at[start : start + len(sub.ts)].set(value)


def allocate_dense(
    struct: PyTree[jax.ShapeDtypeStruct], t0: Real[Array, ""], max_steps: int | None
) -> tuple[Real[Array, " times"], PyTree[Array]]:
    """Returns empty dense output for `max_steps` steps.

    That is the times at the ends of the steps, `max_steps + 1` with `t0`, and what
    interpolates within each step: arrays of the shapes `struct`, with a first axis of
    `max_steps` rows.

    **Raises:** `ValueError` if `max_steps` is `None`.
    """
    if max_steps is None:
        msg = "`SaveAt(dense=True)` needs a bound on the steps: pass `max_steps=...`."
        raise ValueError(msg)
    full = lambda x: jnp.full((max_steps, *x.shape), jnp.inf, x.dtype)
    ts = jnp.full(max_steps + 1, jnp.inf, t0.dtype).at[0].set(t0)
    return ts, jax.tree.map(full, struct)


def write_dense(
    ts: Any,
    infos: PyTree[Array],
    index: Int[Array, ""],
    t: Real[Array, ""],
    info: PyTree[Array],
    accepted: Any,
) -> tuple[Any, PyTree[Array]]:
    """Writes the dense output of step `index`, which ended at `t`, if `accepted`.

    `ts` and the leaves of `infos` are arrays, or buffers of a loop. `accepted` is a
    boolean or a scalar array, as `pred` of `write`.
    """
    # Row 0 of `ts` is `t0`, so the end of step `index` is row `index + 1`.
    return put(ts, index + 1, t, accepted), put(infos, index, info, accepted)
