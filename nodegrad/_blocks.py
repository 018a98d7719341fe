"""The derivatives that `hessian_blocks` and `theorem1_blocks` return."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


class HessianBlocks(eqx.Module):
    r"""A loss and its first and second derivatives, structured as `jax.hessian` does.

    `value`, `grad_y`, `grad_args`, `hess_yy`, `hess_yargs` and `hess_argsargs`; in the
    notation of the paper $Q, Q_x, Q_u, Q_{xx}, Q_{xu}, Q_{uu}$. A second derivative is
    a pytree of pytrees: for each leaf of the first argument, a pytree like the second
    one, whose leaves have the shapes of both. Leaves of `args` that are not floating
    point arrays are `None`. Blocks along `ts` have a leading axis for them. All numbers
    have the widest type of `y0` and `args`.

    **Arguments:** those fields, filled by `nodegrad.hessian_blocks` or
    `nodegrad.theorem1_blocks`.

    **Cost:** $(m + n)^2$ numbers for $m$ of the state and $n$ of `args`.
    """

    value: Array
    grad_y: PyTree[Array]
    grad_args: PyTree[Array]
    hess_yy: PyTree[Array]
    hess_yargs: PyTree[Array]
    hess_argsargs: PyTree[Array]


def structured(
    value: Array,
    gradient: Array,
    hessian: Array,
    y0: PyTree[Array],
    args: PyTree,
) -> HessianBlocks:
    """The blocks of a flat gradient and Hessian in `(y0, args)`.

    `value`, `gradient` and `hessian` may all have one more leading axis, for times.
    """
    y0, args = eqx.filter((y0, args), eqx.is_inexact_array)
    axis = gradient.ndim - 1
    size = sum(x.size for x in jax.tree.leaves(y0))

    def block(matrix: Array, rows: PyTree[Array], columns: PyTree[Array]):
        split_columns = lambda x: _split(x, x.ndim - 1, columns)
        return jax.tree.map(split_columns, _split(matrix, axis, rows))

    upper, lower = jnp.split(hessian, [size], axis)
    return HessianBlocks(
        value=value,
        grad_y=_split(gradient[..., :size], axis, y0),
        grad_args=_split(gradient[..., size:], axis, args),
        hess_yy=block(upper[..., :size], y0, y0),
        hess_yargs=block(upper[..., size:], y0, args),
        hess_argsargs=block(lower[..., size:], args, args),
    )


def _split(array: Array, axis: int, like: PyTree[Array]) -> PyTree[Array]:
    """`array` as a pytree like `like`, with `axis` in the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves], dtype=int)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    parts = [
        jnp.reshape(part, before + x.shape + after)
        for part, x in zip(jnp.split(array, ends[:-1], axis), leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, parts)
