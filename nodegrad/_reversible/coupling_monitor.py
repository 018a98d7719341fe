r"""Detects that the two copies of a coupled solution have diverged.

A coupled scheme carries two copies $y$ and $z$ of the solution. Their difference
$D = y - z$ is a parasitic mode of the scheme. A step of size $h$ multiplies it by about
$\lambda \exp(-h \rho)$, where $\rho$ is the Rayleigh quotient of the Jacobian $J$ of
the vector field along $D$. On a problem that decays ($\rho < 0$) faster than $\lambda$,
rounding and truncation errors in $D$ grow exponentially. Estimates of the local error
of the base method do not contain this growth. So there are two safeguards.

1. The growth of $D$ in a step is added to its error estimate (`with_difference`). A
   controller then accepts no step in which $D$ grows by more than its tolerance, and
   makes steps so short that the coupling is stable. A solve has failed if it takes ten
   times as many steps as the base method.
2. With constant steps no step is rejected. The monitor detects that $D$ grows.

The product $h J D$ needs no evaluations in addition to those of the step: the previous
step ended with $f(t_n, y_n)$, and this step began with $f(t_n, z_n)$. The monitor keeps

$$\gamma_{n+1} = \max(0, \gamma_n + \log \lambda - h \rho_n),$$

the logarithm of the largest amplification of any earlier difference up to now. All
sizes are root mean squares of components, each relative to its largest value so far.

A step that starts with $D = 0$, as after a resync, shows nothing of $\rho$. Where the
solver decides about resyncs itself, the last known $\rho$ then holds on. Otherwise an
unstable step would go unnoticed after every resync.

If the control is noise or a path with several channels, the vector fields of two steps
cannot be compared, so $\rho$ is unknown. Then only the size of $D$ is tested.
"""

import math
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._internal.norms import dot, magnitudes, ratios, relative_size, size


# The growth of the difference in a step is its size after the step, less a part of its
# size before: at most this part. So a controller keeps the difference below ten times
# its tolerance. Each step adds 1 - coupling_parameter of the difference to the error of
# the solution, so a small parameter allows less (see `allowed_difference`). Measured on
# random problems: docs/reversible_solvers.md.
_ALLOWED = 0.9
# A step is short if the difference after it is a thousand times the error of the base
# method. A controller makes such steps only if the coupling is unstable otherwise. With
# constant steps a sound solution has none: its difference stays below
# 1 / (1 - coupling_parameter) errors. A solve is lost if ten times as many steps are
# short as are not, beyond the first hundred. Differences of `_ROUNDING` units of
# rounding do not count.
_SHORT, _ROUNDING = 1e3, 1e3
_MANY, _TIMES = 100, 10
# Conditions 1 and 2 below need a difference of so many errors of the base method: a
# smaller one matters less than these errors.
_ERRORS = 30.0

# The copies have also diverged if one of four conditions holds after a step. Low
# thresholds report early, but may report solutions that are accurate. "Found in" names
# problems of tests/reversible/test_reversible.py that a condition reports before the
# others do. The problems "rotation", "growth" and "quadrature from rest" there must not
# be reported.
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

# A solver that decides itself where to resync does so if the difference is about to
# grow by this part of the error of the base method. On the random problems of
# docs/reversible_solvers.md, 16 of 320 solutions by Tsit5 were ten tolerances worse
# than those of the base method with 0.1, 12 with 0.05 and 9 with 0.02, in medians of
# 21, 26 and 37 resyncs.
_RESYNC = 0.02
# Without an error estimate, a growth by this part of the largest state.
_RESYNC_WITHOUT_ESTIMATE = 5e-7
# A difference of so many units of rounding is not worth a resync.
_RESYNC_ROUNDING = 10.0
# Where the growth is unknown, the copies are lost at `_LARGE_UNEXPLAINED`.
_RESYNC_UNEXPLAINED = 0.05


