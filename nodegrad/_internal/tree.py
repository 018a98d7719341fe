"""Arithmetic on pytrees."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .compat import Tracer


def as_arrays(tree: PyTree) -> PyTree:
    """Every number and NumPy array of `tree` as a JAX array."""
    return jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, tree)


def add(left: PyTree, right: PyTree) -> PyTree:
    """`left + right`, leaf by leaf."""
    return jax.tree.map(jnp.add, left, right)


def where(pred: Array, yes: PyTree, no: PyTree) -> PyTree:
    """`yes if pred else no` leaf by leaf; `pred` lines up with the leading axes."""

    def select(a, b):
        a = jnp.asarray(a)
        return jnp.where(
            jnp.reshape(pred, pred.shape + (1,) * (a.ndim - pred.ndim)), a, b
        )

    return jax.tree.map(select, yes, no)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros in the shape of `tree` (arrays or shapes)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def filled_like(cotangent: PyTree, primal: PyTree) -> PyTree:
    """`cotangent` with its absent (`None`) leaves made explicit zeros."""
    return jax.tree.map(
        lambda x, ct: jnp.zeros_like(x) if ct is None else ct,
        eqx.filter(primal, eqx.is_inexact_array),
        cotangent,
    )


def all_finite(tree: PyTree) -> Array:
    """Whether no inexact leaf of `tree` holds a NaN or an infinity."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    out = jnp.array(True)
    for x in leaves:
        out = out & jnp.all(jnp.isfinite(x))
    return out


def is_traced(x: Any) -> bool:
    """Whether the value of `x` is not known yet."""
    return isinstance(x, Tracer)


def is_buffer(x: Any) -> bool:
    """Whether `x` is an array or a loop buffer."""
    return hasattr(x, "at")


def take(tree: PyTree, row) -> PyTree:
    """Row `row` of every array of `tree`."""
    return jax.tree.map(lambda x: x[row], tree, is_leaf=is_buffer)


def put(tree: PyTree, row, values: PyTree) -> PyTree:
    """`tree` with `values` in row `row` of its arrays."""
    set_row = lambda buffer, x: buffer.at[row].set(x)
    return jax.tree.map(set_row, tree, values, is_leaf=is_buffer)


def set_row(tree: PyTree, row, values: PyTree, axis: int = 0) -> PyTree:
    """As `put`, for a row that exists: without the check of that, which costs."""
    write = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, row, axis)
    return jax.tree.map(write, tree, values)


def inexact_spec(tree: PyTree) -> PyTree[bool]:
    """Which leaves of `tree` are inexact arrays."""
    return jax.tree.map(eqx.is_inexact_array, tree)


def flatten(tree: PyTree, dtype) -> tuple[Array, Callable[[Array], PyTree]]:
    """The inexact arrays of `tree` as one vector of type `dtype`, and the way back."""
    inexact, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(inexact)
    ends = np.cumsum([x.size for x in leaves], dtype=int)

    def unflatten(vector):
        parts = jnp.split(vector, ends[:-1])
        new = [
            jnp.reshape(part, x.shape).astype(x.dtype)
            for part, x in zip(parts, leaves, strict=False)
        ]
        return eqx.combine(jax.tree.unflatten(structure, new), rest)

    flat = [jnp.ravel(x).astype(dtype) for x in leaves]
    return jnp.concatenate([jnp.zeros(0, dtype), *flat]), unflatten
