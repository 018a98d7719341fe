r"""The linear part of a layer, as a primitive that reports statistics in reverse mode.

`layer_product` computes $h = W * x$, the linear part of a layer (a matrix product or a
convolution). It also takes five *probes*: arrays of zeros that do not change $h$. The
cotangents of the probes are not derivatives, but statistics of this use of the layer
(see `Statistics`): $\sum x x^\top$, $\sum g g^\top$, the number of terms, $\sum x$ and
$\sum g$, where $g$ is the cotangent of $h$. Like all cotangents they are summed over
the uses of a layer, also under `vmap`, `scan`, `cond` and `jit`.

The sums run over *rows*. A use of a layer has one row for each vector that the weight
is multiplied by:

| use | `x` | rows of `x` | rows of `g` |
|---|---|---|---|
| `W @ x`, a vector | `(d_in,)` | `(1, d_in)` | `(1, d_out)` |
| `W @ x`, the columns of a matrix | `(d_in, n)` | `(n, d_in)` | `(n, d_out)` |
| a convolution | `(channels, *space)` | `(positions, d_in)` | `(positions, d_out)` |

In a convolution a row of `x` is a patch: `d_in = channels * prod(kernel_size)`. If the
layer has a bias, each row of `x` gets one more entry, the input of the bias.

One more argument, `offset`, sets the weight of a use in these sums. The backward sweep
of a solve sets it to the weight of a quadrature rule in time, or to -1 for none.
Everywhere else it is zero, like the probes. There a use has weight one; or zero if its
cotangents (under `vmap`: those of one sample) are all zero, because JAX also evaluates
pullbacks of values that do not influence the loss, and these do not count as uses.

`layer_product` is a primitive, so that forward and reverse mode also work *inside* a
vector field, for example in the trace of its Jacobian (continuous normalising flows).
The products with tangents, $W * \dot x$, and with cotangents, $W^\top * \bar h$, are
layer products with the same probes. In the latter $x$ and $g$ change places. The input
of the bias is zero in both.
"""

import functools as ft
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._internal.batch import in_front, mapped_size
from .._internal.compat import ad, batching, mlir, Primitive, ShapedArray


# In the rules of the primitives. A tangent or a cotangent is an array or JAX's symbolic
# zero, `ad.Zero`, and what a transpose is taken of is an `ad.UndefinedPrimal`: `Any`.
Aval = ShapedArray
Arrays = Sequence[Array]
# The batch axis of each argument, or `None` if it has none.
Dims = Sequence[int | None]


class Statistics(NamedTuple):
    r"""The statistics of a layer; also their probes, or the positions of these.

    - `inputs`: $\sum x x^\top$, of shape `(d_in, d_in)`.
    - `outputs`: $\sum g g^\top$, of shape `(d_out, d_out)`.
    - `count`: the number of rows, a scalar.
    - `x_sum`: $\sum x$, of shape `(d_in,)`.
    - `g_sum`: $\sum g$, of shape `(d_out,)`.

    `d_in` counts the input of the bias, which comes last.
    """

    # Not generic: run-time type checkers cannot check a generic named tuple.
    inputs: Any
    outputs: Any
    count: Any
    x_sum: Any
    g_sum: Any


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
        # Cotangents of zero are not a use, see above.
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


# `layer_product_p(weight, x, offset, *probes)` is the product. `zero_p(x, offset,
# *probes)` is its derivative with respect to the probes: a zero of the shape of the
# product. It is linear in the probes, and its transpose is the statistics.

layer_product_p = Primitive("nodegrad_layer_product")
zero_p = Primitive("nodegrad_zero")


def layer_product(
    use: Use, weight: Array, x: Array, offset: Array, probes: Statistics
) -> Array:
    """The product of `weight` and `x`, with `probes` for its statistics."""
    return layer_product_p.bind(weight, x, offset, *probes, use=use)


@layer_product_p.def_impl
def _layer_product(
    weight: Array, x: Array, offset: Array, *probes: Array, use: Use
) -> Array:
    del offset, probes
    return use.apply(weight, x)


@layer_product_p.def_abstract_eval
def _shape(weight: Aval, x: Aval, offset: Aval, *probes: Aval, use: Use) -> Aval:
    del offset, probes

    def struct(aval: Aval) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    out = jax.eval_shape(use.apply, struct(weight), struct(x))
    return ShapedArray(out.shape, out.dtype)


def _no_tangent(out: Array) -> ad.Zero:
    return ad.Zero(jax.typeof(out).to_tangent_aval())


