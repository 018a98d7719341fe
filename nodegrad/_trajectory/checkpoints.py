"""Recovers states from checkpoints: stores some states, computes the others again.

The number of steps is not known in advance, so the stored states are thinned as the
solve goes on. Of steps `0, 1, ..., m` exactly the multiples of the *stride* `2**level`
are kept, where `level` is the smallest for which they fit into `slots` slots. No state
is moved. When the level rises by one, the odd multiples of the old stride are no longer
needed, and new states overwrite them; `Checkpoints.slot` has the proof.

The backward pass goes from the last stored state to the first. It makes the steps
between two stored states again and writes their states to a *segment*: `2**max_level`
further rows. The first row is a copy of the stored state. A gradient costs at most one
extra pass over the accepted steps, and nothing extra while `level == 0`, that is for up
to `slots` steps.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.tree import only_arrays
from .._steps.step import AbstractStep
from .linearized_calls import LinearizedCalls
from .state_source import (
    AbstractStateSource,
    BackwardStep,
    Evaluate,
    RecordedSteps,
)
from .step_times import StepTimes


# Of one solve or of several.
_Ints = Int[Array, "..."]
_Bools = Bool[Array, "..."]


C = TypeVar("C")


class Checkpoints(eqx.Module):
    """The thinning schedule for at most `max_steps` steps in `slots` slots.

    `slots` is 1, or even, or `max_steps` if all states have a slot.
    """

    slots: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @property
    def max_level(self) -> int:
        """The level reached after `max_steps` steps."""
        return max(0, math.ceil(math.log2(self.max_steps / self.slots)))

    @property
    def rows(self) -> int:
        """Rows to allocate: the slots, then the segment if there is a second level."""
        return self.slots + (2**self.max_level if self.max_level > 0 else 0)

    def level(self, step: _Ints) -> _Ints:
        """The smallest level at which step `0, ..., step` fit into the slots."""
        # At level `L` the slots hold the multiples of `2**L` below `slots * 2**L`.
        thresholds = [self.slots << level for level in range(self.max_level)]
        out = jnp.zeros_like(step)
        for threshold in thresholds:
            out = out + jnp.where(step >= threshold, 1, 0)
        return out

    def slot(self, step: _Ints) -> _Ints:
        """The slot of `step`, as long as it is kept."""
        # Step 0 has slot 0. The others take turns in the remaining `m = slots - 1`. As
        # `m` is odd, `2**level` is invertible modulo `m`: the kept steps
        # `i * 2**level`, `i = 1, ..., m`, have `m` different slots. When the level
        # rises, the steps `2 * i * 2**level` with `2 * i > m` are new. Each has the
        # slot of `(2 * i - m) * 2**level`, an odd multiple, which is not kept any more.
        if self.slots == 1:
            return jnp.zeros_like(step)
        return jnp.where(step > 0, (step - 1) % (self.slots - 1) + 1, 0)

    def row_to_write(self, step: _Ints, stores: _Bools | bool = True) -> _Ints:
        """Where the forward pass puts `step`: its slot, or a row that is not read.

        It is one of the latter where not `stores`. (If every step has a slot, that is
        the slot of `step`: what is not stored is not read, or is written again.)
        """
        if self.max_level == 0:
            return step
        level = self.level(step)
        # Row `slots` is the first one of the segment, which the backward pass
        # overwrites before it reads it.
        kept = stores & ((step & ((1 << level) - 1)) == 0)
        return jnp.where(kept, self.slot(step), self.slots)


def choose_checkpoints(checkpoints: int | str | None, max_steps: int) -> Checkpoints:
    """Returns the schedule of `ACAAdjoint(checkpoints)`.

    `"all"` gives every step a slot. An odd integer above 1 is rounded down.
    `None` takes the power of two nearest to `2 sqrt(max_steps)`, and at least 32. With
    fewer slots more solves have to make steps again. With more, allocating and zeroing
    the buffer takes a larger part of the time of a short solve.
    """
    if checkpoints == "all":
        slots = max_steps
    elif checkpoints is None:
        slots = max(32, 2 ** round(math.log2(2 * math.sqrt(max_steps))))
    else:
        assert isinstance(checkpoints, int)
        # `Checkpoints.slot` needs an even number.
        slots = max(1, checkpoints // 2 * 2)
    return Checkpoints(slots=min(slots, max_steps), max_steps=max_steps)


class CheckpointedStates(AbstractStateSource):
    """A state source that stores some states and steps again to those in between.

    - `stepper`: the step of the solver.
    - `checkpoints`: which states are stored, and in which rows.
    - `dense`: whether a save or an event needs the solution between the ends of a step.
    """

    stepper: AbstractStep
    checkpoints: Checkpoints
    dense: bool = eqx.field(static=True)

    @property
    def rows(self) -> int:
        return self.checkpoints.rows

    def row_to_write(
        self, number: Int[Array, ""], stores: Bool[Array, ""] | bool
    ) -> Int[Array, ""]:
        return self.checkpoints.row_to_write(number, stores)

    def is_stored(
        self,
        index: Int[Array, ""],
        step_offset: Int[Array, ""],
        made_jump: Bool[Array, ""],
        resync: Bool[Array, ""],
    ) -> bool:
        del index, step_offset, made_jump, resync
        return True

    def replay_state(
        self, solver_state: PyTree, made_jump: bool | Bool[Array, "..."] | None
    ) -> PyTree:
        return self.stepper.replay_state(solver_state, made_jump)

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        return self.stepper.with_replay_state(solver_state, replay_state)

    def parts(self) -> dict[str, Callable]:
        return self.stepper.parts(self.dense)

    def step(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        # `state` may be that of a step before this one, from which several steps are
        # replayed. The jump flag in it is then not the one of this step.
        state = self.stepper.replay_state_at(state, times.made_jump)
        return self.stepper.replay(evaluate, t0, t1, y, state)

    def walk(
        self,
        steps: RecordedSteps,
        visit: Callable[[C, BackwardStep], C],
        carry: C,
        linearizes: bool,
    ) -> tuple[C, None]:
        del linearizes
        batch, checkpoints = steps.batch, self.checkpoints
        first_times = steps.times(jnp.zeros((), steps.trajectory.num_steps.dtype))
        first = steps.valid((first_times, steps.y0, steps.replay_state0))
        walk = _Walk(self, steps, first)
        # All solves of a batch go back over step `i` together. So the walk starts at
        # the last step of the longest solve, and `level` is the level of that solve.
        stop = jnp.max(steps.trajectory.num_steps)
        rows, zero = steps.trajectory.rows, jnp.zeros_like(stop)
        if checkpoints.max_level == 0:
            # Every state has a slot, and there are no rows for a segment.
            return walk.visit(visit, carry, rows, zero, stop, zero), None
        level = checkpoints.level(jnp.maximum(stop - 1, 0))

        def segment(
            stop__rows__carry: tuple[Int[Array, ""], PyTree[Array], C],
        ) -> tuple[Int[Array, ""], PyTree[Array], C]:
            stop, rows, carry = stop__rows__carry
            # Invariant: steps `stop, stop + 1, ...` have been visited, and `stop` is
            # the number of steps (at first) or a multiple of the stride `2**level`.
            # `start` is the largest multiple of the stride that is less than `stop`.
            # Why `stop - 1`? If `stop = k * stride`, step `stop` was the first one of
            # the segment visited before. This segment is then the stride before it,
            # and `((stop - 1) >> level) << level` is `(k - 1) * stride`. Without the
            # `- 1` it would be `stop` again, and the loop would not end.
            # By induction: `start` is a multiple of the stride, so its state is stored
            # and the invariant holds for the next segment. A segment has at least one
            # step and at most `stride` steps, so it fits into `2**max_level` rows. The
            # last one has `start == 0`, where the loop ends.
            # `maximum` keeps `start` at 0 where `stop` is 0: under an outer `vmap` the
            # body also runs for solves whose loop has ended.
            start = ((jnp.maximum(stop, 1) - 1) >> level) << level
            # At level 0 the slots hold every state, and all steps are one segment.
            start = jnp.where(level == 0, 0, start)
            rows = walk.step_again(rows, start, stop, level)
            carry = walk.visit(visit, carry, rows, start, stop, level)
            return start, rows, carry

        *_, carry = batch.while_loop(
            lambda c: c[0] > 0, segment, (stop, rows, carry), lambda c: c[1]
        )
        return carry, None

    def linearize(
        self, steps: RecordedSteps, times: StepTimes, y: PyTree, state: PyTree
    ) -> tuple[PyTree, Callable]:
        """Returns the results of a step and its pullback; see `BackwardStep`."""
        calls = LinearizedCalls(steps, times)
        args = times.start, times.end, y, state
        return calls.linearize(self.stepper.replay, args)


class _Walk(NamedTuple):
    """Goes back over the steps of a batch of solves, segment by segment.

    In both methods steps `start, ..., stop - 1` are those of a segment. Above level 0
    row `slots + (index - start)` of `rows` is for the state before step `index`, as the
    rows of the segment come after the slots. `rows` has the batch axes first, then the
    axis of the rows.

    - `first`: times, `y` and replay state of the first step of every solve. They
      replace those of steps that a solve did not take.
    """

    source: CheckpointedStates
    steps: RecordedSteps
    first: tuple[StepTimes, PyTree, PyTree]

    def step_again(
        self,
        rows: PyTree[Array],
        start: Int[Array, ""],
        stop: Int[Array, ""],
        level: Int[Array, ""],
    ) -> PyTree[Array]:
        """Fills the segment with the states before steps `start, ..., stop - 1`.

        At level 0 nothing reads the segment, and no steps are made.
        """
        batch, checkpoints = self.steps.batch, self.source.checkpoints
        segment = jnp.full_like(start, checkpoints.slots)

        def is_between(index__rows: tuple[Int[Array, ""], PyTree[Array]]) -> Array:
            # Step `stop - 1` leads out of the segment and is not made.
            index, _ = index__rows
            return (index < stop - 1) & (level > 0)

        def body(
            index__rows: tuple[Int[Array, ""], PyTree[Array]],
        ) -> tuple[Int[Array, ""], PyTree[Array]]:
            # Invariant: the states before steps `start, ..., index` are in the segment.
            index, rows = index__rows
            _, times, y, state = self._at(index, rows, segment + index - start)
            times = self.steps.at_shared_times(times, index)
            y1, state1, _ = self.source.step(
                self.steps.evaluate, times, times.start, times.end, y, state
            )
            new = only_arrays((y1, state1))
            return index + 1, batch.put(rows, segment + index + 1 - start, new)

        # A shorter solve may be at a lower level: `start` is a multiple of its stride
        # as well. If that solve did not take step `start`, the row copied here has no
        # meaning, and `_at` replaces it.
        first = batch.take(rows, checkpoints.slot(start))
        rows = batch.put(rows, segment, first)
        _, rows = batch.while_loop(is_between, body, (start, rows), lambda c: c[1])
        return rows

    def visit(
        self,
        visit: Callable[[C, BackwardStep], C],
        carry: C,
        rows: PyTree[Array],
        start: Int[Array, ""],
        stop: Int[Array, ""],
        level: Int[Array, ""],
    ) -> C:
        """Visits steps `stop - 1, ..., start`, whose states are in `rows`."""
        batch, segment = self.steps.batch, self.source.checkpoints.slots

        def body(
            index__carry: tuple[Int[Array, ""], C],
        ) -> tuple[Int[Array, ""], C]:
            index, carry = index__carry
            # At level 0 the slot of a step is its number.
            row = jnp.where(level == 0, index, segment + index - start)
            active, times, y, state = self._at(index, rows, row)
            state = self.source.stepper.replay_state_at(state, times.made_jump)
            at = self.steps.at_shared_times(times, index), y, state
            linearize = ft.partial(self.source.linearize, self.steps, *at)
            step = BackwardStep(index, times, active, y, state, linearize)
            return index - 1, visit(carry, step)

        _, carry = batch.while_loop(lambda c: c[0] >= start, body, (stop - 1, carry))
        return carry

    def _at(
        self, index: Int[Array, ""], rows: PyTree[Array], row: Int[Array, ""]
    ) -> tuple[Bool[Array, "..."], StepTimes, PyTree, PyTree]:
        """Returns which solves took step `index`, its times, and the state before it.

        The state is `y` and the replay state, from row `row` of `rows`.
        """
        batch = self.steps.batch
        active = index < self.steps.trajectory.num_steps
        found = self.steps.times(index), *batch.take(rows, row)
        times, *state = batch.where_active(active, found, self.first)
        return active, times, *self.steps.at_shared_states(active, state)
