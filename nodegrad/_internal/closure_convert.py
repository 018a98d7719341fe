"""Turns a closure into a pure function of everything that it closes over."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .batch import Axes, Batch
from .compat import eval_jaxpr, Jaxpr
from .tree import add


def _is_dynamic(x: Any) -> bool:
    """Whether a leaf is an argument of the trace: an array, or the shape of one."""
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def closure_convert(
    fn: Callable[..., PyTree], *examples: PyTree
) -> "tuple[list[Any], Pure]":
    """Splits `fn` into the arrays that it closes over and a function of those.

    A custom derivative rule must not close over traced values, and would lose the
    gradient by an array that a vector field closes over. So `fn` is traced once. Every
    array that it uses and that is not an argument becomes a constant of the trace,
    whether it is a leaf of `args`, of the terms, or of a closure.
    (`equinox.filter_closure_convert` does the same, but raises inside `shard_map`.)

    **Arguments:**

    - `fn`: the function to split; its arguments and results are pytrees.
    - `examples`: arguments to trace it with, or their `jax.ShapeDtypeStruct`s. Leaves
      that are not arrays are fixed to the values given here.

    **Returns:**

    `(consts, pure)` with `pure(consts, *args) == fn(*args)`.
    """
    dynamic, static = eqx.partition(examples, _is_dynamic)
    static_out = None

    def traced(dynamic: PyTree[Array]) -> PyTree[Array]:
        # A jaxpr returns arrays only; the rest of the result leaves by this variable.
        nonlocal static_out
        out = fn(*eqx.combine(dynamic, static))
        arrays, static_out = eqx.partition(out, eqx.is_array)
        return arrays

    closed, out_shape = jax.make_jaxpr(traced, return_shape=True)(dynamic)
    out_tree = jax.tree.structure(out_shape)
    return list(closed.consts), Pure(_without_consts(closed), out_tree, static_out)


def _without_consts(closed: Any) -> Jaxpr:
    """Returns the jaxpr of a trace without the values of its constants."""
    jaxpr = closed.jaxpr
    # JAX 0.12 keeps these values in the jaxpr: whoever keeps it would keep the arrays.
    if hasattr(jaxpr, "with_consts"):
        return jaxpr.with_consts([None] * len(closed.consts))
    return jaxpr


class Pure:
    """A traced function of constants and arguments; see `closure_convert`."""

    def __init__(self, jaxpr: Jaxpr, out_tree: Any, static_out: PyTree):
        """Stores what `closure_convert` found.

        `jaxpr` has a variable for each constant. `out_tree` is the structure of the
        arrays in the result, `static_out` the rest of the result.
        """
        self.jaxpr = jaxpr
        self._out_tree = out_tree
        self.static_out = static_out

    def __call__(self, consts: list[Any], *args: PyTree) -> PyTree:
        """Returns the result for these constants. `args` have the traced structure."""
        leaves = jax.tree.leaves(eqx.filter(args, eqx.is_array))
        out = eval_jaxpr(self.jaxpr, consts, *leaves)
        # `eval_jaxpr` returns constant results as NumPy scalars.
        arrays = jax.tree.unflatten(self._out_tree, map(jnp.asarray, out))
        return eqx.combine(arrays, self.static_out)

    def evaluate(
        self,
        batch: Batch,
        consts: list[Any],
        axes: list[Axes],
        args: tuple[PyTree, ...],
    ) -> PyTree:
        """Returns the results for every solve of a batch.

        `axes` are the axes of `consts`. `args` and results have all batch axes.
        """
        return batch.map_shared(self, consts, axes)(*args)

    def pullback(self, *args: Any) -> tuple[PyTree, Callable]:
        """Calls the function `pullback` with this `Pure` as `fn`."""
        return pullback(self, *args)


def pullback(
    fn: Callable[..., PyTree],
    batch: Batch,
    consts: list[Any],
    axes: list[Axes],
    wrt: list[bool],
    args: tuple[PyTree, ...],
    spec: PyTree[bool],
) -> tuple[PyTree, Callable]:
    """Returns `fn(consts, *args)` for every solve of a batch, and its pullback.

    Only inexact arrays are returned. The pullback takes their cotangents to those of
    `(consts, args)`, with `None` for what `wrt` and `spec` do not mark. A second
    argument is a total to which it adds those of `consts`.
    """
    wanted, fixed = eqx.partition(consts, wrt)
    args, fixed_args = eqx.partition(args, spec)
    wanted_axes, fixed_axes = eqx.partition(axes, wrt)

    def one(
        shared: tuple[list[Any], list[Any]], args: PyTree, fixed_args: PyTree
    ) -> PyTree[Array]:
        out = fn(eqx.combine(*shared), *eqx.combine(args, fixed_args))
        return eqx.filter(out, eqx.is_inexact_array)

    # The mapping over the batch is inside the function that is differentiated. So the
    # cotangent of a constant that solves share is one sum over these solves (for a
    # matrix, one matrix product), and is never stored for each solve.
    def all_of_them(wanted: list[Any], args: PyTree) -> PyTree[Array]:
        shared, shared_axes = (wanted, fixed), (wanted_axes, fixed_axes)
        return batch.map_shared(one, shared, shared_axes)(args, fixed_args)

    value, pull = jax.vjp(all_of_them, wanted, args)

    def pull_and_add(ct: PyTree, total: Any = None) -> tuple[PyTree, PyTree]:
        ct_consts, ct_args = pull(ct)
        return ct_consts if total is None else add(total, ct_consts), ct_args

    return value, pull_and_add


def as_struct(tree: PyTree) -> PyTree:
    """Replaces the numbers and arrays in `tree` by their shapes and dtypes."""

    def struct(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))

    return jax.tree.map(
        lambda x: (
            struct(x)
            if eqx.is_array_like(x) or isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        tree,
    )
