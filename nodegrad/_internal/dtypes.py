"""Tests the dtypes of arrays."""

from typing import Any

import jax.numpy as jnp


def is_real(x: Any) -> bool:
    """Whether `x` is an array of real numbers (or the shape of one)."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def at_least_float32(dtype: Any) -> Any:
    """The type to sum and factorise numbers of type `dtype` in."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
