"""Finding the uses of layers in a traced function."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from .._internal.closure_convert import closure_convert
from .._internal.compat import Jaxpr, jaxprs_in_params, Literal
from .layer_product import layer_product_p, Use


# Where a layer's probes are among the constants of a function, in the order of `Probe`.
Slots = tuple[int, ...]

# What may happen to a probe between a model and its use, say in a `jax.lax.scan` over
# stacked layers.
_STRUCTURAL = frozenset(
    "broadcast_in_dim convert_element_type copy dynamic_slice gather pvary reshape "
    "slice squeeze transpose".split()
)


def find_products(jaxpr: Jaxpr) -> list[tuple[Slots, Use]]:
    """Every use of a layer, with the constants that its probes are."""
    found: list[tuple[tuple[int | None, ...], Use]] = []
    _walk(jaxpr, {v: i for i, v in enumerate(jaxpr.constvars)}, found)
    out = []
    for slots, use in found:
        known = tuple(slot for slot in slots if slot is not None)
        if len(known) != len(slots):
            msg = (
                f"The layer {use.key} inside a vector field was computed from other "
                "arrays before it was used, so its curvature cannot be told. Leave it "
                "out with `value_grad_and_curvature(..., layers=...)`."
            )
            raise ValueError(msg)
        out.append((known, use))
    return out


def has_products(jaxpr: Jaxpr) -> bool:
    """Whether a layer is used anywhere in `jaxpr`."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is layer_product_p:
            return True
        for inner in jaxprs_in_params(eqn.params):
            if has_products(getattr(inner, "jaxpr", inner)):
                return True
    return False


def _walk(jaxpr: Jaxpr, roots: dict[Any, int], found: list) -> dict[Any, int]:
    """Follows constants, by `roots`, to layer products; returns where all go."""
    root = lambda v: None if isinstance(v, Literal) else roots.get(v)
    for eqn in jaxpr.eqns:
        if eqn.primitive is layer_product_p:
            _, _, *probes = eqn.invars
            found.append((tuple(map(root, probes)), eqn.params["use"]))
        elif eqn.primitive.name in _STRUCTURAL:
            source = root(eqn.invars[0])
            if source is not None:
                roots[eqn.outvars[0]] = source
        for inner in jaxprs_in_params(eqn.params):
            inner = getattr(inner, "jaxpr", inner)
            # Of all primitives with a body the last operands are its arguments.
            outer = eqn.invars[len(eqn.invars) - len(inner.invars) :]
            pairs = zip(inner.invars, map(root, outer), strict=True)
            reached = _walk(inner, {v: i for v, i in pairs if i is not None}, found)
            if len(inner.outvars) == len(eqn.outvars):
                for v, out in zip(inner.outvars, eqn.outvars, strict=True):
                    if not isinstance(v, Literal) and v in reached:
                        roots[out] = reached[v]
    return roots


def without_statistics(fn: Callable, *args: PyTree) -> PyTree:
    """`fn(*args)`, from which no statistics are collected."""
    consts, pure = closure_convert(fn, *args)
    for slots, _ in find_products(pure.jaxpr):
        for slot in slots:
            consts[slot] = jax.lax.stop_gradient(consts[slot])
    return pure(consts, *args)
