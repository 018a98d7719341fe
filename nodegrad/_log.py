"""What the forward pass writes down of the accepted steps."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._grid import AbstractGrid, AdaptiveGrid
from ._tree import lent


class Log(eqx.Module):
    """What is known of every accepted step; each field has one row a step.

    `ends` is kept only where it cannot be computed, `starts` only where a step may
    start elsewhere than the last one ended (a jump: `made_jumps`), `origins` only for
    grids that need to know (see `_grid.py`).
    """

    ends: Array | None
    starts: Array | None
    made_jumps: Array | None
    origins: Array | None


class Record(eqx.Module):
    """The forward pass as the sweep sees it.

    - `at_end`: whether it came to its `t1`.
    - `taken`: the steps of an earlier solve that it continues.
    """

    rows: PyTree[Array]
    log: Log
    tprev0: Array
    tnext0: Array
    made_jump0: Array
    num_steps: Array
    at_end: Array
    taken: Array

    def end(self, grid: AbstractGrid, index):
        """Where step `index` ended; `index = -1` is the start of the solve."""
        known = jnp.maximum(index, 0)
        if self.log.ends is not None:
            end = self.log.ends[known]
        else:
            assert not isinstance(grid, AdaptiveGrid)
            end = grid.end(known, self.tnext0)
        return jnp.where(index < 0, self.tprev0, end)

    def start(self, grid: AbstractGrid, index):
        """Where step `index` started."""
        if self.log.starts is None:
            return self.end(grid, index - 1)
        return self.log.starts[index]

    def made_jump(self, index):
        """Whether step `index` started just after a jump of the vector field."""
        if self.log.made_jumps is None:
            return self.made_jump0 & (index == 0)
        return self.log.made_jumps[index]

    def previous_size(self, grid: AbstractGrid, index):
        """The size before that of step `index`, as the controller saw it."""
        before = jnp.maximum(index - 1, 0)
        previous = self.end(grid, index - 1) - self.start(grid, before)
        return jnp.where(index == 0, self.tnext0 - self.tprev0, previous)

    def origin(self, grid: AbstractGrid, index):
        """The origin of the size of step `index`."""
        logged = None if self.log.origins is None else self.log.origins[index]
        return grid.origin_of(index, logged)

    def with_safe_first_step(self) -> "Record":
        """A batch in which every lane has a first step that can be pulled back."""
        none = self.num_steps == 0
        lend_first = lambda x: x.at[:, 0].set(lent(none, x[:, 0]))
        rows, log = jax.tree.map(lend_first, (self.rows, self.log))
        tprev0, tnext0 = lent(none, (self.tprev0, self.tnext0))
        return replace(self, rows=rows, log=log, tprev0=tprev0, tnext0=tnext0)
