r"""The one reverse sweep: a pullback through every accepted step, last to first.

With $\Phi_i$ the map of accepted step $i$, from $y_i$ over $[s_i, e_i]$ to $y_{i+1}$
and to the information $d_i$ that dense output interpolates, the sweep is the recursion

$$(\lambda_{y_i}, \lambda_{s_i}, \lambda_{e_i}, \Delta\lambda_\theta)
  = \Phi_i^* (\lambda_{y_{i+1}}, \lambda_{d_i}),$$

where $\lambda_{d_i}$ collects whatever was saved from inside the step (`_save.py`) and
$\theta$ is everything the step closes over: `args`, the terms, closures. Cotangents of
times go through `_grid.pull_back_times`. A cotangent is named `ct_...` throughout.

The state before a step comes from the checkpoints (`_checkpoints.py`): from its slot
or, where the slots were too few, by stepping again from the nearest one before it.

All this is for one solve or, with `solve.lanes`, for a batch of them at once, each at a
step of its own. Then $\lambda_\theta$ is summed over the batch inside every pullback;
lanes that have no step left ride along on their first step with zero cotangents.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._grid import pull_back_times
from ._save import initial_cursors, pull_back_saves, StepCotangents
from ._tree import add, each, filled_like, where, zeros_like


class SweepInputs(eqx.Module):
    """Everything a gradient may be taken with respect to; also its cotangents."""

    init_state: PyTree
    step_consts: list[Any]
    save_consts: list[Any]
    grid: Any
    ts: list[Any]


class Carry(eqx.Module):
    """The cotangents that the sweep carries from step to step.

    `y` and `kept` are those of the state and solver state after the step, `start` and
    `size` those of the next step's, see `_grid.pull_back_times`. `step_consts` and
    `save_consts` are shared by all lanes. `cursors` say how much of each save is left.
    """

    y: PyTree
    kept: PyTree
    start: Array
    size: Array
    anchors: Array
    ts: list[Any]
    cursors: list[Any]
    step_consts: PyTree
    save_consts: PyTree


class Sweep(eqx.Module):
    """A recorded solve, ready to be swept back through.

    - `solve`, `record`: what was solved and what the forward pass wrote down of it.
    - `pure_step`, `pure_saves`: the replayed step and the save functions, as pure
      functions of constants that are part of `inputs`.
    - `final_state`, `ct_state`: the final loop state and its cotangent; `None` where
      that is known to be zero.
    - `inputs`, `wrt`: what to differentiate with respect to, and for each leaf of it
      whether anybody asked.
    """

    solve: Any
    record: Any
    pure_step: Callable = eqx.field(static=True)
    pure_saves: list[Any] = eqx.field(static=True)
    final_state: PyTree
    ct_state: PyTree
    inputs: SweepInputs
    wrt: SweepInputs = eqx.field(static=True)

    @property
    def lanes(self) -> bool:
        """Whether this is a batch of solves."""
        return self.solve.lanes

    @property
    def wrt_times(self) -> bool:
        """Whether any time that the grid hangs on is differentiated."""
        state = self.wrt.init_state
        return bool(state.tprev or state.tnext or self.wrt.grid.anchors)

    def __call__(self) -> SweepInputs:
        """The cotangents of `inputs`."""
        checkpoints, num_steps = self.solve.checkpoints, self.record.num_steps
        if self.lanes:
            self = replace(self, record=self.record.with_safe_first_step())
        rows, carry = self.record.rows, self._initial()
        zero = jnp.zeros_like(num_steps)
        if checkpoints.max_level == 0:
            return self._finish(self._reverse(carry, rows, zero, num_steps, zero))
        level = checkpoints.level(jnp.maximum(num_steps - 1, 0))

        def segment(stop__rows__carry):
            stop, rows, carry = stop__rows__carry
            start = ((jnp.maximum(stop, 1) - 1) >> level) << level
            start = jnp.where(level == 0, 0, start)
            rows = self._step_again(rows, start, stop, level)
            return start, rows, self._reverse(carry, rows, start, stop, level)

        *_, carry = self.while_loop(
            lambda c: c[0] > 0, segment, (num_steps, rows, carry), lambda c: c[1]
        )
        return self._finish(carry)

    def _step_again(self, rows, start, stop, level):
        """Fills the segment with the states before steps `start, ..., stop - 1`."""
        checkpoints = self.solve.checkpoints
        segment, nowhere = checkpoints.slots, checkpoints.rows
        is_live = lambda index: (index < stop - 1) & (level > 0)

        def body(index__rows):
            index, rows = index__rows
            live = is_live(index)
            from_row = self.idle_at_zero(live, segment + index - start)
            args = self._step_args(rows, self.idle_at_zero(live, index), from_row)
            mapped = jax.vmap(self._replay) if self.lanes else self._replay
            to_row = segment + index + 1 - start
            to_row = jnp.where(live, to_row, nowhere) if self.lanes else to_row
            return index + 1, self._write(rows, to_row, mapped(args))

        slot = checkpoints.slot(start, level)
        first = each(self.lanes, take)(rows, slot)
        rows = self._write(rows, jnp.full_like(start, segment), first)
        _, rows = self.while_loop(
            lambda c: is_live(c[0]), body, (start, rows), lambda c: c[1]
        )
        return rows

    def _reverse(self, carry, rows, start, stop, level):
        """Pulls back through steps `stop - 1, ..., start`."""
        segment = self.solve.checkpoints.slots
        is_live = lambda index: index >= start

        def body(index__carry):
            index, carry = index__carry
            live = is_live(index)
            row = jnp.where(level == 0, index, segment + index - start)
            at, row = self.idle_at_zero(live, index), self.idle_at_zero(live, row)
            args = self._step_args(rows, at, row)
            return index - 1, self._pull_back_step(carry, at, args, live)

        _, carry = self.while_loop(lambda c: is_live(c[0]), body, (stop - 1, carry))
        return carry

    def _step_args(self, rows, index, row):
        """`(start, end, y, kept)` of step `index`."""

        def read(record, rows, index, row):
            return record.start(index), record.end(index), *take(rows, row)

        return each(self.lanes, read)(self.record, rows, index, row)

    def _replay(self, args):
        y1, kept, _ = self.pure_step(self.inputs.step_consts, *args)
        return y1, eqx.filter(kept, eqx.is_array)

    def _write(self, rows, row, stored):
        def write(rows, row, stored):
            return jax.tree.map(
                lambda buffer, x: buffer.at[row].set(x), rows, stored, is_leaf=is_buffer
            )

        return each(self.lanes, write)(rows, row, stored)

    def _pull_back_step(self, carry, index, args, live) -> Carry:
        spec = (self.wrt_times, self.wrt_times, *inexact_spec(args[2:]))
        (y1, _, info), pull = self.pullback(
            self.pure_step, self.inputs.step_consts, self.wrt.step_consts, args, spec
        )
        zero = jnp.zeros_like(args[0])
        cts = StepCotangents(y1=carry.y, info=zeros_like(info), start=zero, end=zero)
        new, cts = pull_back_saves(self, carry, cts, index, live, args, y1, info)
        cts = self.only(live, cts)
        ct_consts, ct_args = pull((cts.y1, self.only(live, carry.kept), cts.info))
        ct_start, ct_end, ct_y, ct_kept = ct_args
        step_consts = add(carry.step_consts, ct_consts)
        new = replace(new, y=ct_y, kept=ct_kept, step_consts=step_consts)
        if self.wrt_times:
            start, end = cts.start + ct_start, cts.end + ct_end
            new = self._pull_back_times(new, index, start, end)
        return self._frozen(live, carry, new)

    def _pull_back_times(self, carry, index, ct_start, ct_end) -> Carry:
        grid = self.inputs.grid

        def pull(record, index, ct_anchors, *cts):
            return pull_back_times(
                grid,
                ct_anchors,
                record.origin(grid, index),
                record.start(index),
                record.end(index),
                record.previous_size(index),
                cts,
            )

        anchors, start, size = each(self.lanes, pull)(
            self.record, index, carry.anchors, ct_start, ct_end, carry.start, carry.size
        )
        return replace(carry, anchors=anchors, start=start, size=size)

    def _initial(self) -> Carry:
        state, ct_state = self.final_state, self.ct_state
        kept = self.solve.step.kept(state.solver_state, state.made_jump)
        ct_kept = self.solve.step.kept(ct_state.solver_state, None)
        zero = jnp.zeros_like(state.tprev)
        per_lane = lambda x: jnp.zeros(zero.shape + x.shape, x.dtype)
        wanted = lambda consts, wrt: zeros_like(eqx.filter(consts, wrt))
        return Carry(
            y=filled_like(ct_state.y, state.y),
            kept=filled_like(ct_kept, kept),
            start=zero,
            size=zero,
            anchors=per_lane(self.inputs.grid.anchors),
            ts=jax.tree.map(per_lane, self.inputs.ts),
            cursors=initial_cursors(state),
            step_consts=wanted(self.inputs.step_consts, self.wrt.step_consts),
            save_consts=wanted(self.inputs.save_consts, self.wrt.save_consts),
        )

    def _finish(self, carry: Carry) -> SweepInputs:
        none = lambda tree: jax.tree.map(lambda _: None, tree)
        over_lanes = lambda x: jnp.sum(x, axis=0) if self.lanes else x
        ct_init, ct_grid = none(self.inputs.init_state), none(self.inputs.grid)
        # Rows saved before the loop hold their cotangents still; the others were
        # constants there.
        saved = {
            name: getattr(self.ct_state, name) for name in ("save_state", "dense_ts")
        }
        ct_init = replace(ct_init, y=carry.y, **saved)
        if self.wrt_times:
            times = dict(tprev=carry.start - carry.size, tnext=carry.size)
            ct_init = replace(ct_init, **times)
            ct_grid = replace(ct_grid, anchors=over_lanes(carry.anchors))
        if carry.kept is not None:
            solver_state, _ = carry.kept
            ct_init = replace(ct_init, solver_state=solver_state)
        return SweepInputs(
            init_state=ct_init,
            step_consts=carry.step_consts,
            save_consts=carry.save_consts,
            grid=ct_grid,
            ts=jax.tree.map(over_lanes, carry.ts),
        )

    # One solve or many.

    def pullback(self, pure, consts, wrt_consts, args, spec):
        """`pure(consts, *args)` and its pullback to `(consts, args)`.

        Only what `wrt_consts` and `spec` mark is differentiated; over lanes the
        cotangents of `consts` are summed.
        """
        consts, fixed_consts = eqx.partition(consts, wrt_consts)
        args, fixed_args = eqx.partition(args, spec)

        def fn(consts, args, fixed_args):
            consts = eqx.combine(consts, fixed_consts)
            out = pure(consts, *eqx.combine(args, fixed_args))
            return eqx.filter(out, eqx.is_inexact_array)

        mapped = jax.vmap(fn, in_axes=(None, 0, 0)) if self.lanes else fn
        return jax.vjp(lambda c, a: mapped(c, a, fixed_args), consts, args)

    def while_loop(self, is_live, body, init, buffers=None):
        """Runs `body` while any lane is live."""
        if not self.lanes:
            return eqxi.while_loop(is_live, body, init, buffers=buffers, kind="lax")
        return jax.lax.while_loop(lambda c: jnp.any(is_live(c)), body, init)

    def idle_at_zero(self, live, index):
        """`index`, but 0 for lanes that have nothing left to do."""
        return jnp.where(live, index, 0) if self.lanes else index

    def only(self, live, cts: PyTree) -> PyTree:
        """`cts`, but zero for lanes that have nothing left to do."""
        return where(live, cts, zeros_like(cts)) if self.lanes else cts

    def _frozen(self, live, old: Carry, new: Carry) -> Carry:
        """`new`, but what belongs to idle lanes stays as it was."""
        if not self.lanes:
            return new
        shared = dict(step_consts=new.step_consts, save_consts=new.save_consts)
        unshared = dict(step_consts=None, save_consts=None)
        frozen = where(live, replace(new, **unshared), replace(old, **unshared))
        return replace(frozen, **shared)


def is_buffer(x: Any) -> bool:
    """Whether `x` is an array or a loop buffer."""
    return hasattr(x, "at")


def take(tree: PyTree, row) -> PyTree:
    """Row `row` of every array of `tree`."""
    return jax.tree.map(lambda x: x[row], tree, is_leaf=is_buffer)


def inexact_spec(tree: PyTree) -> PyTree[bool]:
    """Which leaves of `tree` are inexact arrays."""
    return jax.tree.map(eqx.is_inexact_array, tree)
