"""The cotangents of a model's outputs whose pullbacks make the curvature.

For every sample, the columns of a square root of the Hessian of its loss with respect
to its outputs, all of them or random combinations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from .._internal.tree import at_least_float32


def columns_of(
    of_outputs: Callable[[Array], Array] | None,
    out: Float[Array, "batch ..."],
    num_draws: Any,
    moments: bool,
    key: Array | None,
) -> tuple[Float[Array, " batch"], Float[Array, "batch ..."], Array]:
    r"""Returns `(losses, gradient, columns)` for the outputs `out` of the model.

    `gradient` is that of the sum of losses. `columns` are cotangents $y_{bk}$ to pull
    back, of shape `(columns, batch, ...)`. $\sum_k y_{bk} y_{bk}^\top$ is the Hessian
    $H_b$, exactly or in expectation.

    `of_outputs` are the losses as a function of `out`, or `None` for the empirical
    Fisher: then `out` are the losses, and the columns random signs.
    """
    if of_outputs is None:
        columns = _signs(key, num_draws, out)
        # Of n independent draws each has 1 / n of the sum of squares.
        columns = columns / jnp.sqrt(len(columns)).astype(out.dtype)
        return out, jnp.ones_like(out), columns
    losses, pull = jax.vjp(of_outputs, out)
    if losses.shape != (len(out),):
        msg = (
            "`loss(outputs, *args)` must return one loss for each sample, shape "
            f"({len(out)},); got shape {losses.shape}."
        )
        raise ValueError(msg)
    if num_draws == "exact":
        # (batch, size, size)
        root = _hessian_root(of_outputs, out)
        columns = jnp.moveaxis(root, -1, 0)
        if moments:
            # One sign for each column and sample. Outer products do not change, and in
            # the squares of `draws` the samples' cross terms vanish in expectation.
            columns = columns * _signs(key, len(columns), columns[0, :, :1])
    else:
        signs = _signs(key, num_draws, out.reshape(len(out), -1))
        columns = _combined_columns(of_outputs, out, signs)
        columns = columns / jnp.sqrt(num_draws).astype(out.dtype)
    return losses, *pull(jnp.ones_like(losses)), columns.reshape(-1, *out.shape)


def _signs(key: Array | None, num: int, like: Array) -> Float[Array, "num ..."]:
    """Returns `num` arrays of random signs in the shape of `like`."""
    if key is None:
        msg = (
            "The curvature needs random draws: pass `key`, as in `fn(model, *args, "
            "key=jax.random.PRNGKey(0))`."
        )
        raise ValueError(msg)
    return jr.rademacher(key, (num, *like.shape), like.dtype)


def _combined_columns(
    of_outputs: Callable[[Array], Array],
    out: Float[Array, "batch ..."],
    signs: Float[Array, "draws batch size"],
) -> Float[Array, "draws batch size"]:
    """Returns `R @ signs` for each sample, with `R @ R.T` the Hessian of its loss."""
    # A product with two vectors shows whether a Hessian is diagonal, as those of sums
    # of squares are. Then `R` is too, and no decomposition is needed: for a solve with
    # 100 outputs of size 2 that would take most of the time.
    size = signs.shape[-1]
    phase = jnp.arange(size, dtype=out.dtype)
    vectors = 1.5 + jnp.sin(phase), 1.5 + jnp.cos(jnp.sqrt(2.0) * phase)
    first, second = (_hessian_product(of_outputs, out, v) / v[None] for v in vectors)
    scale = jnp.max(jnp.abs(first), axis=-1, keepdims=True)
    rounding = 100 * jnp.finfo(out.dtype).eps * scale
    is_diagonal = jnp.all(jnp.abs(first - second) <= rounding)
    least = jnp.finfo(out.dtype).tiny
    return jax.lax.cond(
        is_diagonal,
        lambda: jnp.sqrt(jnp.maximum(first, least))[None] * signs,
        lambda: jnp.einsum("bij,kbj->kbi", _hessian_root(of_outputs, out), signs),
    )


def _hessian_product(
    of_outputs: Callable[[Array], Array],
    out: Float[Array, "batch ..."],
    vector: Float[Array, " size"],
) -> Float[Array, "batch size"]:
    """Returns the product of the Hessian of each loss in its outputs with `vector`."""
    # Each loss depends on its own output only. So one tangent gives the products of
    # all samples.
    gradient = jax.grad(lambda out: jnp.sum(of_outputs(out)))
    tangent = jnp.broadcast_to(vector.reshape(out.shape[1:]), out.shape)
    return jax.jvp(gradient, (out,), (tangent,))[1].reshape(len(out), -1)


def _hessian_root(
    of_outputs: Callable[[Array], Array], out: Float[Array, "batch ..."]
) -> Float[Array, "batch size size"]:
    """Returns `R` with `R @ R.T` the Hessian of each loss in its `size` outputs.

    Negative eigenvalues are replaced by (almost) zero.
    """
    units = jnp.eye(out[0].size, dtype=out.dtype)
    rows = jax.vmap(lambda unit: _hessian_product(of_outputs, out, unit))(units)
    hessian = jnp.moveaxis(rows, 0, 1)
    # LAPACK has no half precision.
    wide = at_least_float32(hessian.dtype)
    values, vectors = jnp.linalg.eigh(hessian.astype(wide))
    # Keep columns non-zero: a use whose cotangents are all zero is not counted (see
    # `layer_product.py`).
    least = float(jnp.finfo(hessian.dtype).tiny)
    root = vectors * jnp.sqrt(jnp.maximum(values, least))[:, None, :]
    return root.astype(hessian.dtype)
