"""States from checkpoints: stored on the way forwards, stepped again in between.

The number of steps is not known in advance, so the stored states are thinned as the
solve goes on: of steps `0, 1, ..., m` exactly those divisible by a power of two,
`2**level`, are kept, where `level` is the smallest for which they fit into `slots`
slots. Nothing is ever moved. When the level rises by one, the odd multiples of the old
stride become free, and new states go there; written out, the slot of step
`m = j * 2**level` is the `log2(slots)`-bit number `j` rotated left by `level` bits.

The way back goes from the last stored state to the first and steps through each stretch
between two of them once more, into a *segment* of `stride - 1` further rows. So a
gradient costs at most one extra pass over the accepted steps, and nothing extra while
`level == 0`, that is for up to `slots` steps.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._internal.tree import take
from .._steps.step import AbstractStep
from .linearized_calls import LinearizedCalls
from .state_source import AbstractStateSource, BackwardStep, RecordedSteps
from .step_times import StepTimes


C = TypeVar("C")


class Checkpoints(eqx.Module):
    """The thinning schedule for at most `max_steps` steps in `slots` slots."""

    slots: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @property
    def max_level(self) -> int:
        """The level reached after `max_steps` steps."""
        return max(0, math.ceil(math.log2(self.max_steps / self.slots)))

    @property
    def rows(self) -> int:
        """Rows to allocate: the slots, then one segment to step through."""
        return self.slots + (2**self.max_level if self.max_level > 0 else 0)

    def level(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """The smallest level at which `step` has a slot."""
        thresholds = [self.slots << level for level in range(self.max_level)]
        out = jnp.zeros_like(step)
        for threshold in thresholds:
            out = out + jnp.where(step >= threshold, 1, 0)
        return out

    def slot(self, step: Int[Array, ""], level: Int[Array, ""]) -> Int[Array, ""]:
        """The slot that holds `step`, a multiple of `2**level`."""
        if self.max_level == 0:
            return step
        bits = self.slots.bit_length() - 1
        if bits == 0:
            return jnp.zeros_like(step)
        index, turn = step >> level, level % bits
        return ((index << turn) | (index >> (bits - turn))) & (self.slots - 1)

    def row_to_write(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Where the forward pass puts `step`: its slot, or a row that is not read."""
        if self.max_level == 0:
            return step
        level = self.level(step)
        kept = (step & ((1 << level) - 1)) == 0
        return jnp.where(kept, self.slot(step, level), self.slots)


def choose_checkpoints(checkpoints: int | str | None, max_steps: int) -> Checkpoints:
    """The schedule that `ACAAdjoint(checkpoints)` stands for.

    `None` takes the power of two nearest to `2 sqrt(max_steps)`: few enough that
    zeroing the buffer costs nothing against the solve, many enough that most solves
    never step through a segment again.
    """
    if checkpoints == "all":
        slots = max_steps
    elif checkpoints is None:
        slots = max(32, 2 ** round(math.log2(2 * math.sqrt(max_steps))))
    else:
        assert isinstance(checkpoints, int)
        slots = 2 ** (checkpoints.bit_length() - 1)
    return Checkpoints(slots=min(slots, max_steps), max_steps=max_steps)


