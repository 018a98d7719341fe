"""Turning a closure into a pure function of everything it closes over."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .batch import Axes, Batch
from .compat import eval_jaxpr, Jaxpr


def _is_dynamic(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def closure_convert(fn: Callable, *examples: PyTree) -> "tuple[list[Array], Pure]":
    """Splits `fn` into the arrays it closes over and a function of those.

    A `jax.custom_vjp` rule must not close over traced values, and a gradient with
    respect to an array that a vector field merely closes over would be lost. Both are
    cured by tracing `fn` once: whatever it uses that is not an argument turns up as a
    constant of the trace, be it a leaf of `args`, of the terms, or of a closure.
    (`equinox.filter_closure_convert` does the same, but refuses to run inside
    `shard_map`.)

    **Arguments:**

    - `fn`: the function to split; its arguments and results are pytrees.
    - `examples`: arguments (or their `jax.ShapeDtypeStruct`s) to trace it with.
      Leaves that are not arrays are fixed to the values given here.

    **Returns:**

    `(consts, pure)` with `pure(consts, *args) == fn(*args)`.
    """
    dynamic, static = eqx.partition(examples, _is_dynamic)
    static_out = None

    def traced(dynamic):
        nonlocal static_out
        out = fn(*eqx.combine(dynamic, static))
        arrays, static_out = eqx.partition(out, eqx.is_array)
        return arrays

    closed, out_shape = jax.make_jaxpr(traced, return_shape=True)(dynamic)
    out_tree = jax.tree.structure(out_shape)
    return list(closed.consts), Pure(closed.jaxpr, out_tree, static_out)


class Pure:
    """The function of constants and arguments that `closure_convert` returns."""

    def __init__(self, jaxpr: Jaxpr, out_tree: Any, static_out: PyTree):
        """`jaxpr` has one constant for each of those hoisted.

        `static_out` are the results that are no arrays.
        """
        self.jaxpr = jaxpr
        self._out_tree = out_tree
        self.static_out = static_out

    def __call__(self, consts: list[Array], *args: PyTree) -> PyTree:
        """The result for these constants."""
        leaves = jax.tree.leaves(eqx.filter(args, eqx.is_array))
        out = eval_jaxpr(self.jaxpr, consts, *leaves)
        # Results that are constant come back as NumPy scalars.
        arrays = jax.tree.unflatten(self._out_tree, map(jnp.asarray, out))
        return eqx.combine(arrays, self.static_out)

    def evaluate(
        self, batch: Batch, consts: list[Array], axes: list[Axes], args: tuple
    ) -> PyTree:
        """The results for every solve of a batch.

        `axes` are those of `consts`; `args` belong to one solve each.
        """
        return batch.map_shared(self, consts, axes)(*args)

    def pullback(self, *args: Any) -> tuple[PyTree, Callable]:
        """As the function `pullback`, of this."""
        return pullback(self, *args)


def pullback(
    fn: Callable,
    batch: Batch,
    consts: list[Array],
    axes: list[Axes],
    wrt: list[bool],
    args: tuple,
    spec: PyTree[bool],
) -> tuple[PyTree, Callable]:
    """`fn(consts, *args)` for every solve of a batch, and its pullback.

    The pullback takes cotangents of the results to those of `(consts, args)`. Only what
    `wrt` and `spec` mark is differentiated. The mapping over the batch is inside of the
    pullback. So cotangents of constants that solves share are sums over these solves,
    computed as one product, and never exist solve by solve.
    """
    wanted, fixed = eqx.partition(consts, wrt)
    args, fixed_args = eqx.partition(args, spec)
    wanted_axes, fixed_axes = eqx.partition(axes, wrt)

    def one(shared, args, fixed_args):
        out = fn(eqx.combine(*shared), *eqx.combine(args, fixed_args))
        return eqx.filter(out, eqx.is_inexact_array)

    def all_of_them(wanted, args):
        shared, shared_axes = (wanted, fixed), (wanted_axes, fixed_axes)
        return batch.map_shared(one, shared, shared_axes)(args, fixed_args)

    return jax.vjp(all_of_them, wanted, args)


def as_struct(tree: PyTree) -> PyTree:
    """Shapes and dtypes of the numbers in `tree`."""

    def struct(x):
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))

    return jax.tree.map(
        lambda x: (
            struct(x)
            if eqx.is_array_like(x) or isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        tree,
    )
