"""Clear words for the derivatives that a recorded solve cannot give.

Forward mode alone, and reverse mode over reverse mode, end in errors of JAX that name
neither the solve nor the way out. The identity functions here say both.
"""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax.interpreters import ad
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
    (x,), (t,) = primals, tangents
    t_out = [t] if type(t) is ad.Zero else _tangent_p.bind(t)
    # The primal goes on unmarked: it may have tangents of its own, of a forward mode
    # outside of this one, and those are welcome.
    return [x], t_out


# The identity on tangents. Reverse mode transposes it away; forward mode alone has to
# evaluate it, which is where it complains.
_tangent_p = eqxi.create_vprim(
    "nodegrad_tangent",
    _tangent_impl,
    lambda x: [x],
    _tangent_jvp,
    _tangent_transpose,
)

_primal_p = eqxi.create_vprim(
    "nodegrad_reverse_mode_only", lambda x: [x], lambda x: [x], _primal_jvp, None
)


def reverse_mode_only(tree: PyTree) -> PyTree:
    """The identity; raises where it is differentiated by forward mode alone."""

    def mark(x):
        if eqx.is_inexact_array(x):
            return _primal_p.bind(x)[0]
        # JAX may say of an integer that it depends on what is differentiated, and
        # Equinox does not expect that.
        return jax.lax.stop_gradient(x) if eqx.is_array(x) else x

    return jax.tree.map(mark, tree)
