"""Doing to a batch of solves what is written for one.

A recorded solve that is mapped by `jax.vmap` keeps a stack of *levels*, one for every
`vmap`, outermost first. What belongs to one solve (its state, its step times) has an
axis for every level. What solves share (parameters, save times) has an axis only for
the levels that it differs in: an ensemble of models over a batch of samples has one set
of parameters for each model. `Axes` says which levels an array has axes for; these come
first in its shape, in the order of the levels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .compat import while_loop
from .tree import put, set_row, take, where, zeros_like


@dataclass(frozen=True)
class Axes:
    """For every level, whether an array has an axis for it. A leaf of pytrees."""

    batched: tuple[bool, ...]


class Batch(eqx.Module):
    """The levels that solves are mapped over; none for a single solve.

    - `sizes`: the size of every level, outermost first.
    """

    sizes: tuple[int, ...] = eqx.field(static=True, default=())

    def map(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` over arguments that have all axes; results have all axes."""
        for _ in self.sizes:
            fn = jax.vmap(fn)
        return fn

    def map_shared(
        self, fn: Callable[..., Any], shared: PyTree[Array], axes: PyTree[Axes]
    ) -> Callable[..., Any]:
        """`fn(shared, *args)` as a function of `args`, which have all axes.

        `axes` are those of the leaves of `shared`, in the same order.
        """
        leaves, structure = jax.tree.flatten(shared)
        levels_of = jax.tree.leaves(axes)

        def from_leaves(leaves, args):
            return fn(jax.tree.unflatten(structure, leaves), *args)

        # The innermost level is mapped first: its axis is the last one of every array.
        for level in reversed(range(len(self.sizes))):
            in_axes = [0 if a.batched[level] else None for a in levels_of]
            from_leaves = jax.vmap(from_leaves, in_axes=(in_axes, 0))
        return lambda *args: from_leaves(leaves, args)

    def expand(self, x: Array, axes: Axes, to: Axes) -> Array:
        """`x` with the axes `to`, repeated along those that it does not have."""
        axis = 0
        for size, has, wants in zip(self.sizes, axes.batched, to.batched, strict=True):
            if wants and not has:
                x = jnp.expand_dims(x, axis)
                x = jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
            axis += wants
        return x

    def total(self, x: Array, axes: Axes, to: Axes) -> Array:
        """`x` with the axes `to`, summed over those of its axes that are not there."""
        pairs = [b for b in zip(axes.batched, to.batched, strict=True) if b[0]]
        away = tuple(i for i, (_, wanted) in enumerate(pairs) if not wanted)
        return jnp.sum(x, axis=away) if away else x

    def total_over_batch(self, tree: PyTree[Array], axes: PyTree[Axes]) -> PyTree:
        """Arrays that have all axes, summed to the axes of what they belong to."""
        return jax.tree.map(
            lambda a, x: None if x is None else self.total(x, self.all_axes, a),
            axes,
            tree,
        )

    @property
    def all_axes(self) -> Axes:
        """The axes of what belongs to one solve."""
        return Axes((True,) * len(self.sizes))

    def while_loop(
        self,
        is_active: Callable[[Any], Bool[Array, "..."]],
        body: Callable[[Any], Any],
        init: Any,
        buffers: Callable[[Any], PyTree] | None = None,
    ) -> Any:
        """Runs `body` while any solve is active.

        `body` has to leave alone what belongs to inactive solves.
        """
        if not self.sizes:
            return while_loop(is_active, body, init, buffers=buffers, kind="lax")
        return jax.lax.while_loop(lambda c: jnp.any(is_active(c)), body, init)

    def take(self, tree: PyTree, row: Int[Array, ""]) -> PyTree:
        """Row `row` of the arrays of every solve."""
        if not self.sizes:
            return take(tree, row)
        axis = len(self.sizes)
        read = lambda x: jax.lax.dynamic_index_in_dim(x, row, axis, keepdims=False)
        return jax.tree.map(read, tree)

    def put(self, tree: PyTree, row: Int[Array, ""], values: PyTree) -> PyTree:
        """`tree` with `values` in row `row` of the arrays of every solve."""
        if not self.sizes:
            return put(tree, row, values)
        return set_row(tree, row, values, axis=len(self.sizes))

    def where_active(
        self, active: Bool[Array, "..."], tree: PyTree, otherwise: PyTree
    ) -> PyTree:
        """`tree`, but `otherwise` for solves that are not active."""
        return where(active, tree, otherwise) if self.sizes else tree

    def mask_inactive(self, active: Bool[Array, "..."], tree: PyTree) -> PyTree:
        """`tree`, but zero for solves that are not active."""
        return self.where_active(active, tree, zeros_like(tree))

    def fill_from_valid(self, invalid: Bool[Array, "..."], tree: PyTree) -> PyTree:
        """Replaces the numbers of `invalid` solves by those of a valid one.

        The cotangents of such a solve are zero, but zero times NaN would be NaN.
        """
        return _filled(invalid, tree) if self.sizes else tree

    def fill_shared_from_valid(
        self, invalid: Bool[Array, "..."], x: Array, axes: Axes
    ) -> Array:
        """The same for an array with fewer axes, where all its solves are invalid."""
        if not any(axes.batched):
            return x
        away = tuple(i for i, has in enumerate(axes.batched) if not has)
        return _filled(jnp.all(invalid, axis=away), x)


def _filled(invalid: Bool[Array, "..."], tree: PyTree) -> PyTree:
    donor = jnp.argmin(jnp.ravel(invalid))

    def fill(x):
        flat = jnp.reshape(x, (invalid.size, *x.shape[invalid.ndim :]))
        return where(invalid, jnp.broadcast_to(flat[donor], x.shape), x)

    return jax.tree.map(fill, tree)
