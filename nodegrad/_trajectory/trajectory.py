"""What the forward pass writes down of the accepted steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .step_times import AbstractGrid, StepTimes


_CUT = (
    "A derivative was asked for of a solve that took more accepted steps than its "
    "adjoint had room to write down. Pass `max_recorded_steps=...` to the adjoint: at "
    "least what the solve needs (`Solution.stats['num_accepted_steps']`)."
)


def choose_recorded_steps(max_recorded_steps: int | None, max_steps: int) -> int:
    """How many steps there is room for; `None` stands for a number that suffices.

    Almost always: memory for all of `max_steps` would be many times what a usual solve
    needs, for each sample of a batch.
    """
    if max_recorded_steps is None:
        max_recorded_steps = min(max(1024, max_steps // 4), 2**17)
    return min(max_recorded_steps, max_steps)


def refuse(cut: Bool[Array, "..."], throw: bool) -> Bool[Array, "..."]:
    """`cut`: solves without a derivative. With `throw`, an error if there are any."""
    if throw:
        # What passes a check is put on one device: a number, and not what solves have.
        cut = cut | eqx.error_if(jnp.array(False), jnp.any(cut), _CUT)
    return cut


class StepLog(eqx.Module):
    """What is known of every accepted step; each field has one row a step.

    `ends` is kept only where it cannot be computed, `starts` only where a step may
    start elsewhere than the last one ended (a jump: `made_jumps`), `origins` only for
    grids that need to know (see `step_times.py`).
    """

    ends: Array | None
    starts: Array | None
    made_jumps: Array | None
    origins: Array | None


class Cursor(eqx.Module):
    """How many times and how many rows of a save have been written."""

    ts_index: Int[Array, "..."]
    row: Int[Array, "..."]


class Trajectory(eqx.Module):
    """The forward pass of one solve as a derivative sees it.

    - `rows`: the stored states, see `AbstractStateSource.row_to_write`.
    - `first_start`, `first_end`: the times of the first attempted step.
    - `at_end`: whether the solve came to its `t1`.
    - `step_offset`: the steps of an earlier solve that this one continues.
    - `y`, `replay_state`: the state after the last step.
    - `lost`: whether the solver found that its coupling was lost.
    - `first_cursors`, `last_cursors`: what was saved before and after the loop.
    """

    rows: PyTree[Array]
    log: StepLog
    first_start: Real[Array, "..."]
    first_end: Real[Array, "..."]
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
        """Whether there were more steps than could be written down."""
        logged = jax.tree.leaves(self.log)
        if not logged:
            return jnp.zeros_like(self.at_end)
        return self.num_steps > len(logged[0])

    def end(self, grid: AbstractGrid, index: Int[Array, ""]) -> Real[Array, ""]:
        """Where step `index` ended; `index = -1` is the start of the solve."""
        known = jnp.maximum(index, 0)
        if self.log.ends is not None:
            end = self.log.ends[known]
        else:
            end = grid.end(known, self.first_end)
        return jnp.where(index < 0, self.first_start, end)

    def start(self, grid: AbstractGrid, index: Int[Array, ""]) -> Real[Array, ""]:
        """Where step `index` started."""
        if self.log.starts is None:
            return self.end(grid, index - 1)
        return self.log.starts[index]

    def made_jump(self, index: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether step `index` started just after a jump of the vector field."""
        if self.log.made_jumps is None:
            return self.made_jump0 & (index == 0)
        return self.log.made_jumps[index]

    def times(self, grid: AbstractGrid, index: Int[Array, ""]) -> StepTimes:
        """When step `index` was made."""
        previous_start = self.start(grid, jnp.maximum(index - 1, 0))
        previous_size = self.end(grid, index - 1) - previous_start
        first_size = self.first_end - self.first_start
        logged = None if self.log.origins is None else self.log.origins[index]
        return StepTimes(
            index=index,
            start=self.start(grid, index),
            end=self.end(grid, index),
            made_jump=self.made_jump(index),
            origin=grid.origin_of(index, logged),
            previous_size=jnp.where(index == 0, first_size, previous_size),
            previous_start=previous_start,
            step_offset=self.step_offset,
        )
