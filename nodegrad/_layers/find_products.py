"""Finds the layer products in a traced function, and the constants they depend on.

`closure_convert` turns a vector field into a jaxpr, whose constants contain the probes
of layers. To collect the statistics of a layer, a solve must know which of the
constants are its probes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from .._internal.closure_convert import closure_convert
from .._internal.compat import Jaxpr, jaxprs_in_params, Literal
from .factors import Statistics
from .layer_product import layer_product_p
from .layers import name_of
from .use import Use


_COMPUTED_IN_FIELD = (
    "The layer {} inside a vector field was computed from other arrays before it was "
    "used, so its curvature is not available. Leave it out with "
    "`value_grad_and_curvature(..., layers=...)`. (A function that is passed to "
    "`optimistix.root_find` is changed so; one passed to `optimistix.fixed_point` or "
    "`jax.lax.custom_root` is not.)"
)
_COMPUTED_IN_LOSS = (
    "The layer {} of the model was computed from the model before it was used, as by "
    "`jax.tree.map` over all leaves, so its curvature is not available. Pass the "
    "changed model to this function, or leave the layer out with "
    "`value_grad_and_curvature(..., layers=...)`."
)


class Slots(NamedTuple):
    """The positions of a layer's probes in the list of constants of a function."""

    offset: int
    statistics: Statistics


# Primitives that may lie between a constant and its use as a probe, by name: `jax.vmap`
# and `jax.lax.scan` over stacked layers add them, casts and sharding do. Each result
# belongs to the operand at its place. Checked on JAX 0.10.2 and 0.12.0.
_STRUCTURAL = frozenset(
    "broadcast_in_dim convert_element_type copy device_put dynamic_slice gather "
    "optimization_barrier pvary reshape reshard sharding_constraint slice squeeze "
    "stop_gradient transpose".split()
)


def find_products(jaxpr: Jaxpr) -> list[tuple[Slots, Use]]:
    """Returns every use of a layer in `jaxpr`, with the constants that are its probes.

    Raises `ValueError` if a probe is computed from constants, instead of being one.
    """
    return [
        (Slots(offset, Statistics(*statistics)), use)
        for (offset, *statistics), use in _used(
            jaxpr, jaxpr.constvars, _COMPUTED_IN_FIELD
        )
    ]


def check_products(jaxpr: Jaxpr, probes: Sequence[Any]) -> None:
    """Raises `ValueError` if a layer of `jaxpr` does not use `probes` as they are.

    `probes` are variables of `jaxpr`. With other values the statistics would be wrong.
    """
    _used(jaxpr, probes, _COMPUTED_IN_LOSS)


def _used(
    jaxpr: Jaxpr, probes: Sequence[Any], message: str
) -> list[tuple[list[int], Use]]:
    """Returns every use of a layer, with the numbers of its probes among `probes`.

    Raises `ValueError` with `message` if a use has others.
    """
    found: list[tuple[list[int | None], Use]] = []
    _walk(jaxpr, {v: i for i, v in enumerate(probes)}, found)
    out = []
    for slots, use in found:
        known = [slot for slot in slots if slot is not None]
        if len(known) != len(slots):
            raise ValueError(message.format(name_of(use.key)))
        out.append((known, use))
    return out


def has_products(jaxpr: Jaxpr) -> bool:
    """Returns whether `jaxpr` contains a layer product, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is layer_product_p:
            return True
        for inner in jaxprs_in_params(eqn.params):
            if has_products(getattr(inner, "jaxpr", inner)):
                return True
    return False


def _walk(
    jaxpr: Jaxpr, roots: dict[Any, int], found: list[tuple[list[int | None], Use]]
) -> dict[Any, int]:
    """Finds layer products in `jaxpr`, and appends them to `found`.

    `roots` maps a variable to the number of the constant that it is a copy of (or a
    slice, or a cast). It is extended by the variables of this jaxpr, and returned.
    Keys are `Any`, because JAX has no public type of variables.
    """

    def root(v: Any) -> int | None:
        # Literals are not hashable.
        return None if isinstance(v, Literal) else roots.get(v)

    for eqn in jaxpr.eqns:
        if eqn.primitive is layer_product_p:
            # The operands are `weight, x, offset, *probes`.
            _, _, *probes = eqn.invars
            found.append(([root(v) for v in probes], eqn.params["use"]))
        elif eqn.primitive.name in _STRUCTURAL:
            for v, out in zip(eqn.invars, eqn.outvars, strict=False):
                source = root(v)
                if source is not None:
                    roots[out] = source
        elif eqn.primitive.name == "select_n":
            # A batched `cond` selects between an operand and itself without derivative.
            _, *cases = map(root, eqn.invars)
            if cases[0] is not None and len(set(cases)) == 1:
                roots[eqn.outvars[0]] = cases[0]
        for inner in jaxprs_in_params(eqn.params):
            inner = getattr(inner, "jaxpr", inner)
            # The arguments of a body are the last operands of its equation: `cond` has
            # an index in front of them.
            outer = eqn.invars[len(eqn.invars) - len(inner.invars) :]
            pairs = zip(inner.invars, map(root, outer), strict=True)
            reached = _walk(inner, {v: i for v, i in pairs if i is not None}, found)
            # The body may return a probe, for example to the next step of a `scan`.
            if len(inner.outvars) == len(eqn.outvars):
                for v, out in zip(inner.outvars, eqn.outvars, strict=True):
                    if not isinstance(v, Literal) and v in reached:
                        roots[out] = reached[v]
    return roots


def without_statistics(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Returns `fn(*args)`; its layers report no statistics in reverse mode."""
    consts, pure = closure_convert(fn, *args)
    for slots, _ in find_products(pure.jaxpr):
        for slot in jax.tree.leaves(slots):
            consts[slot] = jax.lax.stop_gradient(consts[slot])
    return pure(consts, *args)
