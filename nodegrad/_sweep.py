r"""The one reverse sweep: a pullback through every accepted step, last to first.

With $\Phi_i$ the map of accepted step $i$, from $y_i$ over $[s_i, e_i]$ to $y_{i+1}$
and to the information $d_i$ that dense output interpolates, the sweep is the recursion

$$(\lambda_{y_i}, \lambda_{s_i}, \lambda_{e_i}, \Delta\lambda_\theta)
  = \Phi_i^* (\lambda_{y_{i+1}}, \lambda_{d_i}),$$

where $\lambda_{d_i}$ collects whatever was saved from inside the step (`_save.py`) and
$\theta$ is everything the step closes over: `args`, the terms, closures. Cotangents of
times go through `_grid.pull_back_times`. A cotangent is named `ct_...` throughout.

The states that the steps started from come from one of two sources: from checkpoints
(`_replay.py`) or by undoing the steps (`_inversion.py`). Either hands every step,
linearised, to `Sweep.pull_back_step`.

All this is for one solve or, with `solve.lanes`, for a batch of them at once, each at a
step of its own. Then $\lambda_\theta$ is summed over the batch inside every pullback;
lanes that have no step left ride along on their first step with zero cotangents.
"""

import functools as ft
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._grid import pull_back_times
from ._inversion import walk_back
from ._replay import replay_back
from ._save import initial_cursors, pull_back_saves, StepCotangents
from ._tree import add, each, filled_like, inexact_spec, where, zeros_like


class SweepInputs(eqx.Module):
    """Everything a gradient may be taken with respect to; also its cotangents."""

    init_state: PyTree
    step_consts: list[Any]
    save_consts: list[Any]
    grid: Any
    ts: list[Any]
    statistics: Any = None


