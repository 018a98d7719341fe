"""Defines the record of the accepted steps that the forward pass makes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .step_times import StepTimes


_CUT = (
    "A solve whose derivative is needed took more accepted steps than its adjoint had "
    "room to record. Pass `max_recorded_steps=...` to the adjoint: at least the number "
    "of steps of the solve, `Solution.stats['num_accepted_steps']`."
)


def choose_recorded_steps(max_recorded_steps: int | None, max_steps: int) -> int:
    """Returns the number of steps to allocate memory for.

    `None` stands for a quarter of `max_steps`, but at least 1024 and at most `2**17`:
    most solves take far fewer steps than `max_steps`, and every sample of a batch needs
    its own memory. A solve that takes more steps has no derivative, see `refuse`.
    """
    if max_recorded_steps is None:
        max_recorded_steps = min(max(1024, max_steps // 4), 2**17)
    return min(max_recorded_steps, max_steps)


def refuse(cut: Bool[Array, "..."], throw: bool) -> Bool[Array, "..."]:
    """Returns `cut`, which marks solves without a derivative; raises with `throw`.

    `cut` has the batch shape.
    """
    if throw:
        # `error_if` puts the array that it returns on one device. So a new scalar goes
        # through it, and not an array that may be sharded over the batch.
        cut = cut | eqx.error_if(jnp.array(False), jnp.any(cut), _CUT)
    return cut


class StepLog(eqx.Module):
    """The times of the accepted steps; each array has one row for every step.

    In the record of a solve there is one row more, for all steps that have no row. The
    shape is `(*batch, steps + 1)`, and that of a scalar in the log of a single step.

    A field is `None` where the solve does not need it:

    - `ends`: where steps end, unless the grid can compute it.
    - `starts`: where steps start, if that may differ from where the previous one ended.
    - `made_jumps`: whether steps start just after a jump; recorded with `starts`.
    - `origins`: what the sizes depend on, for an `AdaptiveGrid` (`step_times.py`).
    - `resyncs`: whether a reversible solver decided to resync before each step.
    """

    # `made_jumps` is an array, or a Python `False` in the log of a single step.
    ends: Real[Array, "..."] | None
    starts: Real[Array, "..."] | None
    made_jumps: Any
    origins: Int[Array, "..."] | None
    resyncs: Bool[Array, "..."] | None


class Clock(eqx.Module):
    """What the times of steps depend on; solves of a batch may share all of it.

    - `grid`: where steps end.
    - `first_start`, `first_end`: the times of the first attempted step.

    The same structure also holds `Axes`, so its leaves are annotated as `Any`.
    """

    grid: Any
    first_start: Any
    first_end: Any


class Cursor(eqx.Module):
    """How many times of `SaveAt(ts=...)` and how many rows a save has written."""

    ts_index: Int[Array, "..."]
    row: Int[Array, "..."]


class Trajectory(eqx.Module):
    """What a derivative needs to know of the forward pass of one solve, or of a batch.

    In a batch every array has the batch axes first. The methods are for one solve.

    - `rows`: the stored states `(y, replay_state)`, with an axis of rows; `None` if the
      state source stores none. `AbstractStateSource.row_to_write` numbers the rows.
    - `num_stored`: the number of states that were stored, overwritten ones included; 0
      if the state source stores all.
    - `log`: the times of the accepted steps.
    - `made_jump0`: whether the first step starts just after a jump.
    - `num_steps`: the number of accepted steps, recorded or not.
    - `at_end`: whether the solve reached `t1`.
    - `step_offset`: the number of steps that the solver made before this solve.
    - `y`, `replay_state`: the state after the last step.
    - `lost`: whether a reversible solver found that its two copies had separated.
    - `first_cursors`, `last_cursors`: what each save had written before and after the
      loop.
    """

    rows: PyTree[Array]
    num_stored: Int[Array, "..."]
    log: StepLog
    made_jump0: Bool[Array, "..."]
    num_steps: Int[Array, "..."]
    at_end: Bool[Array, "..."]
    step_offset: Int[Array, "..."]
    y: PyTree[Array]
    replay_state: PyTree[Array]
    lost: Bool[Array, "..."]
    first_cursors: list[Cursor]
    last_cursors: list[Cursor]

    @property
    def is_cut(self) -> Bool[Array, ""]:
        """Whether there were more accepted steps than the log has rows for them."""
        logged = jax.tree.leaves(self.log)
        if not logged:
            # All times can be computed, for any number of steps.
            return jnp.zeros_like(self.at_end)
        # The last row is for steps that have no row of their own.
        return self.num_steps >= len(logged[0])

    def end(self, clock: Clock, index: Int[Array, ""]) -> Real[Array, ""]:
        """Returns where step `index` ended; for -1, where the solve starts."""
        # With `index = -1` row 0 is read, and not used.
        known = jnp.maximum(index, 0)
        if self.log.ends is not None:
            end = self.log.ends[known]
        else:
            end = clock.grid.end(known, clock.first_end)
        return jnp.where(index < 0, clock.first_start, end)

    def start(self, clock: Clock, index: Int[Array, ""]) -> Real[Array, ""]:
        """Returns where step `index` started."""
        if self.log.starts is None:
            return self.end(clock, index - 1)
        return self.log.starts[index]

    def made_jump(self, index: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether step `index` started just after a jump of the vector field."""
        if self.log.made_jumps is None:
            # Without recorded jumps only the solve itself may start at one.
            return self.made_jump0 & (index == 0)
        return self.log.made_jumps[index]

    def times(self, clock: Clock, index: Int[Array, ""]) -> StepTimes:
        """Returns when step `index` was made, and what its times depend on."""
        # For step 0 both lookups return the start of the solve.
        previous_start = self.start(clock, jnp.maximum(index - 1, 0))
        previous_size = self.end(clock, index - 1) - previous_start
        first_size = clock.first_end - clock.first_start
        logged = None if self.log.origins is None else self.log.origins[index]
        return StepTimes(
            index=index,
            start=self.start(clock, index),
            end=self.end(clock, index),
            made_jump=self.made_jump(index),
            origin=clock.grid.origin_of(index, logged),
            previous_size=jnp.where(index == 0, first_size, previous_size),
            previous_start=previous_start,
            step_offset=self.step_offset,
            resync=self._resync(index),
        )

    def _resync(self, index: Int[Array, ""]) -> Bool[Array, ""]:
        if self.log.resyncs is None:
            return jnp.zeros_like(self.made_jump0)
        return self.log.resyncs[index]


def resync_of(state: PyTree) -> Bool[Array, ""]:
    """Returns whether the solver decided to resync before the next step."""
    # Only `Reversible` decides, and has this flag.
    return getattr(state.solver_state, "resync", jnp.zeros_like(state.made_jump))


def steps_taken(init_state: PyTree) -> Int[Array, ""]:
    """Returns how many steps the solver has counted before this solve, or zero.

    A solve that continues from the solver state of another one starts from its count.
    """
    zero = jnp.zeros_like(init_state.num_accepted_steps)
    count = getattr(init_state.solver_state, "steps_taken", zero)
    return count.astype(zero.dtype)
