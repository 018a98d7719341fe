"""The states that a reconstruction starts again from, in a bounded number of rows.

A *restart* is a step whose start cannot be found by undoing steps: one that begins with
a resync. The restarts of a solve are numbered from 0. The state before a restart is
stored. There are `_KEPT` rows for these states, and if a solve has more restarts, their
states are thinned out as `Checkpoints` thins out those of steps: only multiples of a
stride keep their rows. The backward pass makes the steps from a kept restart to the
next one again, and keeps the states before the restarts on the way in `_AGAIN` rows of
its own. If there are more, only the last ones, and those before them another time.

So memory does not depend on the number of steps. A solve with at most `_KEPT` restarts
makes no step again, one with at most `_KEPT * _AGAIN` makes every step again at most
once.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .._internal.batch import put, take
from .._internal.tree import only_arrays, where
from .._trajectory.checkpoints import Checkpoints
from .._trajectory.state_source import AbstractStateSource, RecordedSteps
from .._trajectory.step_times import StepTimes
from .invertible_step import is_regular_resync, Resync


# Rows for kept restarts, and at most as many for those that are found again. The
# product is the number of restarts up to which a gradient makes every step again at
# most once; with fewer rows, long solves take longer. On 320 random problems
# (docs/reversible_solvers.md) 318 solves by Tsit5 and 270 by Bosh3 resync at most that
# often.
_KEPT = 16
_AGAIN = 16

_Ints = Int[Array, "..."]
_Bools = Bool[Array, "..."]


class Restarts(eqx.Module):
    """Says which steps are restarts, and where the states before them are stored.

    - `every`: resync regularly after this many steps; `None` for no regular resyncs.
    - `chosen`: whether the solver decides where to resync.
    - `jumps`: whether a step that starts at a jump resyncs.
    - `max_steps`, `max_jumps`: the largest numbers of steps and of jumps.
    """

    every: int | None = eqx.field(static=True)
    chosen: bool = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    max_jumps: int = eqx.field(static=True)

    @property
    def limit(self) -> int:
        """The largest possible number of restarts."""
        # A solve that continues another one may resync in its first step.
        regular = 0 if self.every is None else (self.max_steps - 1) // self.every + 1
        jumps = self.max_jumps if self.jumps else 0
        return self.max_steps if self.chosen else min(self.max_steps, regular + jumps)

    @property
    def checkpoints(self) -> Checkpoints:
        """Which restarts keep their rows; there must be any."""
        return Checkpoints(slots=min(_KEPT, self.limit), max_steps=self.limit)

    @property
    def are_thinned(self) -> bool:
        """Whether there may be more restarts than rows for them."""
        return self.limit > _KEPT

    @property
    def rows(self) -> int:
        """The number of rows of the forward pass; 0 if there are no restarts."""
        # One row more: `row_to_write` needs it for what is not stored.
        return 0 if self.limit == 0 else min(_KEPT, self.limit) + 1

    def is_restart(
        self, index: _Ints, step_offset: _Ints, made_jump: _Bools, resync: _Bools
    ) -> Resync:
        """Returns whether step `index` is a restart; `False` if no step can be one.

        Regular resyncs also count the `step_offset` steps before this solve, if it
        continues another one. `resync` is whether the solver decided to resync.
        """
        restart = is_regular_resync(self.every, index + step_offset)
        if self.chosen:
            restart = restart | resync
        return restart | made_jump if self.jumps else restart

    def is_at(self, times: StepTimes) -> Resync:
        """Returns whether the step made at `times` is a restart."""
        return self.is_restart(
            times.index, times.step_offset, times.made_jump, times.resync
        )

    def row_to_write(self, number: _Ints, stores: _Bools | bool) -> _Ints:
        """Returns the row for restart `number`, or one that is not read.

        It is one that is not read where not `stores`.
        """
        return self.checkpoints.row_to_write(number, stores)


class RestartRows(eqx.Module):
    """The states before restarts that the backward pass has at hand.

    - `kept`: the states that the forward pass stored, with the batch axes first and
      then that of the rows; see `AbstractStateSource.to_store`.
    - `again`: those found again, in `_AGAIN` rows; `None` if all restarts are kept.
    - `total`: for each solve, the number of its restarts.
    - `first`: for each solve, the smallest number of a restart with a row at hand.
    """

    kept: PyTree[Array]
    again: PyTree[Array]
    total: _Ints
    first: _Ints

    @classmethod
    def of(cls, restarts: Restarts, steps: RecordedSteps) -> "RestartRows":
        """Returns the rows that the forward pass has stored."""
        kept, total = steps.trajectory.rows, steps.trajectory.num_stored
        again = None
        if restarts.are_thinned:
            # Rows of the right shape. They are written before they are read.
            rows = (slice(None),) * total.ndim + (slice(_AGAIN),)
            again = jax.tree.map(lambda x: x[rows], kept)
        # Until `found_again`, solves with more restarts than rows have none at hand.
        return cls(kept, again, total, jnp.where(total > _KEPT, total, 0))

    def take(self, steps: RecordedSteps, number: _Ints) -> PyTree[Array]:
        """Returns the row of restart `number`; an arbitrary one if not at hand."""
        # While all restarts have rows, these are in order.
        row = steps.batch.map(take)(self.kept, number)
        if self.again is None:
            return row
        again = steps.batch.map(take)(self.again, number % _AGAIN)
        return where(self.total > _KEPT, again, row)

    def found_again(
        self,
        source: AbstractStateSource,
        restarts: Restarts,
        steps: RecordedSteps,
        index: Int[Array, ""],
        number: _Ints,
        other: PyTree[Array],
    ) -> "RestartRows":
        """Returns these with the last restarts before step `index` at hand.

        **Arguments:**

        - `index`: the step to undo next.
        - `number`: for each solve, how many restarts there are up to this step.
        - `other`: valid states, for solves that make no step here.
        """
        batch, checkpoints = steps.batch, restarts.checkpoints
        level = checkpoints.level(jnp.maximum(self.total - 1, 0))
        last = number - 1
        kept = (jnp.maximum(last, 0) >> level) << level
        active = (self.total > _KEPT) & (number > 0)
        start = _step_of(restarts, steps, index, number, kept, active)
        stored = batch.map(take)(self.kept, checkpoints.slot(kept))
        again = _put(steps, self.again, stored, kept, active)
        first = where(active, source.from_store(stored), other)

        def is_before(walk: tuple) -> _Bools:
            _, at, _, found = walk
            # The log of a solve that took too many steps ends before its restarts.
            return active & (found < last) & (at < steps.trajectory.num_steps - 1)

        def body(walk: tuple) -> tuple:
            # Invariant: `state` is that before step `at`. Restarts up to `found`, the
            # last one before or in this step, have been written.
            again, at, state, found = walk
            moves = is_before(walk)
            times = steps.times(at)
            y1, state1, _ = source.step(
                steps.evaluate, times, times.start, times.end, *state
            )
            new = batch.where_active(moves, only_arrays((y1, state1)), state)
            at = at + moves.astype(at.dtype)
            arrives = moves & restarts.is_at(steps.times(at))
            found = found + arrives.astype(found.dtype)
            row = only_arrays(source.to_store(*new))
            return _put(steps, again, row, found, arrives), at, new, found

        again, *_ = batch.while_loop(
            lambda walk: jnp.any(is_before(walk)),
            body,
            (again, start, first, kept),
            lambda walk: walk[0],
        )
        least = jnp.where(active, jnp.maximum(kept, number - _AGAIN), self.first)
        return RestartRows(self.kept, again, self.total, least)


def _put(
    steps: RecordedSteps,
    again: PyTree[Array],
    values: PyTree[Array],
    number: _Ints,
    chosen: _Bools,
) -> PyTree[Array]:
    """Writes `values` to the row of restart `number`, for some of the solves."""
    return steps.batch.map(put)(again, number % _AGAIN, values, chosen)


def _step_of(
    restarts: Restarts,
    steps: RecordedSteps,
    index: Int[Array, ""],
    number: _Ints,
    wanted: _Ints,
    active: _Bools,
) -> _Ints:
    """Returns which step is restart `wanted`, for each solve that is `active`.

    There are `number` restarts up to step `index`.
    """
    last = jnp.maximum(steps.trajectory.num_steps - 1, 0)

    def is_after(walk: tuple[_Ints, _Ints]) -> _Bools:
        at, number = walk
        is_there = restarts.is_at(steps.times(at)) & (number - 1 == wanted)
        return active & ~is_there & (at > 0)

    def body(walk: tuple[_Ints, _Ints]) -> tuple[_Ints, _Ints]:
        at, number = walk
        moves = is_after(walk)
        passed = moves & restarts.is_at(steps.times(at))
        return at - moves.astype(at.dtype), number - passed.astype(number.dtype)

    start = jnp.minimum(index, last), number
    at, _ = steps.batch.while_loop(lambda walk: jnp.any(is_after(walk)), body, start)
    return at
