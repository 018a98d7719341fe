r"""The linear part of a layer, as a primitive that reports statistics in reverse mode.

`layer_product` computes $h = W * x$, the linear part of a layer (a matrix product or a
convolution). It also takes five *probes*: arrays of zeros that do not change $h$. The
cotangents of the probes are not derivatives, but statistics of this use of the layer
(see `use.py`): $\sum x x^\top$, $\sum g g^\top$, the number of terms, $\sum x$ and
$\sum g$, where $g$ is the cotangent of $h$. Like all cotangents they are summed over
the uses of a layer, also under `vmap`, `scan`, `cond` and `jit`.

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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._internal.batch import in_front, mapped_size
from .._internal.compat import ad, batching, mlir, Primitive, ShapedArray
from .factors import Statistics
from .use import Level, Use


# In the rules of the primitives. A tangent or a cotangent is an array or JAX's symbolic
# zero, `ad.Zero`, and what a transpose is taken of is an `ad.UndefinedPrimal`: `Any`.
Aval = ShapedArray
Arrays = Sequence[Array]
# The batch axis of each argument, or `None` if it has none.
Dims = Sequence[int | None]


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
