"""Solves inside of `jax.shard_map`, where every device takes its own steps.

With `check_vma=True`, its default, `jax.shard_map` keeps in the type of an array over
which axes of the mesh it varies. Loops and branches then require equal types, and a new
array, such as the zeros of a buffer, varies over no axis. The loops of a solve, of
Diffrax and of Equinox do not pass this check. Also, where an array that all devices
share meets one that varies, JAX sums its cotangent over devices. Inside of a solve that
would be a sum in every step, though devices take different numbers of steps.

So `on_each_device` makes every array that goes into a solve vary over the same axes,
hides the axes inside of the solve, and shows them again on the results. Two primitives
do that; they change types, but no numbers.
"""

import functools as ft
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .closure_convert import closure_convert, Pure
from .compat import (
    ad,
    batching,
    checks_vma,
    Jaxpr,
    mlir,
    NamedAxisEffect,
    Primitive,
    ShapedArray,
    varying_axes,
    with_varying_axes,
)


_CLOSES_OVER = (
    "Inside of `jax.shard_map` a solve closes over an array that differs between "
    "devices, of type {}, where nodegrad does not find it: for example in a function "
    "made by `jax.jit` or `functools.partial`, or in an object that is no pytree. Pass "
    "the array in `args`, or pass `check_vma=False` to `jax.shard_map`."
)
_COLLECTIVE = (
    "Inside of `jax.shard_map(..., check_vma=True)` a solve must not communicate "
    "between devices, but there is a collective such as `jax.lax.psum` over the axis "
    "{!r} in it. Devices take different numbers of steps, and would wait for each "
    "other forever. Move the collective out of the solve; or, if all devices make the "
    "same steps, pass `check_vma=False`."
)
_COLLECTIVE_OF_VMAP = (
    "In a solve there is a collective such as `jax.lax.psum` over the axis {!r} of "
    "`jax.vmap`, and the solve is differentiated in forward mode, or outside of this "
    "`vmap`. Take reverse mode inside of it (`jax.vmap(jax.grad(f), axis_name=...)`), "
    "solve for the whole batch as one state, or use `diffrax.DirectAdjoint()`."
)


def on_each_device(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Returns `fn`, for use also inside of `jax.shard_map(..., check_vma=True)`.

    There it computes on each device what it does with `check_vma=False`. Its results
    vary over every axis that any input varies over. The cotangent of an input that
    devices share is summed over them, once, outside of all loops.

    **Raises:** `ValueError` there, if `fn` contains collectives, or closes over arrays
    that differ between devices and that cannot be found.
    """

    @ft.wraps(fn)
    def wrapped(*args: PyTree, **kwargs: PyTree) -> PyTree:
        if not checks_vma.value:
            return fn(*args, **kwargs)
        return _with_hidden_axes((fn, args, kwargs))

    return wrapped


def _with_hidden_axes(call: tuple[Callable, tuple, dict]) -> PyTree:
    """Calls a function. `call` is it, its arguments and its keyword arguments."""
    arrays, static = eqx.partition(_with_open_closures(call), eqx.is_array)
    axes = _union(arrays)

    # The trace sees the arrays without axes. In a derivative, `pure` is traced again
    # while JAX checks, which is harmless: only collectives could make an array vary.
    def called(arrays: PyTree[Array]) -> PyTree:
        fn, args, kwargs = eqx.combine(arrays, static)
        return fn(*args, **kwargs)

    with checks_vma(False):
        consts, pure = closure_convert(called, jax.tree.map(_struct, arrays))
    for x in consts:
        if varying_axes(jax.typeof(x)):
            raise ValueError(_CLOSES_OVER.format(jax.typeof(x)))
    _check_no_collective(pure)

    # JAX infers from the axes of a residual whether devices share it. It must not see
    # those of arrays whose axes are hidden. `keep` chooses the residuals: results, and
    # what `keep_on_devices` marks. All else is computed again from the operands.
    keep = lambda primitive, *_, **__: primitive is show_axes_p

    @ft.partial(jax.checkpoint, policy=keep, prevent_cse=False)
    def run(operands: tuple[list[Array], PyTree[Array]]) -> PyTree[Array]:
        consts, arrays = _hide(operands, axes)
        return _show(eqx.filter(pure(consts, arrays), eqx.is_array), axes)

    promoted = jax.tree.map(ft.partial(_promoted, axes), (consts, arrays))
    return eqx.combine(run(promoted), pure.static_out)


def axes_of_devices(tree: PyTree) -> tuple[str, ...]:
    """Returns the axes of the mesh that arrays vary over, where `shard_map` checks."""
    if not checks_vma.value:
        return ()
    return _union(eqx.filter(_with_open_closures(tree), eqx.is_array))


def hidden_axes() -> tuple[str, ...]:
    """Returns the axes of the mesh that arrays may vary over without having them."""
    # It is a function of the context that the caches of `jax.jit` depend on, too.
    return () if checks_vma.value else jax.sharding.get_abstract_mesh().manual_axes


def keep_on_devices(tree: PyTree[Array], axes: tuple[str, ...]) -> PyTree[Array]:
    """Returns `tree`, as residuals that every device keeps; `axes` are hidden axes."""
    return _hide(_show(tree, axes), axes)


def without_collectives(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Returns `fn`, which raises if it has collectives where `shard_map` checks.

    A custom derivative of the user may sum over devices, as JAX requires of it where
    axes are not hidden. This sum would be one too many.
    """

    def checked(*args: PyTree) -> PyTree:
        if not checks_vma.value:
            return fn(*args)
        consts, pure = closure_convert(fn, *args)
        _check_no_collective(pure)
        return pure(consts, *args)

    return checked


def check_no_collective_over(name: Any, jaxprs: list[Jaxpr]) -> None:
    """Raises if a part of a solve has collectives over this axis of a `jax.vmap`.

    A derivative evaluates these parts after that `vmap` has ended. The name is then
    unknown, or that of another axis.
    """
    if any(name in _axes_of_collectives(jaxpr) for jaxpr in jaxprs):
        raise ValueError(_COLLECTIVE_OF_VMAP.format(name))


def _axes_of_collectives(jaxpr: Jaxpr) -> set[Any]:
    return {x.name for x in jaxpr.effects if isinstance(x, NamedAxisEffect)}


def _check_no_collective(pure: Pure) -> None:
    for name in _axes_of_collectives(pure.jaxpr):
        raise ValueError(_COLLECTIVE.format(name))


def _union(arrays: PyTree[Array]) -> tuple[str, ...]:
    """Returns the axes that any of `arrays` varies over, in the order of the mesh."""
    axes = [varying_axes(jax.typeof(x)) for x in jax.tree.leaves(arrays)]
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in names if any(name in x for x in axes))


