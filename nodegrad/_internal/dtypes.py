"""Tests the dtypes of arrays."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def is_real(x: Any) -> bool:
    """Whether `x` is an array of real numbers (or the shape of one)."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def check_numbers(integers: bool = False, **values: Any) -> None:
    """Raises a `TypeError` for values that are not real scalars, or not `integers`.

    Arrays count, also traced ones.
    """
    kinds = [jnp.integer] if integers else [jnp.integer, jnp.floating]
    for name, x in values.items():
        fits = eqx.is_array_like(x) and jnp.shape(x) == ()
        if not fits or not any(jnp.issubdtype(jnp.result_type(x), k) for k in kinds):
            expected = "an integer" if integers else "a real number"
            msg = f"`{name}` must be {expected}; got {x!r}."
            raise TypeError(msg)


def check_unchanged(y0: PyTree[Array], y1: PyTree[Array]) -> None:
    """Raises an error if a step changes the shape or the dtype of a leaf of the state.

    `y0` and `y1` are the state before and after the step, of the same structure.
    """
    leaves, _ = jax.tree.flatten_with_path(y0)
    for (path, old), new in zip(leaves, jax.tree.leaves(y1), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            msg = (
                f"A step turns `y0{jax.tree_util.keystr(path)}` from {old.dtype}"
                f"{list(old.shape)} into {new.dtype}{list(new.shape)}. Check what the "
                "vector field and the terms return; if it is complex, pass a complex "
                "`y0`."
            )
            raise ValueError(msg)


def at_least_float32(dtype: Any) -> Any:
    """The type to sum and factorise numbers of type `dtype` in."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
