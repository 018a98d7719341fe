"""`scale_by_gauss_newton`: exact Gauss-Newton steps for problems of few parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import ArrayLike, PyTree, Real

from .._internal.tree import at_least_float32


def scale_by_gauss_newton(
    damping: Real[ArrayLike, ""] = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient by the inverse of a damped low-rank curvature.

    The curvature is $P^\top P = \sum_k p_k p_k^\top$, where each *column* $p_k$ is a
    pytree like the parameters (and a row of $P$). By the Woodbury identity the step is

    $$(\lambda I + P^\top P)^{-1} g = \tfrac{1}{\lambda}
      \left[g - P^\top (\lambda I + P P^\top)^{-1} P g\right].$$

    The side with the smaller matrix is computed. For $n$ samples $b$ with output
    Hessians $H_b$, the columns $p_{bi} = J_b^\top (H_b / n)^{1/2} e_i$ of all samples
    and outputs $i$ give the Gauss-Newton method for the mean of the losses.

    ```python
    import jax
    import jax.numpy as jnp
    import nodegrad

    t = jnp.array([0.0, 1.0, 2.0])
    residuals = lambda p: p[0] + p[1] * t - (1 + 2 * t)
    loss = lambda p: 0.5 * jnp.sum(residuals(p) ** 2)
    p, optim = jnp.zeros(2), nodegrad.scale_by_gauss_newton(damping=1e-6)
    columns = jax.jacobian(residuals)(p)
    step, _ = optim.update(jax.grad(loss)(p), optim.init(p), columns=columns)
    print((p - step).round(2))  # [1. 2.]
    ```

    **Arguments:**

    - `damping`: $\lambda > 0$.

    **Returns:** an `optax.GradientTransformationExtraArgs`. Its `update` takes
    `columns`, a pytree like the parameters whose leaves have a leading axis for $k$.

    **Raises:** `ValueError` without `columns`, or if they do not fit the gradient.

    **Cost:** for $K$ columns and $n$ parameters, $n K \min(n, K)$ operations and the
    memory of the columns.

    **When not to use it:** for networks; take `nodegrad.snopt`. This is for fits of few
    parameters, and to measure the error of approximations of the curvature.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        Proposition 2; Korbit, Adeoye, Bemporad, Zanon: Exact Gauss-Newton Optimization
        for Training Deep Neural Networks, 2024, arXiv:2405.14402.
    """
    if isinstance(damping, int | float) and not damping > 0:
        msg = f"`damping` must be positive; got {damping}."
        raise ValueError(msg)

    # States are `Any` for type checkers: Optax's type of states excludes named tuples.
    def init_fn(params: PyTree) -> Any:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        columns: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del params, extra
        _check(updates, columns)
        # Factorise in float32 or better: g is (n,), p is (columns, n).
        as_better = lambda x: x.astype(at_least_float32(x.dtype))
        g, unravel = ravel_pytree(jax.tree.map(as_better, updates))
        p = jax.vmap(lambda c: ravel_pytree(jax.tree.map(as_better, c))[0])(columns)
        damp = jnp.asarray(damping).astype(g.dtype)
        ranks, size = p.shape
        # Solve with the smaller of the two Gram matrices; see the docstring.
        if ranks < size:
            inner = p @ p.T + damp * jnp.eye(ranks, dtype=g.dtype)
            step = (g - p.T @ jnp.linalg.solve(inner, p @ g)) / damp
        else:
            full = p.T @ p + damp * jnp.eye(size, dtype=g.dtype)
            step = jnp.linalg.solve(full, g)
        as_given = lambda new, old: new.astype(old.dtype)
        return jax.tree.map(as_given, unravel(step), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(updates: PyTree, columns: PyTree | None) -> None:
    """Raises `ValueError` unless `columns` are stacked trees like `updates`."""
    if columns is None:
        msg = (
            "`scale_by_gauss_newton` needs the columns of the curvature: "
            "`optim.update(grads, state, params, columns=columns)`."
        )
        raise ValueError(msg)

    def shapes(tree: PyTree, skip: int) -> PyTree:
        return jax.tree.map(lambda x: x.shape[skip:], tree)

    same = jax.tree.structure(updates) == jax.tree.structure(columns)
    if not same or shapes(updates, 0) != shapes(columns, 1):
        msg = (
            "`columns` must be like the gradient, with one leading axis for every "
            f"leaf: expected {shapes(updates, 0)} after it, got "
            f"{jax.tree.map(jnp.shape, columns)}."
        )
        raise ValueError(msg)