def _jvp(primals: Arrays, tangents: Any, *, use: Use) -> tuple[Array, Any]:
    weight, x, offset, *probes = primals
    t_weight, t_x, _, *t_probes = tangents
    out = layer_product_p.bind(*primals, use=use)
    parts = []
    if type(t_x) is not ad.Zero:
        # With the probes, since this is a use, too, if the vector field is itself made
        # of derivatives of the layer.
        parts.append(layer_product_p.bind(weight, t_x, offset, *probes, use=use.linear))
    if type(t_weight) is not ad.Zero:
        # Without the probes: this is the ordinary derivative.
        parts.append(use.apply(t_weight, x))
    if not all(type(t) is ad.Zero for t in t_probes):
        t_probes = map(ad.instantiate_zeros, t_probes)
        parts.append(zero_p.bind(x, offset, *t_probes, use=use, dtype=out.dtype))
    if not parts:
        return out, _no_tangent(out)
    return out, sum(parts[1:], parts[0])


def _transpose(
    ct: Any, weight: Array, x: Any, offset: Array, *probes: Array, use: Use
) -> list[Any]:
    # Only `_jvp` makes products that are transposed, and they are linear in `x` alone.
    assert ad.is_undefined_primal(x)
    if type(ct) is ad.Zero:
        ct_x = ad.Zero(x.aval)
    else:
        ct_x = layer_product_p.bind(weight, ct, offset, *probes, use=use.transpose)
        # Results have an axis for every level, `x` may not.
        axes = tuple(i for i, level in enumerate(use.levels) if not level.x)
        ct_x = jnp.sum(ct_x, axis=axes).astype(x.aval.dtype)
    return [None, ct_x, None, *(None for _ in probes)]


def _batch(
    primitive: Primitive, args: Arrays, dims: Dims, *, use: Use, **params: Any
) -> tuple[Array, int]:
    size = mapped_size(args, dims)
    # `zero_p` has no weight.
    num = len(Statistics._fields)
    *weight, x, offset = zip(args[:-num], dims[:-num], strict=True)
    probes = list(zip(args[-num:], dims[-num:], strict=True))
    groups = [_front(group, size) for group in (weight, [x], [offset], probes)]
    # Rules for batching see the innermost `vmap` first, and this is the next one.
    level = Level(size, *(is_batched for _, is_batched in groups))
    use = replace(use, levels=(level, *use.levels))
    operands = [x for arrays, _ in groups for x in arrays]
    return primitive.bind(*operands, use=use, **params), 0


def _front(args__dims: Sequence[tuple], size: int) -> tuple[list[Array], bool]:
    """`(arrays, True)` with a leading batch axis, or `(arrays, False)` without any."""
    if all(dim is None for _, dim in args__dims):
        return [x for x, _ in args__dims], False
    return [in_front(x, dim, size) for x, dim in args__dims], True


ad.primitive_jvps[layer_product_p] = _jvp
ad.primitive_transposes[layer_product_p] = _transpose
batching.primitive_batchers[layer_product_p] = ft.partial(_batch, layer_product_p)
mlir.register_lowering(
    layer_product_p, mlir.lower_fun(_layer_product, multiple_results=False)
)


def _zero_result_shape(use: Use) -> tuple[int, ...]:
    return use.sizes + (use.shape if use.transposed else use.out_shape)


@zero_p.def_impl
def _zero(x: Array, offset: Array, *probes: Array, use: Use, dtype: Any) -> Array:
    del x, offset, probes
    return jnp.zeros(_zero_result_shape(use), dtype)


@zero_p.def_abstract_eval
def _zero_shape(x: Aval, offset: Aval, *probes: Aval, use: Use, dtype: Any) -> Aval:
    del x, offset, probes
    return ShapedArray(_zero_result_shape(use), dtype)


def _zero_jvp(
    primals: Arrays, tangents: Any, *, use: Use, dtype: Any
) -> tuple[Array, Any]:
    x, offset, *_ = primals
    _, _, *t_probes = tangents
    out = zero_p.bind(*primals, use=use, dtype=dtype)
    if all(type(t) is ad.Zero for t in t_probes):
        return out, _no_tangent(out)
    t_probes = map(ad.instantiate_zeros, t_probes)
    return out, zero_p.bind(x, offset, *t_probes, use=use, dtype=dtype)


def _zero_transpose(
    ct: Any, x: Array, offset: Array, *probes: Any, use: Use, dtype: Any
) -> list[Any]:
    del dtype
    if type(ct) is ad.Zero:
        cts = [ad.Zero(probe.aval) for probe in probes]
    else:
        cts = use.statistics(x, ct, offset)
    return [None, None, *cts]


ad.primitive_jvps[zero_p] = _zero_jvp
ad.primitive_transposes[zero_p] = _zero_transpose
batching.primitive_batchers[zero_p] = ft.partial(_batch, zero_p)
mlir.register_lowering(zero_p, mlir.lower_fun(_zero, multiple_results=False))
