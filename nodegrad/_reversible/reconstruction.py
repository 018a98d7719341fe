"""Reconstructs the states of a reversible solver by undoing its steps.

The backward loop carries the state after a step, undoes the step, and passes the state
before it to the visitor. If the visitor linearises the step, the evaluations of the
inverse are linearised, and no further ones are made (see `invertible_step.py`).

The state before every resync is stored, and so is the start of the solve. There, the
reconstructed state is compared with the stored one, and replaced by it. The largest
difference, relative to the state, is the *reconstruction error*. A gradient is refused
if this error is large.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.norms import magnitudes, relative_size, size
from .._internal.tree import take, where, zeros_like
from .._trajectory.linearized_calls import LinearizedCalls
from .._trajectory.state_source import (
    AbstractStateSource,
    BackwardStep,
    C,
    Evaluate,
    RecordedSteps,
)
from .._trajectory.step_times import AbstractGrid, StepTimes
from .invertible_step import AbstractInvertibleStep, is_regular_resync, Resync


# A gradient is refused if a reconstructed state differs from a stored one by more than
# this, relative to the stored one. A larger bound admits less accurate gradients.
# Without it, a gradient in tests/reversible/test_reversible_adjoint.py (that of a small
# component beside a large one) is wrong.
_MAX_ERROR = 1e-3
# A difference of up to this many units of rounding of the largest state is accepted,
# also if the stored state is small or zero.
_MAX_ROUNDING = 1e3
# An entry near zero is compared with at least this fraction of the largest value it has
# had so far. Without this bound, or without the previous one, the gradient of the solve
# from rest in tests/reversible/test_reversible_adjoint.py is refused.
_USUAL = 0.1

_UNTRUSTED = (
    "A state that `nodegrad.ReversibleAdjoint` reconstructed differs from the stored "
    f"one by more than a relative {_MAX_ERROR}: rounding errors have grown in the "
    "backward pass (or those of an inverse that is not exact), and the gradient would "
    "be wrong. Pass `resync_every=10` or so to the solver; take fewer steps or a "
    "`coupling_parameter` closer to one (if the inverse is not exact, smaller steps); "
    "or use `nodegrad.ACAAdjoint()`."
)

_LOST = (
    "A gradient was requested of a solve that ended before `t1`, because the copies of "
    "the solution diverged. Pass `resync_every=10` or so to the solver; or, for the "
    "gradient of the part that was solved, pass `throw=False` to the solve."
)


class Resyncs(eqx.Module):
    """The layout of the stored states: one row for the state before each resync.

    First come the rows of regular resyncs, then those of resyncs at jumps, then one row
    that is never read. It takes the states of steps without a resync.

    - `every`: resync regularly after this many steps; `None` for no regular resyncs.
    - `jumps`: the number of rows for jumps.
    - `first_jump`: whether the first step may start at a jump.
    - `max_steps`: the largest number of steps.

    The methods take the index of a step in this solve, and `step_offset`, the number of
    steps before this solve if it continues another one. Resyncs count both.
    """

    every: int | None = eqx.field(static=True)
    jumps: int = eqx.field(static=True)
    first_jump: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @property
    def regular(self) -> int:
        """The number of rows for regular resyncs."""
        # Row 0 is for a resync in the first step, if this solve continues another one.
        return 0 if self.every is None else (self.max_steps - 1) // self.every + 2

    @property
    def rows(self) -> int:
        """The number of rows to allocate; 0 if there are no resyncs."""
        rows = self.regular + self.jumps
        return rows + 1 if rows else 0

    def is_resync(
        self,
        index: Int[Array, "..."],
        step_offset: Int[Array, "..."],
        made_jump: Bool[Array, "..."],
    ) -> Resync:
        """Returns whether step `index` begins with a resync.

        It is the literal `False` for a solve without resyncs.
        """
        resync = is_regular_resync(self.every, index + step_offset)
        return resync | made_jump if self.jumps or self.first_jump else resync

    def is_at_jump(self, made_jump: Bool[Array, "..."]) -> Resync:
        """Returns whether a step begins with a resync because of a jump."""
        return made_jump if self.jumps or self.first_jump else False

    def row_to_write(
        self,
        index: Int[Array, ""],
        step_offset: Int[Array, ""],
        start: Real[Array, ""],
        made_jump: Bool[Array, ""],
        grid: AbstractGrid,
    ) -> Int[Array, ""]:
        """Returns the row of the state before step `index`, or the row never read."""
        row = jnp.full_like(index, self.rows - 1)
        if self.jumps:
            # A jump is at an anchor. Between two anchors there is at most one jump, so
            # the number of anchors passed tells jumps apart.
            passed = jnp.sum(grid.anchors <= start, dtype=row.dtype)
            row = jnp.where(made_jump, self.regular + passed, row)
        if self.every is not None:
            # Resyncs are counted from the first step of all, rows from this solve's.
            regular = (index + step_offset) // self.every - step_offset // self.every
            is_regular = is_regular_resync(self.every, index + step_offset)
            row = jnp.where(is_regular, regular, row)
        return row


class _Walk(eqx.Module):
    """What the backward loop carries in addition to the values of the visitor.

    - `y`, `replay_state`: the state after the step to undo next.
    - `peak`: for each component of `y`, the largest absolute value met so far.
    - `error`: for each solve, the largest reconstruction error so far.
    """

    y: PyTree[Array]
    replay_state: PyTree[Array]
    peak: PyTree[Array]
    error: Real[Array, "..."]


class ReconstructedStates(AbstractStateSource):
    """The state source that undoes the steps, from the final state on.

    - `invertible_step`: the step and its inverse.
    - `resyncs`: where the states before resyncs are stored.
    """

    invertible_step: AbstractInvertibleStep
    resyncs: Resyncs

    @property
    def rows(self) -> int:
        return self.resyncs.rows

    def row_to_write(
        self,
        index: Int[Array, ""],
        step_offset: Int[Array, ""],
        start: Real[Array, ""],
        made_jump: Bool[Array, ""],
        grid: AbstractGrid,
    ) -> Int[Array, ""]:
        return self.resyncs.row_to_write(index, step_offset, start, made_jump, grid)

    def replay_state(
        self, solver_state: PyTree, made_jump: bool | Bool[Array, "..."] | None
    ) -> PyTree:
        del made_jump
        return self.invertible_step.replay_state(solver_state)

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        return self.invertible_step.with_replay_state(solver_state, replay_state)

    def parts(self) -> dict[str, Callable]:
        return self.invertible_step.parts()

    def step(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        resync = self._told(times)
        return self.invertible_step.forward(evaluate, t0, t1, y, state, resync)

    def step_and_undo(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        y1, state1, dense_info = self.step(evaluate, times, t0, t1, y, state)
        self.invertible_step.backward(evaluate, t0, t1, t0, y1, state1)
        return y1, state1, dense_info

    def _is_resync(self, times: StepTimes) -> Resync:
        """Returns whether the state before a step is stored."""
        return self.resyncs.is_resync(times.index, times.step_offset, times.made_jump)

    def _told(self, times: StepTimes) -> Resync:
        """Returns the flag that `forward` gets."""
        if self.invertible_step.told_of_regular_resyncs:
            return self._is_resync(times)
        return self.resyncs.is_at_jump(times.made_jump)

    def walk(
        self,
        steps: RecordedSteps,
        visit: Callable[[C, BackwardStep], C],
        carry: C,
        linearizes: bool,
    ) -> tuple[C, Real[Array, "..."] | None]:
        batch, trajectory = steps.batch, steps.trajectory
        num_steps = trajectory.num_steps
        # Solves without any step get the state and times of one that has steps, so that
        # the pullbacks through steps they did not take contain no NaN.
        state = steps.valid((trajectory.y, trajectory.replay_state))
        error = jnp.zeros_like(batch.map(size)(_constant(trajectory.y)))
        peak = zeros_like(magnitudes(_constant(trajectory.y)))
        last_times = steps.valid(steps.times(jnp.maximum(num_steps - 1, 0)))

        def body(
            index__walk__carry: tuple[Int[Array, ""], _Walk, C],
        ) -> tuple[Int[Array, ""], _Walk, C]:
            index, walk, carry = index__walk__carry
            # The solves of a batch undo step `index` together. A solve that took fewer
            # steps undoes its last step repeatedly, and the result is dropped.
            active = index < num_steps
            times = batch.where_active(active, steps.times(index), last_times)
            peak = magnitudes(walk.peak, _constant(walk.y))
            # Linearised calls keep the pullbacks of the inverse for `linearize`.
            evaluate = LinearizedCalls(steps, times) if linearizes else steps.evaluate
            y, state, error = self._undo(steps, evaluate, times, walk, peak)
            linearize = self._linearize(evaluate, times, y, state)
            step = BackwardStep(index, times, active, y, state, linearize)
            carry = visit(carry, step)
            error = jnp.maximum(walk.error, jnp.where(active, error, 0))
            y, state = batch.where_active(
                active, (y, state), (walk.y, walk.replay_state)
            )
            return index - 1, _Walk(y, state, peak, error), carry

        walk = _Walk(state[0], state[1], peak, error)
        init = jnp.max(num_steps) - 1, walk, carry
        _, walk, carry = batch.while_loop(lambda c: c[0] >= 0, body, init)
        return carry, walk.error

    def _undo(
        self,
        steps: RecordedSteps,
        evaluate: Evaluate,
        times: StepTimes,
        walk: _Walk,
        peak: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array], Real[Array, "..."]]:
        """Undoes a step: returns `(y, replay_state, error)` before it.

        The error is zero unless the state before the step is stored.
        """
        invertible_step = self.invertible_step
        found = invertible_step.backward(
            evaluate,
            times.start,
            times.end,
            times.previous_start,
            walk.y,
            walk.replay_state,
        )
        # Replace reconstructed states by stored ones, which are exact.
        is_known = (times.index == 0) | self._is_resync(times)
        known = self._known(steps, times)
        error = steps.batch.map(_relative_error)(
            invertible_step.checked_part(*found),
            invertible_step.checked_part(*known),
            peak,
        )
        y, state = where(is_known, known, found)
        return y, state, jnp.where(is_known, error, 0)

    def _known(
        self, steps: RecordedSteps, times: StepTimes
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Returns the stored state before a step; arbitrary if none is stored."""
        start = steps.y0, steps.replay_state0
        if self.rows == 0:
            return start

        def read(
            grid: AbstractGrid, rows: PyTree[Array], times: StepTimes
        ) -> PyTree[Array]:
            row = self.row_to_write(
                times.index, times.step_offset, times.start, times.made_jump, grid
            )
            return take(rows, row)

        read_all = steps.batch.map_shared(read, steps.grid, steps.grid_axes)
        stored = read_all(steps.trajectory.rows, times)
        return where(times.index == 0, start, stored)

    def _linearize(
        self, calls: Any, times: StepTimes, y: PyTree[Array], state: PyTree[Array]
    ) -> Callable[[], tuple[PyTree, Callable]]:
        """Returns the `linearize` of a `BackwardStep`.

        `calls` are `LinearizedCalls`. Otherwise the visitor does not call the result.
        """

        def linearize() -> tuple[PyTree, Callable]:
            resync = self._told(times)
            forward: Any = self.invertible_step.forward

            def step(evaluate: Evaluate, *args: PyTree) -> PyTree:
                return forward(evaluate, *args, resync)

            return calls.linearize(step, (times.start, times.end, y, state))

        return linearize

    def guarded(
        self,
        carry: C,
        steps: RecordedSteps,
        error: Real[Array, "..."] | None,
        throw: bool,
        nan_where: Callable[[Bool[Array, "..."], C], C],
    ) -> C:
        assert error is not None
        # An error of NaN is bad, too.
        bad = ~(error <= _MAX_ERROR)
        if throw:
            # A solve that is lost raises an error, but JAX drops it if the value of the
            # solve is not used. So raise again.
            lost = steps.trajectory.lost
            which = jnp.where(jnp.any(lost), 1, 0)
            failed = jnp.any(bad | lost)
            messages = [_UNTRUSTED, _LOST]
            # The operand of a check is moved to one device. A single boolean is the
            # operand, so that `carry` may stay sharded.
            no = jnp.array(False)
            bad = bad | eqx.branched_error_if(no, failed, which, messages)
        return nan_where(bad, carry)


