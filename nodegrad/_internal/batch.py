"""Applies functions that are written for one solve to a batch of solves.

A recorded solve under `jax.vmap` keeps a stack of *levels*, one for every `vmap`,
outermost first. An array that belongs to one solve (its state, its step times) has an
axis for every level. An array that solves share (parameters, save times) has axes only
for the levels in which it differs: an ensemble of models over a batch of samples has
one set of parameters for each model. `Axes` says for which levels an array has axes.
These come first in its shape, in the order of the levels.

`take`, `put` and `set_row` read and write rows of the arrays of one solve. Under `vmap`
they are slices and not gathers or scatters, where all elements have the same row.
"""

import functools as ft
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .compat import ad, batching, mlir, Primitive, put_row, row_of, while_loop
from .tree import where, zeros_like


@dataclass(frozen=True)
class Axes:
    """Says for every level whether an array has an axis for it.

    It is a leaf of pytrees, so a pytree of arrays has a pytree of `Axes`.
    """

    batched: tuple[bool, ...]


class Batch(eqx.Module):
    """The levels that solves are mapped over; none for a single solve.

    The methods avoid `jax.vmap` for a single solve. Its loops then write their buffers
    in place, and no array is selected by a mask.

    - `sizes`: the size of every level, outermost first.
    """

    sizes: tuple[int, ...] = eqx.field(static=True, default=())

    def map(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Maps `fn`: its arguments and results then have all batch axes.

        An argument that is a scalar is one that all solves share.
        """
        return self.map_shared(lambda _, *args: fn(*args), (), ())

    def map_shared(
        self, fn: Callable[..., Any], shared: PyTree[Array], axes: PyTree[Axes]
    ) -> Callable[..., Any]:
        """Maps `fn(shared, *args)`; returns a function of `args` with all batch axes.

        `axes` has an `Axes` for every leaf of `shared`, in the same order. Scalars
        among `args` are shared as well.
        """
        leaves, structure = jax.tree.flatten(shared)
        levels_of = jax.tree.leaves(axes)

        def from_leaves(leaves: list[Array], args: tuple[PyTree, ...]) -> Any:
            return fn(jax.tree.unflatten(structure, leaves), *args)

        def mapped(*args: PyTree) -> Any:
            of_args = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, args)
            # The innermost level is mapped first: its axis is the last one of arrays.
            out = from_leaves
            for level in reversed(range(len(self.sizes))):
                in_axes = [0 if a.batched[level] else None for a in levels_of], of_args
                out = jax.vmap(out, in_axes=in_axes, axis_size=self.sizes[level])
            return out(leaves, args)

        return mapped if self.sizes else ft.partial(fn, shared)

    def expand(self, x: Array, axes: Axes, to: Axes) -> Array:
        """Broadcasts `x` from `axes` to `to`, which includes all of `axes`."""
        # Position in the shape of `x` of the axis of the level at hand.
        axis = 0
        for size, has, wants in zip(self.sizes, axes.batched, to.batched, strict=True):
            if wants and not has:
                x = jnp.expand_dims(x, axis)
                x = jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
            axis += wants
        return x

    def total(self, x: Array, axes: Axes, to: Axes) -> Array:
        """Sums `x` over the axes that are not in `to`: the transpose of `expand`."""
        pairs = [b for b in zip(axes.batched, to.batched, strict=True) if b[0]]
        away = tuple(i for i, (_, wanted) in enumerate(pairs) if not wanted)
        return jnp.sum(x, axis=away) if away else x

    def total_over_batch(self, tree: PyTree[Array], axes: PyTree[Axes]) -> PyTree:
        """Sums arrays with all batch axes to `axes`; `None` in `tree` stays `None`.

        So cotangents for each solve become those of arrays that solves share.
        """
        return jax.tree.map(
            lambda a, x: None if x is None else self.total(x, self.all_axes, a),
            axes,
            tree,
        )

    def any_that_share(
        self, marked: Bool[Array, "..."], axes: Axes
    ) -> Bool[Array, "..."]:
        """Says for every part of an array whether a solve that shares it is `marked`.

        `marked` has all batch axes, the result those of the array.
        """
        away = tuple(i for i, has in enumerate(axes.batched) if not has)
        return jnp.any(marked, axis=away) if away else marked

    @property
    def all_axes(self) -> Axes:
        """The axes of an array that belongs to one solve: all."""
        return Axes((True,) * len(self.sizes))

    def while_loop(
        self,
        is_active: Callable[[Any], Bool[Array, "..."]],
        body: Callable[[Any], Any],
        init: Any,
        buffers: Callable[[Any], PyTree] | None = None,
    ) -> Any:
        """Runs `body` while any solve is active.

        `is_active` returns an array with the batch axes, or a scalar. `body` must not
        change what belongs to inactive solves. `buffers` selects the arrays of the
        carry that are written row by row.
        """
        # Equinox's loop writes `buffers` in place, also where second derivatives of
        # several solves are mapped over. In a batch `put` writes the same row for all
        # solves, so JAX's loop needs no such help. It is faster to trace.
        if not self.sizes and buffers is not None:
            return while_loop(is_active, body, init, buffers=buffers, kind="lax")
        return jax.lax.while_loop(lambda c: jnp.any(is_active(c)), body, init)

    def take(self, tree: PyTree, row: Int[Array, ""]) -> PyTree:
        """Reads row `row` of arrays `(*batch, rows, ...)`."""
        if not self.sizes:
            return take(tree, row)
        axis = len(self.sizes)
        read = lambda x: jax.lax.dynamic_index_in_dim(x, row, axis, keepdims=False)
        return jax.tree.map(read, tree)

    def put(self, tree: PyTree, row: Int[Array, ""], values: PyTree) -> PyTree:
        """Writes `values` to row `row` of arrays `(*batch, rows, ...)`."""
        if not self.sizes:
            return put(tree, row, values)
        return set_row(tree, row, values, axis=len(self.sizes))

    def where_active(
        self, active: Bool[Array, "..."], tree: PyTree, otherwise: PyTree
    ) -> PyTree:
        """Selects `tree` for active solves and `otherwise` for the others.

        A single solve is active whenever this is called.
        """
        return where(active, tree, otherwise) if self.sizes else tree

    def mask_inactive(self, active: Bool[Array, "..."], tree: PyTree) -> PyTree:
        """Replaces the numbers of inactive solves by zeros."""
        return self.where_active(active, tree, zeros_like(tree))

    def fill_from_valid(self, invalid: Bool[Array, "..."], tree: PyTree) -> PyTree:
        """Replaces the numbers of `invalid` solves by those of a valid solve.

        The cotangents of such a solve are zero, but 0 * NaN is NaN. If all solves are
        invalid, nothing is replaced.
        """
        return _filled(invalid, tree) if self.sizes else tree

    def fill_shared_from_valid(
        self, invalid: Bool[Array, "..."], x: Array, axes: Axes
    ) -> Array:
        """Does the same to an array that solves share, with the given axes.

        A row is replaced if all solves that share it are invalid.
        """
        if not any(axes.batched):
            return x
        away = tuple(i for i, has in enumerate(axes.batched) if not has)
        return _filled(jnp.all(invalid, axis=away), x)


def _filled(invalid: Bool[Array, "..."], tree: PyTree[Array]) -> PyTree[Array]:
    """Replaces the rows of arrays `(*invalid.shape, ...)` that are `invalid`."""
    # The first valid solve, in the flattened batch. Its row is read as a sum in which
    # the other rows are zero: a batch over several devices then adds up one row, where
    # an index would gather the batch on every device.
    is_donor = jnp.arange(invalid.size) == jnp.argmin(jnp.ravel(invalid))

    def fill(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            # The key of a Brownian motion. Keys of a type of their own have no sum.
            data = fill(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        flat = jnp.reshape(x, (invalid.size, *x.shape[invalid.ndim :]))
        zeros = jnp.zeros_like(flat)
        row = jnp.sum(where(is_donor, flat, zeros), axis=0, dtype=x.dtype)
        return where(invalid, jnp.broadcast_to(row, x.shape), x)

    return jax.tree.map(fill, tree)


def is_buffer(x: Any) -> bool:
    """Whether `x` is an array or a buffer of an Equinox loop."""
    # A buffer is a pytree, and must not be flattened into the array inside it.
    return hasattr(x, "at")


def take(tree: PyTree, row: Int[Array, ""]) -> PyTree:
    """Reads row `row` along the first axis of every array of `tree`.

    The arrays may be buffers of an Equinox loop. `row` must not be negative.
    """
    return jax.tree.map(lambda x: row_of(x, row), tree, is_leaf=is_buffer)


def put(
    tree: PyTree,
    row: Int[Array, ""],
    values: PyTree,
    pred: Bool[Array, ""] | bool = True,
) -> PyTree:
    """Writes `values` to row `row` of the arrays of `tree`, where `pred` holds.

    The rows are along the first axis. The arrays may be buffers of an Equinox loop. A
    row after the last one stands for the last one.
    """
    write = lambda buffer, x: put_row(buffer, row, x, pred, _set_row)
    return jax.tree.map(write, tree, values, is_leaf=is_buffer)


def set_row(
    tree: PyTree, row: int | Int[Array, ""], values: PyTree, axis: int = 0
) -> PyTree:
    """Writes `values` to row `row` along `axis`, of arrays that are no buffers."""
    return jax.tree.map(lambda x, y: _set_row(x, row, y, axis), tree, values)


def _set_row(x: Array, row: int | Int[Array, ""], y: Array, axis: int = 0) -> Array:
    return _set_row_p.bind(x, jnp.asarray(y, x.dtype), jnp.asarray(row), axis=axis)


# JAX's `dynamic_update_slice` becomes a scatter under `vmap`, also where all elements
# write the same row, as the tangents of a solve do. XLA makes several kernels of a
# scatter, and one of this: forward over reverse mode compiles in 0.9 of the time.
# In the rules of a primitive, operands may be Python numbers: literals of a traced
# function. So their type is `Any`.
_set_row_p = Primitive("nodegrad_set_row")


def _update_slice(x: Array, y: Array, row: Int[Array, ""], *, axis: int) -> Array:
    starts = [row if i == axis else jnp.zeros_like(row) for i in range(x.ndim)]
    return jax.lax.dynamic_update_slice(
        x, jnp.expand_dims(y, axis), starts, allow_negative_indices=False
    )


def _abstract_set_row(x: Any, y: Any, row: Any, *, axis: int) -> Any:
    expected = x.shape[:axis] + x.shape[axis + 1 :], x.dtype, ()
    if (y.shape, y.dtype, row.shape) != expected:
        msg = f"A row of {x} must have shape and dtype {expected[:2]}; got {y}."
        raise ValueError(msg)
    return x


def _jvp_set_row(
    primals: Sequence[Any], tangents: Sequence[Any], *, axis: int
) -> tuple[Array, Any]:
    *_, row = primals
    *tangents, _ = tangents
    out = _set_row_p.bind(*primals, axis=axis)
    if all(type(t) is ad.Zero for t in tangents):
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return out, _set_row_p.bind(*tangents, row, axis=axis)


def _transpose_set_row(ct: Any, x: Any, y: Any, row: Any, *, axis: int) -> list[Any]:
    if type(ct) is ad.Zero:
        return [None, None, None]
    linear = ad.is_undefined_primal(x), ad.is_undefined_primal(y)
    ct_y = jax.lax.dynamic_index_in_dim(
        ct, row, axis, keepdims=False, allow_negative_indices=False
    )
    ct_x = _set_row_p.bind(ct, jnp.zeros_like(ct_y), row, axis=axis)
    return [ct_x if linear[0] else None, ct_y if linear[1] else None, None]


def _batch_set_row(
    operands: Sequence[Any], dims: Sequence[int | None], *, axis: int
) -> tuple[Array, int]:
    x, y, row = operands
    if dims[2] is not None:
        update = ft.partial(_update_slice, axis=axis)
        return jax.vmap(update, in_axes=tuple(dims))(x, y, row), 0
    size = mapped_size(operands, dims)
    x, y = in_front(x, dims[0], size), in_front(y, dims[1], size)
    return _set_row_p.bind(x, y, row, axis=axis + 1), 0


_set_row_p.def_impl(_update_slice)
_set_row_p.def_abstract_eval(_abstract_set_row)
mlir.register_lowering(
    _set_row_p, mlir.lower_fun(_update_slice, multiple_results=False)
)
ad.primitive_jvps[_set_row_p] = _jvp_set_row
ad.primitive_transposes[_set_row_p] = _transpose_set_row
batching.primitive_batchers[_set_row_p] = _batch_set_row


def mapped_size(operands: Sequence[Any], dims: Sequence[int | None]) -> int:
    """Returns the size of the `vmap` that maps over axis `dims[i]` of `operands[i]`."""
    pairs = zip(operands, dims, strict=True)
    return next(x.shape[d] for x, d in pairs if d is not None)


def in_front(x: Any, dim: int | None, size: int) -> Array:
    """Moves the axis of a `vmap` to the front; adds it if there is none."""
    if dim is None:
        return jnp.broadcast_to(x, (size, *jnp.shape(x)))
    return jnp.moveaxis(x, dim, 0)


def with_common_axes(out: PyTree[Array], inputs: PyTree[Array]) -> PyTree[Array]:
    """Returns `out`, with every array batched by each `vmap` that any input has.

    The tangents of a solve are always batched by all of these. For a function with a
    rule for forward mode, `vmap` requires the same of results and their tangents.
    """
    leaves, structure = jax.tree.flatten(out)
    operands = leaves + jax.tree.leaves(inputs)
    leaves = _common_axes_p.bind(*operands, num_out=len(leaves))
    return jax.tree.unflatten(structure, leaves)


# A primitive, and no `custom_vmap`: where JAX differentiates a `lax.scan` of solves
# twice, it drops the rules of custom functions and differentiates what they consist of.
# A `custom_vmap` that calls itself cannot be differentiated.
_common_axes_p = Primitive("nodegrad_common_axes")
_common_axes_p.multiple_results = True


def _first(*operands: Any, num_out: int) -> list[Any]:
    return list(operands[:num_out])


def _jvp_common_axes(
    primals: Sequence[Any], tangents: Sequence[Any], *, num_out: int
) -> tuple[list[Array], list[Any]]:
    return _common_axes_p.bind(*primals, num_out=num_out), list(tangents[:num_out])


def _batch_common_axes(
    operands: Sequence[Any], dims: Sequence[int | None], *, num_out: int
) -> tuple[list[Array], list[int]]:
    size = mapped_size(operands, dims)
    pairs = zip(operands[:num_out], dims[:num_out], strict=True)
    out = [in_front(x, d, size) for x, d in pairs]
    # Bind it again, for further `vmap`s around this one.
    out = _common_axes_p.bind(*out, *operands[num_out:], num_out=num_out)
    return out, [0] * num_out


_common_axes_p.def_impl(_first)
_common_axes_p.def_abstract_eval(_first)
mlir.register_lowering(_common_axes_p, mlir.lower_fun(_first, multiple_results=True))
ad.primitive_jvps[_common_axes_p] = _jvp_common_axes
batching.primitive_batchers[_common_axes_p] = _batch_common_axes
