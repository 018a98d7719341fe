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
All this in a norm in which every component counts relative to its own largest value.

Where the control is a path or noise, slopes of two steps cannot be compared, and there
is nothing but the size of the difference to go by.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.compat import ω
from .._internal.norms import dot, magnitudes, ratios, relative_size, size


# Apart: amplified so often and grown to this part of the largest state so far, ...
_AMPLIFIED, _SIGNIFICANT = math.log(1e3), 1e-4
# ... or so often and to this part of the present one, ...
_AMPLIFIED_LESS, _LARGE = math.log(1e2), 0.05
# ... or, if amplification is unknown, this part of what the state was lately, ...
_LARGE_UNEXPLAINED = 0.25
# ... or of the size of the solution itself, once there is one.
_OVERWHELMING, FIRST_STEPS = 0.5, 3
# What "lately" is: states count for less by this factor every step.
_FORGETTING = 0.99


class CouplingMonitor(eqx.Module):
    r"""What is known about the two copies after a step.

    - `slope`: $f(t_n, y_n)$; `None` where the slopes of two steps cannot be compared.
    - `gain`: $\gamma$.
    - `scale`: the largest absolute values of the solution so far, number by number.
    - `level`: the size of the solution lately, relative to `scale`.
    - `distance`: the root mean square of the difference.
    - `lost`: whether the copies have come apart.
    """

    slope: PyTree[Array] | None
    gain: Any
    scale: PyTree[Array]
    level: Any
    distance: Any
    lost: Any

    @classmethod
    def init(cls, y0: PyTree, compares_slopes: bool) -> "CouplingMonitor":
        """Before the first step, where both copies are the same."""
        y0 = jax.lax.stop_gradient(y0)
        zero = jnp.zeros_like(size(y0))
        slope = jax.tree.map(jnp.zeros_like, y0) if compares_slopes else None
        return cls(slope, zero, magnitudes(y0), zero, zero, jnp.array(False))

    def update(
        self, d0, d1, info, control, coupling_parameter, made_jump, count
    ) -> "CouplingMonitor":
        """After a step.

        **Arguments:**

        - `d0`, `d1`: the difference before and after the step.
        - `info`: with the solution before and after the step, and the vector field at
          `z0` and at `y1`, times `control`.
        - `made_jump`: whether the vector field is another one than a step ago.
        - `count`: the steps before this one.
        """
        old, d0, d1, info, control = jax.lax.stop_gradient(
            (self, d0, d1, info, control)
        )
        y0, y1, k0, k1 = (info[name] for name in ("y0", "y1", "k0", "k1"))
        scale = magnitudes(old.scale, y1, k0, k1)
        gain, slope = old.gain, None
        if old.slope is not None:
            step = jax.tree.leaves(control)[0]
            growth = (old.slope**ω * step - k0**ω).ω
            difference = ratios(d0, scale)
            norm = dot(difference, difference)
            is_known = (norm > 0) & ~jnp.asarray(made_jump)
            rate = dot(difference, ratios(growth, scale)) / jnp.where(is_known, norm, 1)
            rate = jnp.where(is_known, rate, 0)
            gain = jnp.maximum(0, gain + math.log(coupling_parameter) - rate)
            gain = jnp.where(norm > 0, gain, 0)
            slope = jax.tree.map(lambda k: jnp.where(step == 0, 0, k / step), k1)
        apart, now = relative_size(d1, scale), relative_size(magnitudes(y0, y1), scale)
        level = jnp.maximum(now, _FORGETTING * old.level)
        sound = (apart <= _OVERWHELMING) | (count < FIRST_STEPS)
        if slope is None:
            sound = sound & (apart <= _LARGE_UNEXPLAINED * level)
        else:
            sound = sound & ((gain <= _AMPLIFIED) | (apart <= _SIGNIFICANT))
            sound = sound & ((gain <= _AMPLIFIED_LESS) | (apart <= _LARGE * now))
        return CouplingMonitor(slope, gain, scale, level, size(d1), ~sound)
