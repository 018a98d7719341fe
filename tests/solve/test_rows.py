"""Rows of arrays are read and written as by `.at[row].set`, in every mode."""

import itertools

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from nodegrad._internal.batch import put, set_row, take


X, Y = jr.normal(jr.key(0), (4, 3)), jr.normal(jr.key(1), (3,))
ROW = jnp.array(2)


def ours(x, y, row):
    return set_row(x, row, y)


def theirs(x, y, row):
    return x.at[row].set(y)


def test_one_row_changes():
    np.testing.assert_array_equal(ours(X, Y, ROW), theirs(X, Y, ROW))
    columns = set_row(X.T, ROW, Y, axis=1)
    np.testing.assert_array_equal(columns, theirs(X, Y, ROW).T)
    np.testing.assert_array_equal(take(ours(X, Y, ROW), ROW), Y)


@pytest.mark.parametrize("wrt", [0, 1, (0, 1)])
def test_derivatives(wrt):
    for jacobian in (jax.jacfwd, jax.jacrev):
        out = jacobian(ours, wrt)(X, Y, ROW)
        expected = jacobian(theirs, wrt)(X, Y, ROW)
        jax.tree.map(np.testing.assert_array_equal, out, expected)


@pytest.mark.parametrize(
    "axes", list(itertools.product([None, 0, 1], [None, 1], [None, 0]))[1:]
)
def test_batches(axes):
    operands = [
        x if axis is None else jnp.stack([x, f(x)], axis)
        for x, axis, f in zip(
            (X, Y, ROW), axes, (jnp.sin, jnp.cos, lambda i: i - 1), strict=True
        )
    ]
    out, expected = (jax.vmap(f, in_axes=axes)(*operands) for f in (ours, theirs))
    np.testing.assert_array_equal(out, expected)


def test_a_common_row_is_no_scatter():
    columns = jax.jit(jax.jacfwd(ours)).lower(X, Y, ROW).as_text()
    assert "scatter" not in columns
    assert "scatter" in jax.jit(jax.jacfwd(theirs)).lower(X, Y, ROW).as_text()


@pytest.mark.parametrize("lanes", [None, 3])
def test_buffers_of_a_loop(lanes):
    """Also for lanes whose loops end after different numbers of rows."""

    def count(num, pred):
        def body(state):
            i, rows = state
            kept = True if pred is None else i % pred != 1
            return i + 1, put(rows, i, 1.0 + i, kept)

        init = 0, jnp.zeros(6)
        _, rows = eqxi.while_loop(
            lambda s: s[0] < num, body, init, buffers=lambda s: s[1], kind="lax"
        )
        return rows

    for pred in (None, 3):
        num = jnp.array(4) if lanes is None else 2 * jnp.arange(lanes)
        run = count if lanes is None else jax.vmap(count, in_axes=(0, None))
        out, all_rows = run(num, pred), 1.0 + np.arange(6)
        written = np.arange(6) < np.asarray(num)[..., None]
        if pred is not None:
            written = written & (np.arange(6) % pred != 1)
        np.testing.assert_array_equal(out, np.where(written, all_rows, 0))


def test_a_row_after_the_last_is_the_last():
    out = put(X, jnp.array(9), Y)
    np.testing.assert_array_equal(out, theirs(X, Y, 3))