def _promoted(axes: tuple[str, ...], x: Array) -> Array:
    """Returns `x`, which varies over `axes`. The transpose is a sum over devices."""
    missing = tuple(a for a in axes if a not in varying_axes(jax.typeof(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _struct(x: Array) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


class _OpenClosure(eqx.Module):
    """A Python function, with the contents of its closure as leaves."""

    # A `types.FunctionType`, which type checkers take for a method here.
    fn: Any
    contents: list[PyTree]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fn = types.FunctionType(
            self.fn.__code__,
            self.fn.__globals__,
            self.fn.__name__,
            self.fn.__defaults__,
            tuple(types.CellType(x) for x in self.contents),
        )
        fn.__kwdefaults__ = self.fn.__kwdefaults__
        return fn(*args, **kwargs)


def _with_open_closures(tree: PyTree, opened: tuple[Any, ...] = ()) -> PyTree:
    """Returns `tree`, with the arrays that its functions close over as leaves.

    `opened` are the functions whose closures `tree` is in. (`closure_to_pytree` of
    Equinox takes two functions for the same if their source text is the same.)
    """

    def open_(x: Any) -> Any:
        if not isinstance(x, types.FunctionType) or x in opened:
            return x
        try:
            contents = [cell.cell_contents for cell in x.__closure__ or ()]
        except ValueError:
            # A variable that has no value yet.
            return x
        contents = _with_open_closures(contents, (*opened, x))
        has_arrays = any(map(eqx.is_array, jax.tree.leaves(contents)))
        return _OpenClosure(x, contents) if has_arrays else x

    return jax.tree.map(open_, tree)


hide_axes_p = Primitive("nodegrad_hide_axes")
show_axes_p = Primitive("nodegrad_show_axes")


def _hide(tree: PyTree[Array], axes: tuple[str, ...]) -> PyTree[Array]:
    """Returns `tree`, whose arrays vary over `axes`, as if they did not."""
    return jax.tree.map(lambda x: hide_axes_p.bind(x, axes=axes) if axes else x, tree)


def _show(tree: PyTree[Array], axes: tuple[str, ...]) -> PyTree[Array]:
    """Undoes `_hide`."""
    return jax.tree.map(lambda x: show_axes_p.bind(x, axes=axes) if axes else x, tree)


@hide_axes_p.def_abstract_eval
def _hidden_type(aval: ShapedArray, *, axes: tuple[str, ...]) -> ShapedArray:
    del axes
    return with_varying_axes(aval, ())


@show_axes_p.def_abstract_eval
def _shown_type(aval: ShapedArray, *, axes: tuple[str, ...]) -> ShapedArray:
    return with_varying_axes(aval, axes)


def _transpose(inverse: Primitive, ct: Any, _: Any, **axes: Any) -> list[Any]:
    # For a linear primitive JAX passes no `ad.Zero` here.
    return [inverse.bind(ct, **axes)]


for _primitive, _inverse in ((hide_axes_p, show_axes_p), (show_axes_p, hide_axes_p)):
    _primitive.def_impl(lambda x, **_: x)
    mlir.register_lowering(_primitive, lambda _, x, **__: [x])
    batching.defvectorized(_primitive)
    # Both are linear, and transposes of each other.
    ad.deflinear2(_primitive, ft.partial(_transpose, _inverse))