class CouplingMonitor(eqx.Module):
    r"""What is known about the two copies after a step.

    - `slope`: $f(t_n, y_n)$; `None` if slopes of two steps cannot be compared.
    - `rate`: the last known $\rho$, for a control of one.
    - `gain`: $\gamma_n$.
    - `scale`: for each component, the largest absolute value so far of the solution and
      of its change in one step.
    - `level`: the size of recent states, relative to `scale`.
    - `distance`: the root mean square of $D$, in the units of the state.
    - `largest_error`: the largest error estimate of the base method, relative to
      `scale`.
    - `num_short`: the number of steps that are short because of the coupling.
    - `limited`: whether most of the last error estimate was growth of the difference.
    - `wants_resync`: whether the difference should be removed before the next step.
    - `lost`: whether the copies have diverged.
    """

    slope: PyTree[Array] | None
    rate: Float[Array, ""]
    gain: Float[Array, ""]
    scale: PyTree[Array]
    level: Float[Array, ""]
    distance: Float[Array, ""]
    largest_error: Float[Array, ""]
    num_short: Int[Array, ""]
    limited: Bool[Array, ""]
    wants_resync: Bool[Array, ""]
    lost: Bool[Array, ""]

    @classmethod
    def init(cls, y0: PyTree[Array], compares_slopes: bool) -> "CouplingMonitor":
        """Returns the monitor before the first step, where both copies are equal."""
        y0 = jax.lax.stop_gradient(y0)
        zero = jnp.zeros_like(size(y0))
        slope = jax.tree.map(jnp.zeros_like, y0) if compares_slopes else None
        no, none = jnp.array(False), jnp.array(0)
        scale = magnitudes(y0)
        return cls(slope, zero, zero, scale, zero, zero, zero, none, no, no, no)

    def update(
        self,
        d0: PyTree[Array],
        d1: PyTree[Array],
        info: dict[str, PyTree[Array]],
        control: PyTree[Array],
        coupling_parameter: float,
        made_jump: Bool[ArrayLike, ""],
        count: Int[Array, ""],
        error: PyTree[Array] | None,
        allowed: float,
    ) -> "CouplingMonitor":
        """Returns the monitor after a step.

        **Arguments:**

        - `d0`, `d1`: the difference before and after the step.
        - `info`: the solution before and after the step, `y0` and `y1`, and the vector
          field at `z0` and at `y1` times `control`, `k0` and `k1`.
        - `control`: the control over the step; a step size if slopes are compared.
        - `made_jump`: whether the vector field has jumped since the previous step.
        - `count`: the number of steps before this one.
        - `error`: the error estimate of the base method, or `None`.
        - `allowed`: the part of `d0` that is no growth, as in `with_difference`.
        """
        # The monitor decides whether a solve fails; it has no derivative.
        old, d0, d1, info, control, error = jax.lax.stop_gradient(
            (self, d0, d1, info, control, error)
        )
        y0, y1, k0, k1 = (info[name] for name in ("y0", "y1", "k0", "k1"))
        scale = magnitudes(old.scale, y1, k0, k1)
        slope, rate, gain, growth = None, old.rate, old.gain, None
        if old.slope is not None:
            step = jax.tree.leaves(control)[0]
            log_factor = math.log(coupling_parameter)
            slope, rate, gain = old._compared(
                d0, k0, k1, step, scale, log_factor, made_jump
            )
            growth = log_factor - rate * jnp.asarray(step, rate.dtype)
        apart, now = relative_size(d1, scale), relative_size(magnitudes(y0, y1), scale)
        level = jnp.maximum(now, _FORGETTING * old.level)
        base = jnp.zeros_like(apart) if error is None else relative_size(error, scale)
        largest_error = jnp.maximum(old.largest_error, base)
        wants_resync = _wants_resync(apart, level, growth, error is not None, base)
        # `<=` is false for NaN, so a difference of NaN counts as diverged.
        sound = (apart <= _OVERWHELMING) | (count < FIRST_STEPS)
        if slope is None:
            sound = sound & (apart <= _LARGE_UNEXPLAINED * level)
        else:
            small = (gain <= _AMPLIFIED) | (apart <= _SIGNIFICANT)
            small = small & ((gain <= _AMPLIFIED_LESS) | (apart <= _LARGE * now))
            sound = sound & (small | (apart <= _ERRORS * largest_error))
        num_short, limited = old.num_short, jnp.array(False)
        if error is not None:
            before = allowed * relative_size(d0, scale)
            short, limited = _shortened(before, apart, base, now)
            num_short = num_short + short.astype(num_short.dtype)
            sound = sound & (num_short <= _MANY + _TIMES * (count + 1 - num_short))
        return CouplingMonitor(
            slope=slope,
            rate=rate,
            gain=gain,
            scale=scale,
            level=level,
            distance=size(d1),
            largest_error=largest_error,
            num_short=num_short,
            limited=limited,
            wants_resync=wants_resync,
            lost=~sound,
        )

    def _compared(
        self,
        d0: PyTree[Array],
        k0: PyTree[Array],
        k1: PyTree[Array],
        step: Array,
        scale: PyTree[Array],
        log_factor: float,
        made_jump: Bool[ArrayLike, ""],
    ) -> tuple[PyTree[Array], Float[Array, ""], Float[Array, ""]]:
        r"""Returns `slope`, `rate` and `gain` after a step.

        The arguments are those of `update`; `step` is the control, `log_factor` the
        logarithm of $\lambda$, and `scale` that after the step.
        """
        # `h J D` is the difference of the slopes at `y0` and `z0`, times the step.
        subtract = lambda slope, k: slope * jnp.asarray(step, k.dtype) - k
        change = jax.tree.map(subtract, self.slope, k0)
        exponent, is_zero, is_known = _exponent(
            ratios(d0, scale), ratios(change, scale), made_jump
        )
        gain = jnp.maximum(0, self.gain + log_factor - exponent)
        gain = jnp.where(is_zero, 0, gain)
        # A control may be zero, as that of a path that stands still.
        per_time = lambda k: jnp.where(step == 0, 0, k / jnp.asarray(step, k.dtype))
        rate = jnp.where(is_known & (step != 0), per_time(exponent), self.rate)
        return jax.tree.map(per_time, k1), rate, gain

    def before_next_step(
        self, discards: Bool[ArrayLike, ""], y0: PyTree[Array], y1: PyTree[Array]
    ) -> "CouplingMonitor":
        """Returns the monitor of a solve whose next step `discards` the difference.

        Only rounding is then left of the difference: the solution is $z + D$, with the
        digits of $D$. A quarter of the digits of a state have to be left, before or
        after the step (`y0`, `y1`); of a $D$ of NaN there are none. (A state that
        passes through zero loses some digits.)
        """
        largest = jax.lax.stop_gradient(jnp.maximum(size(y0), size(y1)))
        eps = jnp.finfo(largest.dtype).eps
        is_accurate = eps * self.distance <= eps**0.25 * largest
        return replace(self, lost=~is_accurate | (self.lost & ~jnp.asarray(discards)))


