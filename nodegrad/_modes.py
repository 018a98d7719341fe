"""Clear words for the derivatives that a recorded solve cannot give.

Forward mode alone, and reverse mode over reverse mode, end in errors of JAX that name
neither the solve nor the way out. The identity functions here say both.
"""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree


_WAY_OUT = (
    "For second derivatives take forward mode over reverse mode: "
    "`jax.jvp(jax.grad(f), (x,), (v,))`, `jax.jacfwd(jax.grad(f))` or "
    "`jax.hessian(f)`. For first derivatives take `jax.grad` or `jax.vjp`, or, if you "
    "do want plain forward mode, `diffrax.diffeqsolve(..., "
    "adjoint=diffrax.ForwardMode())`."
)

FORWARD = (
    "A solve with an adjoint of nodegrad cannot be differentiated by forward mode "
    "alone (`jax.jvp`, `jax.linearize`). " + _WAY_OUT
)

REVERSE_OVER_REVERSE = (
    "A gradient through a solve with an adjoint of nodegrad cannot be differentiated "
    "by reverse mode again (`jax.grad(jax.grad(f))`). " + _WAY_OUT
)


def _tangent_impl(x):
    del x
    raise TypeError(FORWARD)


def _tangent_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    if type(t) is ad.Zero:
        t = jnp.zeros_like(x)
    return _tangent_p.bind(x), _tangent_p.bind(t)


def _tangent_transpose(cts, x):
    del x
    return list(cts)


def _primal_jvp(primals, tangents):
    # The primals go on unmarked: they may have tangents of their own, of a forward mode
    # outside of this one, and those are welcome.
    marked = [t if type(t) is ad.Zero else _tangent_p.bind(t)[0] for t in tangents]
    return list(primals), marked


def _identity(*xs):
    return list(xs)


# The identity on tangents. Reverse mode transposes it away; forward mode alone has to
# evaluate it, which is where it complains.
_tangent_p = eqxi.create_vprim(
    "nodegrad_tangent",
    _tangent_impl,
    lambda x: [x],
    _tangent_jvp,
    _tangent_transpose,
)

# All leaves at once: if any of them is differentiated by reverse mode, all others are
# welcome to a forward mode outside of that. (`create_vprim` would batch all of them as
# soon as one is.)
_primal_p = Primitive("nodegrad_reverse_mode_only")
_primal_p.multiple_results = True
_primal_p.def_impl(_identity)
_primal_p.def_abstract_eval(_identity)
ad.primitive_jvps[_primal_p] = _primal_jvp
batching.primitive_batchers[_primal_p] = lambda xs, axes: (_primal_p.bind(*xs), axes)
mlir.register_lowering(_primal_p, mlir.lower_fun(_identity, multiple_results=True))


def reverse_mode_only(tree: PyTree) -> PyTree:
    """The identity; raises where it is differentiated by forward mode alone."""
    inexact, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(inexact)
    marked = jax.tree.unflatten(structure, _primal_p.bind(*leaves))
    # JAX may say of an integer that it depends on what is differentiated, and Equinox
    # does not expect that.
    stop = lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x
    return eqx.combine(marked, jax.tree.map(stop, rest))
