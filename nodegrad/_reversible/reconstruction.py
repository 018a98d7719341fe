"""States reconstructed by undoing the steps of a reversible solver.

The walk carries the state after the step that it goes back over and undoes the step. If
the visitor linearises the step, the evaluations of the inverse are the ones that are
linearised (`invertible_step.py`).

What is stored is the state before every resync, and the start of the solve. There the
reconstructed state is compared with the stored one, and then replaced by it: the
greatest difference, relative to the state, is the *reconstruction error*, which tells
whether the gradient can be trusted.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Real

from .._internal.norms import magnitudes, relative_size, size
from .._internal.tree import take, where, zeros_like
from .._trajectory.linearized_calls import LinearizedCalls
from .._trajectory.state_source import AbstractStateSource, BackwardStep, RecordedSteps
from .._trajectory.step_times import StepTimes
from .invertible_step import AbstractInvertibleStep, is_regular_resync


# A gradient is refused if the reconstruction misses a known state by more, relatively,
_MAX_ERROR = 1e-3
# ... unless that is as little as this many units of rounding of the largest state.
_MAX_ROUNDING = 1e3
# The part of its largest value that a number is taken to have at least.
_USUAL = 0.1

_UNTRUSTED = (
    "Walking back through a solve with `nodegrad.ReversibleAdjoint` missed a state "
    f"that is known by more than a relative {_MAX_ERROR}: rounding has grown on the "
    "way, and the gradient would be wrong. Pass `resync_every=10` or so to the solver, "
    "take fewer steps or a `coupling_parameter` closer to one, or use "
    "`nodegrad.ACAAdjoint()`."
)

_LOST = (
    "The solve whose gradient was asked for ended before `t1`, because its two copies "
    "had come apart. Pass `resync_every=10` or so to the solver; or, for the gradient "
    "of the part that was solved, `throw=False` to the solve."
)


class Resyncs(eqx.Module):
    """Where the states before resyncs are stored: a row for each.

    First come those of every `every` steps, then those of jumps, of which there is one
    at most between two of the grid's anchors, then a row that is never read. The solve
    may continue one of `step_offset` steps, and may start (`first_jump`) at a jump.
    """

    every: int | None = eqx.field(static=True)
    jumps: int = eqx.field(static=True)
    first_jump: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @property
    def regular(self) -> int:
        """Rows for the regular resyncs."""
        return 0 if self.every is None else (self.max_steps - 1) // self.every + 2

    @property
    def rows(self) -> int:
        """Rows to allocate; none if there are no resyncs."""
        rows = self.regular + self.jumps
        return rows + 1 if rows else 0

    def is_resync(self, index, step_offset, made_jump):
        """Whether step `index` begins with a resync; `False` where none does."""
        resync = is_regular_resync(self.every, index + step_offset)
        return resync | made_jump if self.jumps or self.first_jump else resync

    def row_to_write(self, index, step_offset, start, made_jump, grid):
        """The row of the state before step `index`, or one that is never read."""
        row = jnp.full_like(index, self.rows - 1)
        if self.jumps:
            passed = jnp.sum(grid.anchors <= start, dtype=row.dtype)
            row = jnp.where(made_jump, self.regular + passed, row)
        if self.every is not None:
            regular = (index + step_offset) // self.every - step_offset // self.every
            is_regular = is_regular_resync(self.every, index + step_offset)
            row = jnp.where(is_regular, regular, row)
        return row


class _Walk(eqx.Module):
    """Where the walk is: the state after the next step to undo.

    - `peak`: the largest absolute values met, number by number.
    - `error`: the largest reconstruction error.
    """

    y: PyTree[Array]
    replay_state: PyTree[Array]
    peak: PyTree[Array]
    error: Real[Array, "..."]


class ReconstructedStates(AbstractStateSource):
    """States found by undoing the steps, from the final state on.

    - `invertible_step`: the step and its inverse.
    - `resyncs`: where the states before resyncs are stored.
    """

    invertible_step: AbstractInvertibleStep
    resyncs: Resyncs

    @property
    def rows(self) -> int:
        return self.resyncs.rows

    def row_to_write(self, index, step_offset, start, made_jump, grid):
        return self.resyncs.row_to_write(index, step_offset, start, made_jump, grid)

    def replay_state(self, solver_state, made_jump):
        del made_jump
        return self.invertible_step.replay_state(solver_state)

    def with_replay_state(self, solver_state, replay_state):
        return self.invertible_step.with_replay_state(solver_state, replay_state)

    def parts(self):
        return self.invertible_step.parts()

    def step(self, evaluate, times, t0, t1, y, state):
        resync = self._is_resync(times)
        return self.invertible_step.forward(evaluate, t0, t1, y, state, resync)

    def _is_resync(self, times: StepTimes) -> Any:
        """Whether a step begins with a resync; `False` where none does."""
        return self.resyncs.is_resync(times.index, times.step_offset, times.made_jump)

    def walk(self, steps, visit, carry, linearizes):
        batch, trajectory = steps.batch, steps.trajectory
        num_steps = trajectory.num_steps
        state = steps.valid((trajectory.y, trajectory.replay_state))
        error = jnp.zeros_like(batch.map(size)(_constant(trajectory.y)))
        peak = zeros_like(magnitudes(_constant(trajectory.y)))
        last_times = steps.valid(steps.times(jnp.maximum(num_steps - 1, 0)))

        def body(index__walk__carry):
            index, walk, carry = index__walk__carry
            # Solves go back over step `i` together, whatever number of steps they took.
            # Those with fewer wait at their last one.
            active = index < num_steps
            times = batch.where_active(active, steps.times(index), last_times)
            peak = magnitudes(walk.peak, _constant(walk.y))
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

    def _undo(self, steps: RecordedSteps, evaluate, times, walk: _Walk, peak):
        """Undoes a step: `(y, replay_state, error)` before it."""
        invertible_step = self.invertible_step
        found = invertible_step.backward(
            evaluate,
            times.start,
            times.end,
            times.previous_start,
            walk.y,
            walk.replay_state,
        )
        is_known = (times.index == 0) | self._is_resync(times)
        known = self._known(steps, times)
        error = steps.batch.map(_relative_error)(
            invertible_step.checked_part(*found),
            invertible_step.checked_part(*known),
            peak,
        )
        y, state = where(is_known, known, found)
        return y, state, jnp.where(is_known, error, 0)

    def _known(self, steps: RecordedSteps, times: StepTimes) -> Any:
        """The state stored for a step; numbers without a meaning if none was."""
        start = steps.y0, steps.replay_state0
        if self.rows == 0:
            return start

        def read(grid, rows, times):
            row = self.row_to_write(
                times.index, times.step_offset, times.start, times.made_jump, grid
            )
            return take(rows, row)

        read_all = steps.batch.map_shared(read, steps.grid, steps.grid_axes)
        stored = read_all(steps.trajectory.rows, times)
        return where(times.index == 0, start, stored)

    def _linearize(self, calls, times: StepTimes, y, state) -> Callable:
        def linearize():
            resync = self._is_resync(times)
            forward: Any = self.invertible_step.forward
            step = lambda evaluate, *args: forward(evaluate, *args, resync)
            return calls.linearize(step, (times.start, times.end, y, state))

        return linearize

    def guarded(self, carry, steps, error, throw, nan_where):
        assert error is not None
        bad = ~(error <= _MAX_ERROR)
        if throw:
            # JAX drops the exception of the solve where its value is not used.
            lost = steps.trajectory.lost
            which = jnp.where(jnp.any(lost), 1, 0)
            failed = jnp.any(bad | lost)
            messages = [_UNTRUSTED, _LOST]
            # What passes a check is put on one device: a number, and not `carry`.
            no = jnp.array(False)
            bad = bad | eqx.branched_error_if(no, failed, which, messages)
        return nan_where(bad, carry)


def reconstruction_error(source: AbstractStateSource, steps: RecordedSteps) -> Array:
    """By how much, relatively, the reconstruction misses known states, at most."""
    _, error = source.walk(steps, lambda carry, _: carry, None, False)
    if error is None:
        return jnp.zeros(())
    return jnp.where(steps.trajectory.is_cut, jnp.nan, error)


def _constant(y: PyTree) -> PyTree[Array]:
    return jax.lax.stop_gradient(eqx.filter(y, eqx.is_inexact_array))


def _relative_error(found: PyTree, known: PyTree, peak: PyTree) -> Array:
    """How far `found` is from `known`, relatively, as a whole or number by number."""
    found, known = _constant(found), _constant(known)
    error = jax.tree.map(jnp.subtract, found, known)
    unit = jnp.finfo(size(error).dtype).eps
    least = _MAX_ROUNDING / _MAX_ERROR * unit * size(peak)
    overall = size(error) / jnp.maximum(size(known), least)
    # A number that is zero just there is compared with what it is elsewhere.
    usual = magnitudes(known, jax.tree.map(lambda x: _USUAL * x, peak))
    worst = jnp.maximum(overall, relative_size(error, usual))
    return jnp.where(size(error) == 0, 0, worst)
