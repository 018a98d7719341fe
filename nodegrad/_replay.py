"""Walking back through a solve by stepping again from the states that were stored.

The state before a step comes from its slot (`_checkpoints.py`) or, where the slots were
too few, by stepping again from the nearest one before it, into a segment of rows.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ._tree import each, put, take


def replay_back(sweep: Any, carry: Any) -> Any:
    """Pulls `carry` back through every step of a solve, last to first."""
    checkpoints, num_steps = sweep.solve.memory, sweep.record.num_steps
    rows, zero = sweep.record.rows, jnp.zeros_like(num_steps)
    if checkpoints.max_level == 0:
        return _reverse(sweep, carry, rows, zero, num_steps, zero)
    level = checkpoints.level(jnp.maximum(num_steps - 1, 0))

    def segment(stop__rows__carry):
        stop, rows, carry = stop__rows__carry
        start = ((jnp.maximum(stop, 1) - 1) >> level) << level
        start = jnp.where(level == 0, 0, start)
        rows = _step_again(sweep, rows, start, stop, level)
        return start, rows, _reverse(sweep, carry, rows, start, stop, level)

    *_, carry = sweep.while_loop(
        lambda c: c[0] > 0, segment, (num_steps, rows, carry), lambda c: c[1]
    )
    return carry


def _step_again(sweep, rows, start, stop, level):
    """Fills the segment with the states before steps `start, ..., stop - 1`."""
    checkpoints = sweep.solve.memory
    segment, nowhere = checkpoints.slots, checkpoints.rows
    write = each(sweep.lanes, put)
    is_live = lambda index: (index < stop - 1) & (level > 0)

    def replay(args):
        y1, kept, _ = sweep.pure_step(sweep.inputs.step_consts, *args)
        return y1, eqx.filter(kept, eqx.is_array)

    def body(index__rows):
        index, rows = index__rows
        live = is_live(index)
        from_row = sweep.idle_at_zero(live, segment + index - start)
        args = _step_args(sweep, rows, sweep.idle_at_zero(live, index), from_row)
        to_row = segment + index + 1 - start
        to_row = jnp.where(live, to_row, nowhere) if sweep.lanes else to_row
        return index + 1, write(rows, to_row, each(sweep.lanes, replay)(args))

    first = each(sweep.lanes, take)(rows, checkpoints.slot(start, level))
    rows = write(rows, jnp.full_like(start, segment), first)
    _, rows = sweep.while_loop(
        lambda c: is_live(c[0]), body, (start, rows), lambda c: c[1]
    )
    return rows


def _reverse(sweep, carry, rows, start, stop, level):
    """Pulls back through steps `stop - 1, ..., start`."""
    segment = sweep.solve.memory.slots
    is_live = lambda index: index >= start
    consts, wrt_consts = sweep.inputs.step_consts, sweep.wrt.step_consts

    def body(index__carry):
        index, carry = index__carry
        live = is_live(index)
        row = jnp.where(level == 0, index, segment + index - start)
        at, row = sweep.idle_at_zero(live, index), sweep.idle_at_zero(live, row)
        args = _step_args(sweep, rows, at, row)
        spec = sweep.step_spec(args)
        linearized = sweep.pullback(sweep.pure_step, consts, wrt_consts, args, spec)
        return index - 1, sweep.pull_back_step(carry, at, live, args, *linearized)

    _, carry = sweep.while_loop(lambda c: is_live(c[0]), body, (stop - 1, carry))
    return carry


def _step_args(sweep, rows, index, row):
    """`(start, end, y, kept)` of step `index`."""
    grid = sweep.inputs.grid

    def read(record, rows, index, row):
        y, kept = take(rows, row)
        # A replay knows nothing of the jumps of the steps after it.
        kept = sweep.solve.step.kept_at(kept, record.made_jump(index))
        return record.start(grid, index), record.end(grid, index), y, kept

    return each(sweep.lanes, read)(sweep.record, rows, index, row)
