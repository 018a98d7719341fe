"""Elementwise arithmetic, flattening and dtypes of pytrees of arrays."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .compat import Tracer


def as_arrays(tree: PyTree) -> PyTree:
    """Turns every number and NumPy array of `tree` into a JAX array."""
    return jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, tree)


def only_arrays(tree: PyTree) -> PyTree[Array]:
    """Returns `tree` with `None` for every leaf that is no array."""
    return eqx.filter(tree, eqx.is_array)


def with_fields(module: Any, **new: Any) -> Any:
    """Returns `module` with other fields, which may have other types.

    `dataclasses.replace` calls the constructor, which refuses a tangent of `None` where
    the annotations are checked at run time.
    """
    copy = object.__new__(type(module))
    for field in dataclasses.fields(module):
        value = new[field.name] if field.name in new else getattr(module, field.name)
        object.__setattr__(copy, field.name, value)
    return copy


def add(left: PyTree, right: PyTree) -> PyTree:
    """Returns `left + right`, leaf by leaf."""
    return jax.tree.map(jnp.add, left, right)


def where(pred: Array, yes: PyTree, no: PyTree) -> PyTree:
    """Returns `yes` where `pred` holds and `no` elsewhere, leaf by leaf.

    The axes of `pred` are the first axes of every leaf.
    """

    def select(a: Any, b: Any) -> Array:
        a = jnp.asarray(a)
        return jnp.where(
            jnp.reshape(pred, pred.shape + (1,) * (a.ndim - pred.ndim)), a, b
        )

    return jax.tree.map(select, yes, no)


def zeros_like(tree: PyTree) -> PyTree:
    """Returns zeros of the shapes and dtypes in `tree`, which may hold no arrays."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def filled_like(cotangent: PyTree, primal: PyTree) -> PyTree:
    """Replaces the leaves of `cotangent` that are `None` by zeros like `primal`."""
    # `cotangent` comes second, so that its `None` is a value and not a missing subtree.
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


def has_nan(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Returns whether there is a NaN in any leaf of `tree`."""
    out = jnp.array(False)
    for x in jax.tree.leaves(tree):
        out = out | jnp.any(jnp.isnan(x))
    return out


def is_traced(x: Any) -> bool:
    """Whether `x` is a tracer, whose value is not known during tracing."""
    return isinstance(x, Tracer)


def inexact_spec(tree: PyTree) -> PyTree[bool]:
    """Says for every leaf of `tree` whether it is an inexact array."""
    return jax.tree.map(eqx.is_inexact_array, tree)


def flatten(
    tree: PyTree, dtype: Any
) -> tuple[Float[Array, " size"], Callable[[Float[Array, " size"]], PyTree]]:
    """Concatenates the inexact arrays of `tree` to one vector of the given dtype.

    Returns the vector and a function from such a vector to a tree like `tree`. The
    other leaves of that tree are those of `tree`.
    """
    inexact, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(inexact)
    ends = np.cumsum([x.size for x in leaves], dtype=int)

    def unflatten(vector: Float[Array, " size"]) -> PyTree:
        parts = jnp.split(vector, ends[:-1])
        new = [
            jnp.reshape(part, x.shape).astype(x.dtype)
            for part, x in zip(parts, leaves, strict=False)
        ]
        return eqx.combine(jax.tree.unflatten(structure, new), rest)

    # The empty vector is for a tree without inexact arrays.
    flat = [jnp.ravel(x).astype(dtype) for x in leaves]
    return jnp.concatenate([jnp.zeros(0, dtype), *flat]), unflatten


def is_real(x: Any) -> bool:
    """Whether `x` is an array of real numbers (or the shape of one)."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def check_numbers(integers: bool = False, static: bool = False, **values: Any) -> None:
    """Raises a `TypeError` for values that are not real scalars, or not `integers`.

    Arrays count, also traced ones, unless the values have to be `static`.
    """
    kinds = [jnp.integer] if integers else [jnp.integer, jnp.floating]
    for name, x in values.items():
        fits = eqx.is_array_like(x) and jnp.shape(x) == ()
        # A static array would fail later, when it is hashed.
        fits = fits and not (static and isinstance(x, jax.Array | np.ndarray))
        if not fits or not any(jnp.issubdtype(jnp.result_type(x), k) for k in kinds):
            expected = "an integer" if integers else "a real number"
            known = " that is known before the solve" if static else ""
            msg = f"`{name}` must be {expected}{known}; got {x!r}."
            raise TypeError(msg)


def check_counts(*others: str | None, **values: Any) -> None:
    """Raises unless every value is a positive Python integer, or one of `others`."""
    for name, x in values.items():
        # `True` and `False` are integers in Python.
        is_integer = isinstance(x, int) and not isinstance(x, bool)
        if (is_integer and x > 0) or (isinstance(x, str | None) and x in others):
            continue
        expected = " or ".join(["a positive Python integer", *map(repr, others)])
        msg = f"`{name}` must be {expected}; got {x!r}."
        raise (ValueError if is_integer else TypeError)(msg)


def check_flag(name: str, value: Any) -> None:
    """Raises an error unless `value` is `True` or `False`."""
    # A static argument: an array, or the name of a mode, would pass as true.
    if not isinstance(value, bool):
        msg = f"`{name}` must be `True` or `False`; got {value!r}."
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


def widest(dtypes: Iterable[Any], default: Any = jnp.float32) -> Any:
    """The widest of floating point types; strict dtype promotion combines none.

    It is `default` if there are none.
    """
    bits = lambda dtype: jnp.finfo(dtype).bits
    return max(dtypes, key=bits, default=jnp.dtype(default))


def at_least_float32(dtype: Any) -> Any:
    """The type to sum and factorise numbers of type `dtype` in."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
