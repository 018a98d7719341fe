"""How large states are, as a whole and number by number.

The components of a state may have very different scales, so that one of them can be
garbage without the norm of all taking notice; hence the relative sizes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


# A component smaller than this many units of rounding of the largest one is noise.
_ROUNDING = 1e3


def size(tree: PyTree[Array]) -> Array:
    """The root mean square of all numbers in `tree`."""
    top = _top(tree)
    # Squares of large and of small numbers are out of range before the numbers are.
    safe = jnp.where(top == 0, 1, top)
    scaled = jax.tree.map(lambda x: x / safe.astype(_real(x)), tree)
    count = max(1, sum(x.size for x in jax.tree.leaves(tree)))
    return top * jnp.sqrt(dot(scaled, scaled) / count)


def magnitudes(*trees: PyTree[Array]) -> PyTree[Array]:
    """The largest absolute values, number by number."""
    largest = lambda *xs: functools.reduce(jnp.maximum, map(jnp.abs, xs))
    return jax.tree.map(largest, *trees)


def ratios(tree: PyTree[Array], scale: PyTree[Array]) -> PyTree[Array]:
    """`tree` divided by `scale` number by number, where that is more than noise."""
    top = _top(scale)

    def ratio(x, s):
        floor = _ROUNDING * jnp.finfo(s.dtype).eps * top
        return jnp.where(x == 0, 0, x / jnp.maximum(s, floor.astype(s.dtype)))

    return jax.tree.map(ratio, tree, scale)


def relative_size(tree: PyTree[Array], scale: PyTree[Array]) -> Array:
    """The root mean square of the `ratios`."""
    return size(ratios(tree, scale))


def dot(x: PyTree[Array], y: PyTree[Array]) -> Array:
    """The real inner product of two trees."""
    products = jax.tree.map(lambda a, b: jnp.sum(jnp.real(jnp.conj(a) * b)), x, y)
    return _reduced(jnp.add, products)


def _top(tree: PyTree[Array]) -> Array:
    """The largest absolute value of all."""
    tops = jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0), tree)
    return _reduced(jnp.maximum, tops)


def _reduced(combine, numbers: PyTree[Array]) -> Array:
    """One of real numbers of several types, in the widest of them."""
    leaves = jax.tree.leaves(numbers)
    dtypes = [x.dtype for x in leaves] or [jnp.finfo(float).dtype]
    dtype: Any = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
    return functools.reduce(
        combine, [x.astype(dtype) for x in leaves], jnp.zeros((), dtype)
    )


def _real(x: Array) -> Any:
    return jnp.finfo(x.dtype).dtype
