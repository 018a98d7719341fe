r"""Second-order expansions of a loss, and how they change under a map.

With a loss $Q_1(s_1, u)$ known to second order at a point, and a map $s_1 = \Phi(s, u)$
that leads there, $Q(s, u) = Q_1(\Phi(s, u), u)$ is known to second order where the map
came from. With $\lambda, \Lambda$ for the first and second derivatives of $Q_1$ in
$s_1$, the chain rule is

$$Q_{ss} = \Phi_s^\top \Lambda\, \Phi_s + \sum_k \lambda_k\, \partial_{ss} \Phi_k$$

and likewise for the blocks with $u$. Without the second term, this is Gauss-Newton.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Expansion(eqx.Module):
    """First and second derivatives of a loss in the state $s$ and parameters $u$."""

    s: Float[Array, " s"]
    u: Float[Array, " u"]
    ss: Float[Array, "s s"]
    su: Float[Array, "s u"]
    uu: Float[Array, "u u"]

    def of_first(self, size: int) -> tuple[Array, Array]:
        """Gradient and Hessian in the first `size` numbers of $s$ and all of $u$."""
        s, su = slice(None, size), self.su[:size]
        gradient = jnp.concatenate([self.s[s], self.u])
        hessian = jnp.block([[self.ss[s, s], su], [su.T, self.uu]])
        return gradient, hessian


def expand(fn: Callable, s: Array, u: Array) -> Expansion:
    """The expansion of `fn(s, u)`, which returns a scalar."""
    size = len(s)

    def gradient(z):
        out = jax.grad(lambda z: fn(z[:size], z[size:]))(z)
        return out, out

    h, g = jax.jacfwd(gradient, has_aux=True)(jnp.concatenate([s, u]))
    return Expansion(
        g[:size], g[size:], h[:size, :size], h[:size, size:], h[size:, size:]
    )


def pull_back(
    after: Expansion, fn: Callable, s: Array, u: Array, curved: bool
) -> Expansion:
    """The expansion before the map `s1 = fn(s, u)`, from the one after it.

    Without the second derivatives of `fn`, unless `curved`.
    """
    out = _pull_back_curved if curved else _pull_back_flat
    before = out(after, fn, s, u)
    # Not through `fn`: nothing is multiplied by the identity that `u` passes through.
    return eqx.tree_at(
        lambda e: (e.u, e.uu), before, (before.u + after.u, before.uu + after.uu)
    )


def _pull_back_curved(after: Expansion, fn: Callable, s, u) -> Expansion:
    s1 = fn(s, u)

    def model(x, v):
        x1 = fn(x, v)
        ds, du = x1 - s1, v - u
        return after.s @ x1 + ds @ (0.5 * (after.ss @ ds) + after.su @ du)

    return expand(model, s, u)


def _pull_back_flat(after: Expansion, fn: Callable, s, u) -> Expansion:
    jacobian = jax.jacrev if len(s) < len(u) else jax.jacfwd
    by_s, by_u = jacobian(fn, argnums=(0, 1))(s, u)
    crossed = by_u.T @ after.su
    return Expansion(
        s=after.s @ by_s,
        u=after.s @ by_u,
        ss=by_s.T @ after.ss @ by_s,
        su=by_s.T @ (after.ss @ by_u + after.su),
        uu=by_u.T @ after.ss @ by_u + crossed + crossed.T,
    )
