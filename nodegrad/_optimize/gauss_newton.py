"""A Gauss-Newton step without any approximation but its rank, for small problems."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from .._internal.dtypes import at_least_float32


def scale_by_gauss_newton(
    damping: Any = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient by the inverse of a damped low-rank curvature.

    With rows $p_k$ (as columns of curvature, each like the parameters) the curvature
    is $P^\top P = \sum_k p_k p_k^\top$, and the step, by the Woodbury identity,

    $$(\lambda I + P^\top P)^{-1} g = \tfrac{1}{\lambda}
      \left[g - P^\top (\lambda I + P P^\top)^{-1} P g\right],$$

    whichever of the two inverses is the smaller. With
    $p_{bi} = J_b^\top (H_b / n)^{1/2} e_i$ for all samples $b$ of $n$ and outputs $i$,
    that is the Gauss-Newton method for the mean of losses with output Hessians $H_b$.

    **Arguments:**

    - `damping`: $\lambda > 0$.

    **Returns:** an `optax.GradientTransformationExtraArgs`. Its `update` takes
    `columns`, a pytree like the parameters whose leaves have a leading axis for $k$.

    **Raises:** `ValueError` without `columns`, or if they do not fit the gradient.

    **Cost:** for $K$ columns and $n$ parameters, $n K \min(n, K)$ operations and the
    memory of the columns.

    **When not to use it:** for networks; take `nodegrad.snopt`. This is for fits of a
    few parameters, and to see how far an approximation is from the real thing.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        Proposition 2; Korbit, Adeoye, Bemporad, Zanon: Exact Gauss-Newton Optimization
        for Training Deep Neural Networks, 2024, arXiv:2405.14402.
    """
    if isinstance(damping, int | float) and not damping > 0:
        msg = f"`damping` must be positive; got {damping}."
        raise ValueError(msg)

    def init_fn(params: PyTree) -> Any:
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, columns=None, **extra):
        del params, extra
        _check(updates, columns)
        as_better = lambda x: x.astype(at_least_float32(x.dtype))
        g, unravel = ravel_pytree(jax.tree.map(as_better, updates))
        p = jax.vmap(lambda c: ravel_pytree(jax.tree.map(as_better, c))[0])(columns)
        damp = jnp.asarray(damping).astype(g.dtype)
        ranks, size = p.shape
        if ranks < size:
            inner = p @ p.T + damp * jnp.eye(ranks, dtype=g.dtype)
            step = (g - p.T @ jnp.linalg.solve(inner, p @ g)) / damp
        else:
            full = p.T @ p + damp * jnp.eye(size, dtype=g.dtype)
            step = jnp.linalg.solve(full, g)
        as_given = lambda new, old: new.astype(old.dtype)
        return jax.tree.map(as_given, unravel(step), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(updates: PyTree, columns: PyTree) -> None:
    if columns is None:
        msg = (
            "`scale_by_gauss_newton` needs the columns of the curvature: "
            "`optim.update(grads, state, params, columns=columns)`."
        )
        raise ValueError(msg)
    shapes = lambda tree, skip: jax.tree.map(lambda x: x.shape[skip:], tree)
    same = jax.tree.structure(updates) == jax.tree.structure(columns)
    if not same or shapes(updates, 0) != shapes(columns, 1):
        msg = (
            "`columns` must be like the gradient, with one leading axis for every "
            f"leaf: expected {shapes(updates, 0)} after it, got "
            f"{jax.tree.map(jnp.shape, columns)}."
        )
        raise ValueError(msg)
