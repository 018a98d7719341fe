"""Norms of states, as a whole and entry by entry.

The entries of a state may have very different scales. Then an entry can be wrong by
many times its size with hardly any effect on the norm of the state. So there are also
sizes relative to a scale for each entry.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .tree import widest


# In `ratios`, an entry of the scale is at least this many units of rounding of the
# largest entry. Less would let rounding errors of entries near zero appear as large
# ratios; more would hide errors of small entries.
_ROUNDING = 1e3


def size(tree: PyTree[Array]) -> Array:
    """Returns the root mean square of all entries of `tree`, a scalar."""
    top = _top(tree)
    # Entries are divided by the largest one: the square of a large or small number may
    # overflow or underflow where the number does not.
    safe = jnp.where(top == 0, 1, top)
    scaled = jax.tree.map(lambda x: x / safe.astype(x.dtype), tree)
    count = max(1, sum(x.size for x in jax.tree.leaves(tree)))
    return top * jnp.sqrt(dot(scaled, scaled) / count)


def magnitudes(*trees: PyTree[Array]) -> PyTree[Array]:
    """Returns the largest absolute values among the `trees`, entry by entry."""
    largest = lambda *xs: functools.reduce(jnp.maximum, map(jnp.abs, xs))
    return jax.tree.map(largest, *trees)


def ratios(tree: PyTree[Array], scale: PyTree[Array]) -> PyTree[Array]:
    """Divides `tree` by `scale`, entry by entry; `_ROUNDING` bounds the scale below."""
    top = _top(scale)

    def ratio(x: Array, s: Array) -> Array:
        # 0 / 0, where all of the scale is zero, is 0.
        floor = _ROUNDING * float(jnp.finfo(s.dtype).eps) * top
        divisor = jnp.maximum(s, floor.astype(s.dtype)).astype(x.dtype)
        return jnp.where(x == 0, 0, x / divisor)

    return jax.tree.map(ratio, tree, scale)


def relative_size(tree: PyTree[Array], scale: PyTree[Array]) -> Array:
    """Returns the root mean square of the `ratios`, a scalar."""
    return size(ratios(tree, scale))


def dot(x: PyTree[Array], y: PyTree[Array]) -> Array:
    """Returns the real inner product of two trees, which may be complex."""
    products = jax.tree.map(lambda a, b: jnp.sum(jnp.real(jnp.conj(a) * b)), x, y)
    return _reduced(jnp.add, products)


def _top(tree: PyTree[Array]) -> Array:
    """Returns the largest absolute value in `tree`; 0 if `tree` is empty."""
    tops = jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0), tree)
    return _reduced(jnp.maximum, tops)


def _reduced(
    combine: Callable[[Array, Array], Array], numbers: PyTree[Float[Array, ""]]
) -> Float[Array, ""]:
    """Combines real scalars of several dtypes into one, of the widest dtype."""
    leaves = jax.tree.leaves(numbers)
    dtype = widest([x.dtype for x in leaves], jnp.finfo(float).dtype)
    return functools.reduce(
        combine, [x.astype(dtype) for x in leaves], jnp.zeros((), dtype)
    )
