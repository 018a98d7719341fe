r"""Detects that the two copies of a coupled solution have diverged.

A coupled scheme carries two copies $y$ and $z$ of the solution. Their difference
$D = y - z$ is a parasitic mode of the scheme. A step of size $h$ multiplies it by about
$\lambda \exp(-h \rho)$, where $\rho$ is the Rayleigh quotient of the Jacobian $J$ of
the vector field along $D$. On a problem that decays ($\rho < 0$) faster than $\lambda$,
rounding and truncation errors in $D$ grow exponentially. Estimates of the local error
do not contain this growth.

The product $h J D$ needs no evaluations in addition to those of the step: the previous
step ended with $f(t_n, y_n)$, and this step began with $f(t_n, z_n)$. The monitor keeps

$$\gamma_{n+1} = \max(0, \gamma_n + \log \lambda - h \rho_n),$$

the logarithm of the largest amplification of any earlier difference up to now. All
sizes are root mean squares of components, each relative to its largest value so far.

If the control is noise or a path with several channels, the vector fields of two steps
cannot be compared, so $\rho$ is unknown. Then only the size of $D$ is tested.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._internal.compat import ω
from .._internal.norms import dot, magnitudes, ratios, relative_size, size


# The copies have diverged if one of four conditions holds after a step. Low thresholds
# report early, but may report solutions that are accurate. "Found in" names problems of
# tests/reversible/test_reversible.py that a condition reports before the others do. The
# problems "rotation", "growth" and "quadrature from rest" there must not be reported.
#
#    amplification     size of D, relative to          found in
#    -------------     ------------------------------  ---------------------------------
# 1. > 1e3             > 1e-4, largest state so far    following a cosine (its error is
#                                                      below 1e-2 when reported),
#                                                      "badly scaled", "two terms"
# 2. > 1e2             > 0.05, present state           "decayed": present states are far
#                                                      smaller than the largest one
# 3. unknown           > 0.25, recent states           "path", "noise"
# 4. any or unknown    > 0.5, largest state so far     none: the last resort
_AMPLIFIED, _SIGNIFICANT = math.log(1e3), 1e-4
_AMPLIFIED_LESS, _LARGE = math.log(1e2), 0.05
_LARGE_UNEXPLAINED = 0.25
_OVERWHELMING = 0.5
# Condition 4 is not tested in the first steps. Of a solution that starts from zero, the
# largest state so far is then only as large as its change in those steps.
FIRST_STEPS = 3
# The weight of a state in "recent states" decreases by this factor with every step. A
# smaller factor would report solutions that pass through zero.
_FORGETTING = 0.99


class CouplingMonitor(eqx.Module):
    r"""What is known about the two copies after a step.

    - `slope`: $f(t_n, y_n)$; `None` if slopes of two steps cannot be compared.
    - `gain`: $\gamma_n$.
    - `scale`: for each component, the largest absolute value so far of the solution and
      of its change in one step.
    - `level`: the size of recent states, relative to `scale`.
    - `distance`: the root mean square of $D$, in the units of the state.
    - `lost`: whether the copies have diverged.
    """

    slope: PyTree[Array] | None
    gain: Float[Array, ""]
    scale: PyTree[Array]
    level: Float[Array, ""]
    distance: Float[Array, ""]
    lost: Bool[Array, ""]

    @classmethod
    def init(cls, y0: PyTree[Array], compares_slopes: bool) -> "CouplingMonitor":
        """Returns the monitor before the first step, where both copies are equal."""
        y0 = jax.lax.stop_gradient(y0)
        zero = jnp.zeros_like(size(y0))
        slope = jax.tree.map(jnp.zeros_like, y0) if compares_slopes else None
        return cls(slope, zero, magnitudes(y0), zero, zero, jnp.array(False))

    def update(
        self,
        d0: PyTree[Array],
        d1: PyTree[Array],
        info: dict[str, PyTree[Array]],
        control: PyTree[Array],
        coupling_parameter: float,
        made_jump: Bool[ArrayLike, ""],
        count: Int[Array, ""],
    ) -> "CouplingMonitor":
        """Returns the monitor after a step.

        **Arguments:**

        - `d0`, `d1`: the difference before and after the step.
        - `info`: the solution before and after the step, `y0` and `y1`, and the vector
          field at `z0` and at `y1` times `control`, `k0` and `k1`.
        - `control`: the control over the step; a step size if slopes are compared.
        - `made_jump`: whether the vector field has jumped since the previous step.
        - `count`: the number of steps before this one.
        """
        # The monitor decides whether a solve fails; it has no derivative.
        old, d0, d1, info, control = jax.lax.stop_gradient(
            (self, d0, d1, info, control)
        )
        y0, y1, k0, k1 = (info[name] for name in ("y0", "y1", "k0", "k1"))
        scale = magnitudes(old.scale, y1, k0, k1)
        gain, slope = old.gain, None
        if old.slope is not None:
            # `h J D` is the difference of the slopes at `y0` and `z0`, times the step.
            step = jax.tree.leaves(control)[0]
            growth = (old.slope**ω * step - k0**ω).ω
            difference = ratios(d0, scale)
            norm = dot(difference, difference)
            is_known = (norm > 0) & ~jnp.asarray(made_jump)
            # The Rayleigh quotient, times the step size.
            rate = dot(difference, ratios(growth, scale)) / jnp.where(is_known, norm, 1)
            rate = jnp.where(is_known, rate, 0)
            gain = jnp.maximum(0, gain + math.log(coupling_parameter) - rate)
            gain = jnp.where(norm > 0, gain, 0)
            # A control may be zero, as that of a path that stands still.
            slope = jax.tree.map(lambda k: jnp.where(step == 0, 0, k / step), k1)
        apart, now = relative_size(d1, scale), relative_size(magnitudes(y0, y1), scale)
        level = jnp.maximum(now, _FORGETTING * old.level)
        # `<=` is false for NaN, so a difference of NaN counts as diverged.
        sound = (apart <= _OVERWHELMING) | (count < FIRST_STEPS)
        if slope is None:
            sound = sound & (apart <= _LARGE_UNEXPLAINED * level)
        else:
            sound = sound & ((gain <= _AMPLIFIED) | (apart <= _SIGNIFICANT))
            sound = sound & ((gain <= _AMPLIFIED_LESS) | (apart <= _LARGE * now))
        return CouplingMonitor(slope, gain, scale, level, size(d1), ~sound)
