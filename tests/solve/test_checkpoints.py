"""The thinning schedule, checked exhaustively on small cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nodegrad._trajectory.checkpoints import Checkpoints, choose_checkpoints


@pytest.mark.parametrize("slots", [1, 2, 4, 6, 8, 14])
@pytest.mark.parametrize("max_steps", [1, 7, 8, 33, 130])
def test_every_multiple_of_the_stride_is_found_where_it_was_put(slots, max_steps):
    checkpoints = Checkpoints(slots=min(slots, max_steps), max_steps=max_steps)
    rows = np.full(checkpoints.rows, -1)
    for step in range(max_steps):
        rows[int(checkpoints.row_to_write(jnp.array(step)))] = step
        level = int(checkpoints.level(jnp.array(step)))
        for kept in range(0, step + 1, 2**level):
            slot = checkpoints.slot(jnp.array(kept))
            assert rows[int(slot)] == kept
        assert (step + 1) <= checkpoints.slots << level


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_memory_is_as_promised(checkpoints, max_steps):
    schedule = choose_checkpoints(checkpoints, max_steps)
    segment = 2**schedule.max_level if schedule.max_level else 0
    assert schedule.slots <= checkpoints
    assert schedule.rows == schedule.slots + segment
    assert schedule.slots << schedule.max_level >= max_steps


def test_default_is_the_power_of_two_near_twice_the_square_root():
    assert choose_checkpoints(None, 4096).slots == 128
    assert choose_checkpoints(None, 65536).slots == 512
    assert choose_checkpoints("all", 1000).rows == 1000


def test_level_and_slot_are_traceable():
    checkpoints = Checkpoints(slots=4, max_steps=64)
    rows = jax.jit(jax.vmap(checkpoints.row_to_write))(jnp.arange(64))
    assert rows.shape == (64,)
