r"""The product of a weight and an input, which can be asked for its curvature.

`layer_product` is the linear part $h = W * x$ of a layer (a product, or a convolution).
It also depends on *probes*: arrays of zeros that it does not use. What comes back in
reverse mode as the "gradient" of a probe is no derivative but a statistic of the use:
$\sum x x^\top$, $\sum g g^\top$ (with $g$ the cotangent of $h$), how many they are, and
$\sum x$, $\sum g$. Like any cotangent, statistics add up over all uses of a layer, and
under `vmap`, `scan`, `cond` and `jit`.

Their weight is set by the value of the probe `offset`: `offset - 1`; or, where that is
zero as everywhere outside of a sweep, one. But then a use whose cotangents are zero
throughout has none, sample by sample: JAX may well pull zeros back through a branch
that leads nowhere.

Being a primitive, `layer_product` survives forward and reverse mode *inside* a vector
field, as in the trace of its Jacobian (continuous normalising flows): the products with
tangents, $W * \dot x$, and with cotangents, $W^\top * \bar h$, are layer products of
the same probes. In a transposed use the roles are swapped, and neither is shifted by
the bias.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._internal.compat import ad, batching, mlir, Primitive, ShapedArray


class Level(NamedTuple):
    """One `vmap` around a use: its size, and what has an axis for it."""

    size: int
    weight: bool
    x: bool
    offset: bool
    probes: bool


@dataclass(frozen=True)
class Use:
    """All that is static about a use of a layer.

    - `key`: the layer's name.
    - `conv`: the tree structure of an `eqx.nn.Conv`, or `None` for a matrix.
    - `one`: the input that belongs to the bias: 1, 0, or `None` if there is no bias.
    - `reduction`: what becomes of inputs that share the layer, see
      `nodegrad.value_grad_and_curvature`.
    - `samples`: how many samples there are in the batch.
    - `shape`, `out_shape`, `dtype`: of `x`, of `h`, and of the statistics.
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
        """The leading axes of the result."""
        return tuple(level.size for level in self.levels)

    @property
    def linear(self) -> "Use":
        """The use of a tangent."""
        return replace(self, one=None if self.one is None else 0.0)

    @property
    def transpose(self) -> "Use":
        """The use of a cotangent, which has an axis for every level."""
        levels = tuple(level._replace(x=True) for level in self.levels)
        return replace(self.linear, transposed=not self.transposed, levels=levels)

    def apply(self, weight: Array, x: Array) -> Array:
        r"""$W * x$, or $W^\top * x$, of everything in the batch."""
        fn = self._apply
        for size, w, x_, *_ in reversed(self.levels):
            fn = _over(fn, size, (w, x_))
        return fn(weight, x)

    def _apply(self, weight: Array, x: Array) -> Array:
        forward = lambda x: _forward(self.conv, weight, x)
        if not self.transposed:
            return forward(x)
        example = jax.ShapeDtypeStruct(self.shape, x.dtype)
        (out,) = jax.linear_transpose(forward, example)(x)
        return out

    def statistics(self, x: Array, ct: Array, offset: Array) -> tuple[Array, ...]:
        """The five statistics, summed over levels where the probes have no axis."""
        fn = self._statistics
        for size, _, x_, offset_, probes in reversed(self.levels):
            fn = _over(fn, size, (x_, True, offset_))
            if not probes:
                fn = _summed(fn)
        return fn(x, ct, offset)

    def _statistics(self, x: Array, ct: Array, offset: Array) -> tuple[Array, ...]:
        is_used = jnp.any(ct != 0).astype(offset.dtype)
        weight = jnp.where(offset == 0, is_used, offset - 1)
        x, g = (ct, x) if self.transposed else (x, ct)
        x, g = self._patches(x).astype(self.dtype), _rows(g).astype(self.dtype)
        if self.one is not None:
            x = jnp.concatenate([x, jnp.full_like(x[:, :1], self.one)], axis=1)
        x_sum, g_sum = jnp.sum(x, axis=0), jnp.sum(g, axis=0)
        if self.reduction == "reduce":
            mean = x_sum / len(x)
            inputs, outputs = jnp.outer(mean, mean), jnp.outer(g_sum, g_sum)
        else:
            inputs, outputs = x.T @ x, g.T @ g
        count = jnp.asarray(len(x), self.dtype)
        return tuple(weight * s for s in (inputs, outputs, count, x_sum, g_sum))

    def _patches(self, x: Array) -> Array:
        """What the rows of the weight are multiplied with: `(positions, d_in)`."""
        if self.conv is None:
            return _rows(x)
        # A convolution with the unit weights picks their entries from `x`.
        conv = jax.tree.unflatten(self.conv, [None] * self.conv.num_leaves)
        shape = conv.in_channels, *conv.kernel_size
        size = math.prod(shape)
        eye = jnp.eye(size, dtype=x.dtype).reshape(size, *shape)
        return _rows(_forward(self.conv, eye, x))


