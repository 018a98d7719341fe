"""Which states of a solve are kept, and where.

The number of steps is not known in advance, so the states kept are thinned as the
solve goes on: of steps `0, 1, ..., m` exactly those divisible by a power of two,
`2**level`, are kept, where `level` is the smallest for which they fit into `slots`
slots. Nothing is ever moved. When the level rises by one, the odd multiples of the old
stride become free, and new states go there; written out, the slot of step
`m = j * 2**level` is the `log2(slots)`-bit number `j` rotated left by `level` bits.

The backward sweep walks from the last stored state to the first and steps through each
stretch between two of them once more, into a segment of `stride - 1` further rows. So a
gradient costs at most one extra sweep over the accepted steps, and nothing extra while
`level == 0`, that is for up to `slots` steps.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int


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

    def row_to_write(self, step: Int[Array, ""], *_) -> Int[Array, ""]:
        """Where the forward pass puts `step`: its slot, or a row nobody reads."""
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
        slots = 2 ** round(math.log2(2 * math.sqrt(max_steps)))
    else:
        assert isinstance(checkpoints, int)
        slots = 2 ** (checkpoints.bit_length() - 1)
    return Checkpoints(slots=min(slots, max_steps), max_steps=max_steps)
