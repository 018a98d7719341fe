r"""Noticing that the two copies of a coupled solution have come apart.

A coupled scheme has, besides the solution, a parasitic mode: the difference $D$ of its
two copies. Over a step of size $h$ it is multiplied by about
$\lambda \exp(-h \rho)$, with $\rho$ the Rayleigh quotient of the Jacobian $J$ of the
vector field along $D$. So on a problem that decays ($\rho < 0$) faster than $\lambda$
the difference grows exponentially out of rounding and truncation, without any estimate
of the local error seeing it.

$J D$ is known without any evaluation beyond those of the step: the last step ended with
$f(t_n, y_n)$ and this one began with $f(t_n, z_n)$. The monitor sums up

$$\gamma_{n+1} = \max(0, \gamma_n + \log \lambda - h \rho_n),$$

the logarithm of the greatest amplification that any earlier difference has undergone.
"""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.internal import ω
from jaxtyping import Array, PyTree


# Apart: amplified a thousandfold and grown to this part of the solution, ...
_LOG_AMPLIFICATION = math.log(1e3)
_SIGNIFICANT = 1e-4
# ... or, whatever it comes from, of the size of the solution itself.
_OVERWHELMING = 0.5


class CouplingMonitor(eqx.Module):
    r"""What is known about the two copies after a step.

    - `slope`: $f(t_n, y_n)$; `None` where the slopes of two steps cannot be compared.
    - `gain`: $\gamma$.
    - `scale`: the greatest root mean square of the solution so far.
    - `distance`: the root mean square of the difference.
    - `lost`: whether the copies have come apart.
    """

    slope: PyTree[Array] | None
    gain: Any
    scale: Any
    distance: Any
    lost: Any

    @classmethod
    def init(cls, y0: PyTree, compares_slopes: bool) -> "CouplingMonitor":
        """Before the first step, where both copies are the same."""
        scale = size(y0)
        zero = jnp.zeros_like(scale)
        slope = jax.tree.map(jnp.zeros_like, y0) if compares_slopes else None
        return cls(slope, zero, scale, zero, jnp.array(False))

    def update(
        self, d0, d1, y1, info, control, coupling_parameter, made_jump
    ) -> "CouplingMonitor":
        """After a step.

        **Arguments:**

        - `d0`, `d1`: the difference before and after the step.
        - `y1`: the solution after it.
        - `info`: with the vector field at `z0` and at `y1`, times `control`.
        - `made_jump`: whether the vector field is another one than a step ago.
        """
        old, d0, d1, y1, info, control = jax.lax.stop_gradient(
            (self, d0, d1, y1, info, control)
        )
        k0, k1 = info["k0"], info["k1"]
        gain, slope = old.gain, None
        if old.slope is not None:
            step = jax.tree.leaves(control)[0]
            growth = (old.slope**ω * step - k0**ω).ω
            norm = _dot(d0, d0)
            is_known = (norm > 0) & ~jnp.asarray(made_jump)
            rate = jnp.where(is_known, _dot(d0, growth) / norm, 0)
            gain = jnp.maximum(0, gain + math.log(coupling_parameter) - rate)
            gain = jnp.where(norm > 0, gain, 0)
            slope = jax.tree.map(lambda k: jnp.where(step == 0, 0, k / step), k1)
        scale, distance = jnp.maximum(old.scale, size(y1)), size(d1)
        apart = (gain > _LOG_AMPLIFICATION) & (distance > _SIGNIFICANT * scale)
        lost = apart | (distance > _OVERWHELMING * scale)
        return CouplingMonitor(slope, gain, scale, distance, lost)


def size(tree: PyTree[Array]) -> Array:
    """The root mean square of all numbers in `tree`."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(_dot(tree, tree) / sum(x.size for x in leaves))


def _dot(x: PyTree[Array], y: PyTree[Array]) -> Array:
    products = jax.tree.map(lambda a, b: jnp.sum(jnp.real(jnp.conj(a) * b)), x, y)
    return functools.reduce(jnp.add, jax.tree.leaves(products))
