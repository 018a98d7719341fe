r"""One use of a layer: its linear part, and the statistics of that use.

The sums run over *rows*. A use of a layer has one row for each vector that the weight
is multiplied by:

| use | `x` | rows of `x` | rows of `g` |
|---|---|---|---|
| `W @ x`, a vector | `(d_in,)` | `(1, d_in)` | `(1, d_out)` |
| `W @ x`, the columns of a matrix | `(d_in, n)` | `(n, d_in)` | `(n, d_out)` |
| a convolution | `(channels, *space)` | `(positions, d_in)` | `(positions, d_out)` |

In a convolution a row of `x` is a patch: `d_in = channels * prod(kernel_size)`. If the
layer has a bias, each row of `x` gets one more entry, the input of the bias.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .factors import Statistics


class Level(NamedTuple):
    """One `vmap` around a use: its size, and which arguments have an axis for it.

    The sweep of a solve gives every sample its own `offset`, but samples share the
    probes, so that their statistics are summed.
    """

    size: int
    weight: bool
    x: bool
    offset: bool
    probes: bool


@dataclass(frozen=True)
class Use:
    """The static description of one use of a layer.

    - `key`: the layer's name.
    - `conv`: the tree structure of an `eqx.nn.Conv`, or `None` for a matrix.
    - `one`: the input that belongs to the bias: 1, 0, or `None` if there is no bias.
    - `reduction`: how the rows of one use are combined, see
      `nodegrad.value_grad_and_curvature`.
    - `samples`: how many samples there are in the batch.
    - `shape`, `out_shape`: the shapes of `x` and of `h`, without levels. A transposed
      use takes an array of `out_shape` to one of `shape`.
    - `dtype`: the dtype of the statistics.
    - `transposed`: whether this is a product with the transpose.
    - `levels`: the `vmap`s around it, outermost first.
    """

    key: str
    conv: Any
    one: float | None
    reduction: str
    samples: int
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: Any
    transposed: bool = False
    levels: tuple[Level, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The leading axes of the result: it has one for each level."""
        return tuple(level.size for level in self.levels)

    @property
    def linear(self) -> "Use":
        """The use of a tangent of `x`: the input of the bias is constant."""
        return replace(self, one=None if self.one is None else 0.0)

    @property
    def transpose(self) -> "Use":
        """The use of a cotangent of `h`, which has an axis for every level."""
        levels = tuple(level._replace(x=True) for level in self.levels)
        return replace(self.linear, transposed=not self.transposed, levels=levels)

    def apply(self, weight: Array, x: Array) -> Array:
        r"""Returns $W * x$ or $W^\top * x$, with an axis for every level in front."""
        fn = self._apply
        # The innermost `vmap` is applied first.
        for size, w, x_, *_ in reversed(self.levels):
            fn = _over(fn, size, (w, x_))
        return fn(weight, x)

    def _apply(self, weight: Array, x: Array) -> Array:
        """The product without levels."""

        def forward(x: Array) -> Array:
            return _forward(self.conv, weight, x)

        if not self.transposed:
            return forward(x)
        example = jax.ShapeDtypeStruct(self.shape, x.dtype)
        (out,) = jax.linear_transpose(forward, example)(x)
        return out

    def statistics(self, x: Array, ct: Array, offset: Array) -> Statistics:
        """The statistics, summed over the levels for which the probes have no axis.

        `ct` is the cotangent of the result of `apply`, and has an axis for every level.
        """
        fn = self._weight_and_rows
        for size, _, x_, offset_, _ in reversed(self.levels):
            fn = _over(fn, size, (x_, True, offset_))
        # (*sizes,), (*sizes, rows, d_in), (*sizes, rows, d_out)
        weight, x, g = fn(x, ct, offset)
        num_rows = x.shape[-2]
        if self.reduction == "reduce":
            # The rows share the weight: average x and sum g before the outer products.
            x = jnp.mean(x, axis=-2, keepdims=True)
            g = jnp.sum(g, axis=-2, keepdims=True)
        # The sum of all outer products is one product of matrices: levels without
        # probes are contracted with the rows. (Merged into one axis, they would be
        # gathered on every device if a level is sharded.)
        kept = [i for i, level in enumerate(self.levels) if level.probes]
        rows = tuple(i for i in range(x.ndim - 1) if i not in kept)
        dims = (rows, rows), (kept, kept)
        weight = jnp.broadcast_to(weight[..., None, None], (*x.shape[:-1], 1))
        weighted_x, weighted_g = weight * x, weight * g
        # Rows that were averaged still count, and enter into the sum of the inputs.
        scale = num_rows if self.reduction == "reduce" else 1
        return Statistics(
            inputs=jax.lax.dot_general(weighted_x, x, dims),
            outputs=jax.lax.dot_general(weighted_g, g, dims),
            count=scale * jnp.sum(weight, axis=(*rows, -1)),
            x_sum=scale * jnp.sum(weighted_x, axis=rows),
            g_sum=jnp.sum(weighted_g, axis=rows),
        )

    def _weight_and_rows(
        self, x: Array, ct: Array, offset: Array
    ) -> tuple[Array, Float[Array, "rows d_in"], Float[Array, "rows d_out"]]:
        """The weight of a use without levels, and its rows, in the dtype of sums."""
        # Cotangents of zero are not a use, see `layer_product.py`.
        is_used = jnp.any(ct != 0).astype(offset.dtype)
        weight = jnp.where(offset == 0, is_used, jnp.maximum(offset, 0))
        weight = weight.astype(self.dtype)
        # Of W^T * x the argument is a cotangent of h, and `ct` belongs to the inputs.
        x, g = (ct, x) if self.transposed else (x, ct)
        x, g = self._patches(x).astype(self.dtype), _rows(g).astype(self.dtype)
        if self.one is not None:
            x = jnp.concatenate([x, jnp.full_like(x[:, :1], self.one)], axis=1)
        return weight, x, g

    def _patches(self, x: Array) -> Float[Array, "rows d_in"]:
        """The rows of `x`, without the input of the bias."""
        if self.conv is None:
            return _rows(x)
        # Convolve with weights that have a single one each: output channel i is the
        # i-th entry of every patch. Padding, strides and dilation are those of the
        # layer, because it is the layer that is called.
        conv = jax.tree.unflatten(self.conv, [None] * self.conv.num_leaves)
        shape = conv.in_channels, *conv.kernel_size
        size = math.prod(shape)
        eye = jnp.eye(size, dtype=x.dtype).reshape(size, *shape)
        return _rows(_forward(self.conv, eye, x))


def _forward(conv: Any, weight: Array, x: Array) -> Array:
    """`W * x`; `conv` is as in `Use`. A bias is replaced by zeros."""
    if conv is None:
        return weight @ x
    leaves = [weight]
    if conv.num_leaves == 2:
        bias_shape = (len(weight),) + (1,) * (x.ndim - 1)
        leaves.append(jnp.zeros(bias_shape, weight.dtype))
    return jax.tree.unflatten(conv, leaves)(x)


def _rows(x: Array) -> Float[Array, "rows d"]:
    """The axes of `(d, *positions)` but the first one as rows; of a vector, one row."""
    return x.reshape(len(x), -1).T


def _over(fn: Callable, size: int, mapped: tuple[bool, ...]) -> Callable:
    """`fn` under a `vmap` of `size`; results get an axis even if nothing is mapped."""
    axes = (0, *(0 if m else None for m in mapped))
    over = jax.vmap(lambda _, *args: fn(*args), in_axes=axes)
    return lambda *args: over(jnp.zeros(size), *args)