def reconstruction_error(source: AbstractStateSource, steps: RecordedSteps) -> Array:
    """Returns the reconstruction error of one solve, by undoing its steps once.

    It is zero if the source stores all states that it needs, and NaN if some steps were
    not recorded.
    """
    _, error = source.walk(steps, lambda carry, _: carry, None, False)
    if error is None:
        return jnp.zeros(())
    return jnp.where(steps.trajectory.is_cut, jnp.nan, error)


def _constant(y: PyTree[Array]) -> PyTree[Array]:
    return jax.lax.stop_gradient(eqx.filter(y, eqx.is_inexact_array))


def _relative_error(
    found: PyTree[Array], known: PyTree[Array], peak: PyTree[Array]
) -> Real[Array, ""]:
    """Returns the relative error of `found`, if `known` is exact.

    It is the larger of two: the root mean square of the error, relative to that of the
    state; and the root mean square of errors that are relative entry by entry, so that
    a large component does not hide the error of a small one.
    """
    found, known = _constant(found), _constant(known)
    error = jax.tree.map(jnp.subtract, found, known)
    unit = jnp.finfo(size(error).dtype).eps
    # Relative to this, `_MAX_ROUNDING` units of rounding of the largest state are an
    # error of `_MAX_ERROR`.
    least = _MAX_ROUNDING / _MAX_ERROR * unit * size(peak)
    # A relative error of zero does not exist. A solve from rest is compared with its
    # largest values only.
    overall = size(error) / jnp.maximum(size(known), least)
    overall = jnp.where(size(known) == 0, 0, overall)
    # An entry may be zero in this one state. Compare it with its values elsewhere.
    usual = magnitudes(known, jax.tree.map(lambda x: _USUAL * x, peak))
    worst = jnp.maximum(overall, relative_size(error, usual))
    return jnp.where(size(error) == 0, 0, worst)