def _wants_resync(
    apart: Float[Array, ""],
    level: Float[Array, ""],
    growth: Float[Array, ""] | None,
    has_error: bool,
    base: Float[Array, ""],
) -> Bool[Array, ""]:
    """Returns whether the difference `apart` should be removed before the next step.

    It should if the instability of the coupling is about to make it grow, in one step,
    by more than a part of the error of the base method, `base`. Then neither the error
    nor the step sizes depend on the coupling. `growth` is the logarithm of the factor
    by which a step like the last one multiplies a difference, and `level` the size of
    the state.
    """
    if growth is None:
        # Nothing is known about the stability: only a large difference counts.
        return apart > _RESYNC_UNEXPLAINED * level
    more = jnp.expm1(jnp.maximum(0, growth)) * apart
    enough = _RESYNC * base if has_error else _RESYNC_WITHOUT_ESTIMATE
    return (more > enough) & (apart > _rounding(apart, _RESYNC_ROUNDING))


def _shortened(
    before: Float[Array, ""],
    apart: Float[Array, ""],
    base: Float[Array, ""],
    now: Float[Array, ""],
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Returns whether a step is short, and whether growth limited its size.

    `before` is the allowed part of the difference before the step, `apart` is the
    difference after it, and `now` is the size of the state before or after it.
    """
    is_short = (apart > _SHORT * base) & (apart > _rounding(apart, _ROUNDING))
    # After a resync any difference is new: it has the size of an error, and is none.
    has_grown = (before > 0) & (apart - before > base)
    # Rounding is that of the present state: the difference of a state that has decayed
    # may be many tolerances, and less than the rounding of the largest state.
    return is_short, has_grown & (apart > _rounding(apart, _RESYNC_ROUNDING) * now)


def _rounding(like: Array, units: float) -> float:
    """Returns so many units of rounding of the type of `like`."""
    return units * float(jnp.finfo(like.dtype).eps)


def _exponent(
    difference: PyTree[Array], change: PyTree[Array], made_jump: Bool[ArrayLike, ""]
) -> tuple[Float[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
    r"""Returns $h \rho$, if there is no difference, and if the quotient is known.

    The quotient is unknown, and returned as 0, after a jump and without a difference.
    """
    norm = dot(difference, difference)
    is_known = (norm > 0) & ~jnp.asarray(made_jump)
    exponent = dot(difference, change) / jnp.where(is_known, norm, 1)
    return jnp.where(is_known, exponent, 0), norm == 0, is_known


def allowed_difference(coupling_parameter: float, resyncs: bool) -> float:
    """Returns the part of the difference before a step that is no growth after it.

    With resyncs it is all: the difference starts anew before it gets large.
    """
    if resyncs:
        return 1.0
    return min(_ALLOWED, max(0.0, 1 - 10 * (1 - coupling_parameter)))


def with_difference(
    error: PyTree[Array], d0: PyTree[Array], d1: PyTree[Array], allowed: float
) -> PyTree[Array]:
    """Returns the error estimate of the step, with the growth of the difference in it.

    `error` is the estimate of the base method, `d0` and `d1` are the difference before
    and after the step, of which the part `allowed` of `d0` is no growth. Magnitudes are
    added, so the two cannot cancel.
    """
    d0, d1 = jax.lax.stop_gradient((d0, d1))

    def add(error: Array, d0: Array, d1: Array) -> Array:
        growth = jnp.maximum(0, jnp.abs(d1) - allowed * jnp.abs(d0))
        magnitude = jnp.abs(error)
        # The sign of a real number, the direction of a complex one; 1 for zero.
        is_zero = magnitude == 0
        unit = error / jnp.where(is_zero, 1, magnitude).astype(error.dtype)
        unit = jnp.where(is_zero, 1, unit)
        return unit * (magnitude + growth).astype(error.dtype)

    return jax.tree.map(add, error, d0, d1)