def _forward(conv: Any, weight: Array, x: Array) -> Array:
    if conv is None:
        return weight @ x
    leaves = [weight]
    if conv.num_leaves == 2:
        bias_shape = (len(weight),) + (1,) * (x.ndim - 1)
        leaves.append(jnp.zeros(bias_shape, weight.dtype))
    return jax.tree.unflatten(conv, leaves)(x)


def _rows(x: Array) -> Array:
    """`(d, *positions)` as `(positions, d)`."""
    return x.reshape(len(x), -1).T


def _over(fn: Callable, size: int, mapped: tuple[bool, ...]) -> Callable:
    if any(mapped):
        axes = tuple(0 if m else None for m in mapped)
        return jax.vmap(fn, in_axes=axes, axis_size=size)

    def repeated(*args):
        repeat = lambda x: jnp.broadcast_to(x, (size, *x.shape))
        return jax.tree.map(repeat, fn(*args))

    return repeated


def _summed(fn: Callable) -> Callable:
    return lambda *args: jax.tree.map(lambda x: jnp.sum(x, axis=0), fn(*args))


# `layer_product_p(weight, x, offset, *probes)` is the product, and
# `zero_p(x, offset, *probes)` is zero: the derivative of the former with respect to
# the probes. It is linear in these, and its transpose is the statistics.

layer_product_p = Primitive("nodegrad_layer_product")
zero_p = Primitive("nodegrad_zero")


def layer_product(
    use: Use, weight: Array, x: Array, offset: Array, probes: list[Array]
) -> Array:
    """The product of `weight` and `x`, with `probes` for its statistics."""
    return layer_product_p.bind(weight, x, offset, *probes, use=use)


@layer_product_p.def_impl
def _layer_product(weight, x, offset, *probes, use):
    del offset, probes
    return use.apply(weight, x)


@layer_product_p.def_abstract_eval
def _shape(weight, x, offset, *probes, use):
    del offset, probes
    struct = lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    out = jax.eval_shape(use.apply, struct(weight), struct(x))
    return ShapedArray(out.shape, out.dtype)


def _no_tangent(out: Any) -> Any:
    return ad.Zero(jax.typeof(out).to_tangent_aval())


def _jvp(primals, tangents, *, use):
    weight, x, offset, *probes = primals
    t_weight, t_x, _, *t_probes = tangents
    out = layer_product_p.bind(*primals, use=use)
    parts = []
    if type(t_x) is not ad.Zero:
        parts.append(layer_product_p.bind(weight, t_x, offset, *probes, use=use.linear))
    if type(t_weight) is not ad.Zero:
        parts.append(use.apply(t_weight, x))
    if not all(type(t) is ad.Zero for t in t_probes):
        t_probes = map(ad.instantiate_zeros, t_probes)
        parts.append(zero_p.bind(x, offset, *t_probes, use=use, dtype=out.dtype))
    if not parts:
        return out, _no_tangent(out)
    return out, sum(parts[1:], parts[0])