class Carry(eqx.Module):
    """The cotangents that the sweep carries from step to step.

    `y` and `kept` are those of the state and solver state after the step, `start` and
    `size` those of the next step's, see `_grid.pull_back_times`. `step_consts` and
    `save_consts` are shared by all lanes. `cursors` say how much of each save is left.
    `statistics` belong to the payload, if there is one (see `_statistics.py`).
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
    statistics: PyTree = None


class Sweep(eqx.Module):
    """A recorded solve, ready to be swept back through.

    - `solve`, `record`: what was solved and what the forward pass wrote down of it.
    - `pure_step`, `pure_saves`: the replayed step and the save functions, as pure
      functions of constants that are part of `inputs`.
    - `final_state`, `ct_state`: the final loop state and its cotangent; `None` where
      that is known to be zero.
    - `inputs`, `wrt`: what to differentiate with respect to, and for each leaf of it
      whether anybody asked.
    - `payload`: what to collect on the way besides cotangents, or `None`.
    """

    solve: Any
    record: Any
    pure_step: Callable = eqx.field(static=True)
    pure_saves: list[Any] = eqx.field(static=True)
    final_state: PyTree
    ct_state: PyTree
    inputs: SweepInputs
    wrt: SweepInputs = eqx.field(static=True)
    payload: Any = None

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
        if self.lanes:
            self = replace(self, record=self.record.with_safe_first_step())
        walk = replay_back if self.solve.reversal is None else walk_back
        return self._finish(self._nan_if_failed(walk(self, self._initial())))

    def _nan_if_failed(self, carry: Carry) -> Carry:
        """`carry`, or NaNs if the solve should have raised an exception.

        JAX drops the exception if nobody looks at the value, as in `jax.jit(jax.grad)`
        of a loss that is linear in it.
        """
        if not self.solve.throw or self.solve.event:
            return carry
        return self.nan_where(~jnp.all(self.record.at_end), carry)

    def nan_where(self, failed: Array, carry: Carry) -> Carry:
        """`carry`, but NaN for lanes that `failed`, and in whatever they add to."""
        nan = lambda x: x * jnp.nan if eqx.is_inexact_array(x) else x
        per_lane = lambda x: where(failed, nan(x), x)
        shared = lambda x: where(jnp.any(failed), nan(x), x)
        return self.map_carry(per_lane, shared, carry)

    def pull_back_step(self, carry, index, live, args, outputs, pull) -> Carry:
        """The cotangents before step `index`, from those after it in `carry`.

        `args` are `(start, end, y, kept)` of the step, `outputs` are `(y1, kept, info)`
        and `pull` takes the cotangents of these to those of the constants and of
        `args`.
        """
        y1, _, info = outputs
        zero = jnp.zeros_like(args[0])
        cts = StepCotangents(y1=carry.y, info=zeros_like(info), start=zero, end=zero)
        new, cts = pull_back_saves(self, carry, cts, index, live, args, y1, info)
        cts = self.only(live, cts)
        ct_kept1 = self.only(live, carry.kept)
        ct_consts, ct_args = pull((cts.y1, ct_kept1, cts.info))
        ct_start, ct_end, ct_y, ct_kept = ct_args
        step_consts = add(carry.step_consts, ct_consts)
        new = replace(new, y=ct_y, kept=ct_kept, step_consts=step_consts)
        if self.wrt_times:
            start, end = cts.start + ct_start, cts.end + ct_end
            new = self._pull_back_times(new, index, start, end)
        if self.payload is not None:
            at_start, at_end = (ct_y, ct_kept), (cts.y1, ct_kept1)
            statistics = self.payload.visit(
                self, carry.statistics, live, args, y1, at_start, at_end
            )
            new = replace(new, statistics=statistics)
        return self._frozen(live, carry, new)

    def step_spec(self, args) -> PyTree[bool]:
        """What to differentiate a step with respect to, of its `args`."""
        return (self.wrt_times, self.wrt_times, *inexact_spec(args[2:]))

    def _pull_back_times(self, carry, index, ct_start, ct_end) -> Carry:
        grid = self.inputs.grid

        def pull(record, index, ct_anchors, *cts):
            return pull_back_times(
                grid,
                ct_anchors,
                record.origin(grid, index),
                record.start(grid, index),
                record.end(grid, index),
                record.previous_size(grid, index),
                cts,
            )

        anchors, start, size = each(self.lanes, pull)(
            self.record, index, carry.anchors, ct_start, ct_end, carry.start, carry.size
        )
        return replace(carry, anchors=anchors, start=start, size=size)

    def _initial(self) -> Carry:
        state, ct_state = self.final_state, self.ct_state
        kept = self.solve.kept(state.solver_state, state.made_jump)
        ct_kept = self.solve.kept(ct_state.solver_state, None)
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
            statistics=None if self.payload is None else self.payload.initial(self),
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
            solver_state = self._ct_solver_state(ct_init.solver_state, carry.kept)
            ct_init = replace(ct_init, solver_state=solver_state)
        return SweepInputs(
            init_state=ct_init,
            step_consts=carry.step_consts,
            save_consts=carry.save_consts,
            grid=ct_grid,
            ts=jax.tree.map(over_lanes, carry.ts),
            statistics=none(self.inputs.statistics)
            if self.payload is None
            else self.payload.finish(self, carry.statistics),
        )

    def _ct_solver_state(self, none, ct_kept):
        if self.solve.reversal is not None:
            return self.solve.reversal.with_kept(none, ct_kept)
        solver_state, _ = ct_kept
        return solver_state

    # One solve or many.

    def pullback(self, pure, consts, wrt_consts, args, spec):
        """`pure(consts, *args)` and its pullback to `(consts, args)`.

        Only what `wrt_consts` and `spec` mark is differentiated; over lanes the
        cotangents of `consts` are summed. `pure` is for one lane.
        """
        consts, fixed_consts = eqx.partition(consts, wrt_consts)
        args, fixed_args = eqx.partition(args, spec)

        def fn(consts, args, fixed_args):
            consts = eqx.combine(consts, fixed_consts)
            out = pure(consts, *eqx.combine(args, fixed_args))
            return eqx.filter(out, eqx.is_inexact_array)

        if self.lanes:
            fn = jax.vmap(fn, in_axes=(None, 0, 0))
        return jax.vjp(lambda c, a: fn(c, a, fixed_args), consts, args)

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
        return self.map_carry(ft.partial(where, live), lambda n, _: n, new, old)

    def map_carry(self, per_lane, shared, *carries: Carry) -> Carry:
        """Maps `per_lane` over what belongs to a lane, `shared` over what is summed."""
        names = "step_consts", "save_consts", "statistics"
        none = dict.fromkeys(names)
        out = jax.tree.map(per_lane, *(replace(c, **none) for c in carries))
        sums = ({name: getattr(c, name) for name in names} for c in carries)
        return replace(out, **jax.tree.map(shared, *sums))