class CheckpointedStates(AbstractStateSource):
    """Stored states, and steps again from these to the states between them.

    - `stepper`: the step.
    - `dense`: whether anything reads between the ends of a step.
    """

    stepper: AbstractStep
    checkpoints: Checkpoints
    dense: bool = eqx.field(static=True)

    @property
    def rows(self) -> int:
        return self.checkpoints.rows

    def row_to_write(self, index, step_offset, start, made_jump, grid):
        del step_offset, start, made_jump, grid
        return self.checkpoints.row_to_write(index)

    def replay_state(self, solver_state, made_jump):
        return self.stepper.replay_state(solver_state, made_jump)

    def with_replay_state(self, solver_state, replay_state):
        return self.stepper.with_replay_state(solver_state, replay_state)

    def parts(self):
        return self.stepper.parts(self.dense)

    def step(self, evaluate, times, t0, t1, y, state):
        # Several steps are replayed from one stored state, each with a jump or without.
        state = self.stepper.replay_state_at(state, times.made_jump)
        return self.stepper.replay(evaluate, t0, t1, y, state)

    def walk(self, steps, visit, carry, linearizes):
        del linearizes
        batch, checkpoints = steps.batch, self.checkpoints
        first_times = steps.times(jnp.zeros((), steps.trajectory.num_steps.dtype))
        first = steps.valid((first_times, steps.y0, steps.replay_state0))
        walk = _Walk(self, steps, first)
        # Solves go back over step `i` together, whatever number of steps they took.
        stop = jnp.max(steps.trajectory.num_steps)
        rows, zero = steps.trajectory.rows, jnp.zeros_like(stop)
        if checkpoints.max_level == 0:
            return walk.visit(visit, carry, rows, zero, stop, zero), None
        level = checkpoints.level(jnp.maximum(stop - 1, 0))

        def segment(stop__rows__carry):
            stop, rows, carry = stop__rows__carry
            # The last stored step before `stop`, a multiple of `2**level`. With all
            # states stored there is one segment, from the first step on.
            start = ((jnp.maximum(stop, 1) - 1) >> level) << level
            start = jnp.where(level == 0, 0, start)
            rows = walk.step_again(rows, start, stop, level)
            carry = walk.visit(visit, carry, rows, start, stop, level)
            return start, rows, carry

        *_, carry = batch.while_loop(
            lambda c: c[0] > 0, segment, (stop, rows, carry), lambda c: c[1]
        )
        return carry, None

    def linearize(self, steps: RecordedSteps, times: StepTimes, y, state) -> Any:
        """The results of a step, and the pullback; see `BackwardStep`."""
        calls = LinearizedCalls(steps, times)
        args = times.start, times.end, y, state
        return calls.linearize(self.stepper.replay, args)


class _Walk(NamedTuple):
    """Going back over the steps of a batch of solves.

    - `first`: times and state of the first step of every solve. They stand in for those
      of steps that a solve did not take.
    """

    source: CheckpointedStates
    steps: RecordedSteps
    first: tuple[StepTimes, PyTree, PyTree]

    def step_again(self, rows: PyTree, start, stop, level) -> PyTree:
        """Fills the segment with the states before steps `start, ..., stop - 1`."""
        batch, checkpoints = self.steps.batch, self.source.checkpoints
        trajectory = self.steps.trajectory
        segment = jnp.full_like(start, checkpoints.slots)

        def body(index__rows):
            index, rows = index__rows
            _, times, y, state = self._at(index, rows, segment + index - start)
            y1, state1, _ = self.source.step(
                self.steps.evaluate, times, times.start, times.end, y, state
            )
            new = _arrays((y1, state1))
            return index + 1, batch.put(rows, segment + index + 1 - start, new)

        # Solves with fewer steps may have stored more of them, in other slots.
        own_level = checkpoints.level(jnp.maximum(trajectory.num_steps - 1, 0))
        first = batch.map(take)(rows, checkpoints.slot(start, own_level))
        rows = batch.put(rows, segment, first)
        is_between = lambda index: (index < stop - 1) & (level > 0)
        _, rows = batch.while_loop(
            lambda c: is_between(c[0]), body, (start, rows), lambda c: c[1]
        )
        return rows

    def visit(self, visit: Callable, carry: C, rows, start, stop, level) -> C:
        """Visits steps `stop - 1, ..., start`, whose states are in `rows`."""
        batch, segment = self.steps.batch, self.source.checkpoints.slots

        def body(index__carry):
            index, carry = index__carry
            row = jnp.where(level == 0, index, segment + index - start)
            active, times, y, state = self._at(index, rows, row)
            state = self.source.stepper.replay_state_at(state, times.made_jump)
            linearize = ft.partial(self.source.linearize, self.steps, times, y, state)
            step = BackwardStep(index, times, active, y, state, linearize)
            return index - 1, visit(carry, step)

        _, carry = batch.while_loop(lambda c: c[0] >= start, body, (stop - 1, carry))
        return carry

    def _at(self, index, rows: PyTree, row) -> tuple[Any, StepTimes, PyTree, PyTree]:
        """Which solves took step `index`, its times, and the state before it."""
        batch = self.steps.batch
        active = index < self.steps.trajectory.num_steps
        found = self.steps.times(index), *batch.take(rows, row)
        return active, *batch.where_active(active, found, self.first)


def _arrays(tree: PyTree) -> PyTree[Any]:
    return eqx.filter(tree, eqx.is_array)