def _transpose(ct, weight, x, offset, *probes, use):
    assert ad.is_undefined_primal(x)
    if type(ct) is ad.Zero:
        ct_x = ad.Zero(x.aval)
    else:
        ct_x = layer_product_p.bind(weight, ct, offset, *probes, use=use.transpose)
        axes = tuple(i for i, level in enumerate(use.levels) if not level.x)
        ct_x = jnp.sum(ct_x, axis=axes)
    return [None, ct_x, None, *(None for _ in probes)]


def _batch(args, dims, *, use):
    size = _size(args, dims)
    weight, x, offset, *probes = zip(args, dims, strict=True)
    (weight, has_weight), (x, has_x) = _front([weight], size), _front([x], size)
    (offset, has_offset), (probes, has_probes) = (
        _front([offset], size),
        _front(probes, size),
    )
    level = Level(size, has_weight, has_x, has_offset, has_probes)
    use = replace(use, levels=(level, *use.levels))
    return layer_product_p.bind(*weight, *x, *offset, *probes, use=use), 0


def _size(args, dims) -> int:
    return next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)


def _front(args__dims, size: int) -> tuple[list[Array], bool]:
    """Arrays with their batch axis in front, if any of them has one."""
    if all(dim is None for _, dim in args__dims):
        return [x for x, _ in args__dims], False
    repeat = lambda x: jnp.broadcast_to(x, (size, *x.shape))
    front = lambda x, dim: repeat(x) if dim is None else jnp.moveaxis(x, dim, 0)
    return [front(x, dim) for x, dim in args__dims], True


ad.primitive_jvps[layer_product_p] = _jvp
ad.primitive_transposes[layer_product_p] = _transpose
batching.primitive_batchers[layer_product_p] = _batch
mlir.register_lowering(
    layer_product_p, mlir.lower_fun(_layer_product, multiple_results=False)
)


def _zero_result_shape(use: Use) -> tuple[int, ...]:
    return use.sizes + (use.shape if use.transposed else use.out_shape)


@zero_p.def_impl
def _zero(x, offset, *probes, use, dtype):
    del x, offset, probes
    return jnp.zeros(_zero_result_shape(use), dtype)


@zero_p.def_abstract_eval
def _zero_shape(x, offset, *probes, use, dtype):
    del x, offset, probes
    return ShapedArray(_zero_result_shape(use), dtype)


def _zero_jvp(primals, tangents, *, use, dtype):
    x, offset, *_ = primals
    _, _, *t_probes = tangents
    out = zero_p.bind(*primals, use=use, dtype=dtype)
    if all(type(t) is ad.Zero for t in t_probes):
        return out, _no_tangent(out)
    t_probes = map(ad.instantiate_zeros, t_probes)
    return out, zero_p.bind(x, offset, *t_probes, use=use, dtype=dtype)


def _zero_transpose(ct, x, offset, *probes, use, dtype):
    del dtype
    if type(ct) is ad.Zero:
        cts = [ad.Zero(probe.aval) for probe in probes]
    else:
        cts = use.statistics(x, ct, offset)
    return [None, None, *cts]


def _zero_batch(args, dims, *, use, dtype):
    size = _size(args, dims)
    x, offset, *probes = zip(args, dims, strict=True)
    (x, has_x), (offset, has_offset) = _front([x], size), _front([offset], size)
    probes, has_probes = _front(probes, size)
    level = Level(size, False, has_x, has_offset, has_probes)
    use = replace(use, levels=(level, *use.levels))
    return zero_p.bind(*x, *offset, *probes, use=use, dtype=dtype), 0


ad.primitive_jvps[zero_p] = _zero_jvp
ad.primitive_transposes[zero_p] = _zero_transpose
batching.primitive_batchers[zero_p] = _zero_batch
mlir.register_lowering(zero_p, mlir.lower_fun(_zero, multiple_results=False))
