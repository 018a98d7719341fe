"""What a native solve saves: allocating, filling and finishing its output.

Rows are written in the order of their times, like Diffrax's: first `t0`, then during
the loop `ts` and every `steps`-th step, then `t1`. Rows that were not written hold
infinity.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.compat import buffer_at_set, while_loop
from .._internal.tree import where


class SaveState(eqx.Module):
    """The output of one `diffrax.SubSaveAt` so far."""

    saveat_ts_index: Any
    ts: Any
    ys: PyTree
    save_index: Any


def allocate(sub: diffrax.SubSaveAt, t0, y0, args, max_steps: int | None) -> SaveState:
    """Room for everything that `sub` may save."""
    size = int(sub.t0) + (0 if sub.ts is None else len(sub.ts))
    if sub.steps:
        if max_steps is None:
            msg = (
                "`SaveAt(steps=...)` needs a bound on the steps: pass `max_steps=...`."
            )
            raise ValueError(msg)
        size += max_steps // sub.steps
    if sub.t1 and (not sub.steps or max_steps % sub.steps):  # pyright: ignore
        size += 1
    struct = eqx.filter_eval_shape(sub.fn, t0, y0, args)
    full = lambda x: jnp.full((size, *x.shape), jnp.inf, x.dtype)
    ts = jnp.full(size, jnp.inf, t0.dtype)
    ys = jax.tree.map(full, struct)
    return SaveState(saveat_ts_index=0, ts=ts, ys=ys, save_index=0)


def write(state: SaveState, t, value: PyTree, pred: Any = True) -> SaveState:
    """Writes the next row, where `pred`."""
    row = state.save_index
    set_row = lambda buffer, x: buffer_at_set(buffer, row, x, pred=pred)
    ys = jax.tree.map(lambda x, buffer: set_row(buffer, x), value, state.ys)
    ts = set_row(state.ts, t)
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
    """Writes what a save wants of the step to `tnext`, if that is `accepted`.

    `inside(t)` is the row of a time within the step. `at_end()` are time and row of its
    end, which is the end of step number `count`.
    """
    if ts is not None:
        state = _write_ts(ts, inside, state, accepted, tnext)
    if steps:
        state = write(state, *at_end(), accepted & (count % steps == 0))
    return state


def _write_ts(ts, inside: Callable, state: SaveState, accepted, tnext) -> SaveState:
    def is_inside(state):
        index = state.saveat_ts_index
        due = ts[jnp.minimum(index, len(ts) - 1)] <= tnext
        return accepted & (index < len(ts)) & due

    def body(state):
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
    sub: diffrax.SubSaveAt, state: SaveState, t0, t1, t, y, num_accepted, args
) -> SaveState:
    """Writes what is saved after the loop, which reached `y` at `t`."""
    if sub.ts is not None:
        # With `t0 == t1` no step was made that could have saved these.
        value = sub.fn(t0, y, args)
        ys = jax.tree.map(
            lambda buffer, x: where(t0 == t1, _fill(buffer, sub, x), buffer),
            state.ys,
            value,
        )
        ts = where(t0 == t1, _fill(state.ts, sub, t0), state.ts)
        index = state.save_index + jnp.where(t0 == t1, len(sub.ts), 0)
        state = SaveState(state.saveat_ts_index, ts, ys, index)
    if sub.t1 and sub.steps != 1:
        pred = True if sub.steps == 0 else num_accepted % sub.steps != 0
        state = write(state, t, sub.fn(t, y, args), pred)
    return state


def _fill(buffer: Array, sub: diffrax.SubSaveAt, value: Array) -> Array:
    start = int(sub.t0)
    assert sub.ts is not None
    return buffer.at[start : start + len(sub.ts)].set(value)


def allocate_dense(struct: PyTree, t0, max_steps: int | None) -> tuple[Any, PyTree]:
    """Room for the ends of `max_steps` steps and for what interpolates within them."""
    if max_steps is None:
        msg = "`SaveAt(dense=True)` needs a bound on the steps: pass `max_steps=...`."
        raise ValueError(msg)
    full = lambda x: jnp.full((max_steps, *x.shape), jnp.inf, x.dtype)
    ts = jnp.full(max_steps + 1, jnp.inf, t0.dtype).at[0].set(t0)
    return ts, jax.tree.map(full, struct)


def write_dense(ts, infos: PyTree, index, t, info: PyTree, accepted):
    """Writes what interpolates within step `index`, which led to `t`."""
    set_row = lambda buffer, x, row: buffer_at_set(buffer, row, x, pred=accepted)
    infos = jax.tree.map(lambda x, buffer: set_row(buffer, x, index), info, infos)
    return set_row(ts, t, index + 1), infos
