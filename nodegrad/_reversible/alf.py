"""Asynchronous leapfrog, the reversible integrator of MALI."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.compat import is_sde, ω
from .._internal.norms import magnitudes, relative_size, size
from .._internal.results import COUPLING_LOST
from .coupling_monitor import FIRST_STEPS
from .invertible_step import (
    AbstractInvertibleStep,
    check_number,
    check_resync_every,
    is_regular_resync,
)


# The velocities of two successive half steps differ by a full turn: there is no
# solution left between them.
_OVERWHELMING = 0.5


class ALF(diffrax.AbstractAdaptiveSolver):
    r"""Asynchronous leapfrog, a reversible method of second order.

    Beside the state $x$ goes a velocity $v$, with $v_0 = f(t_0, x_0)$. With $\eta$ the
    `damping`,

    $$k = x + \tfrac{h}{2} v, \quad u = f(t + \tfrac{h}{2}, k), \quad
      v' = v + 2 \eta (u - v), \quad x' = k + \tfrac{h}{2} v',$$

    which is undone by $k = x' - \frac{h}{2} v'$, $v = (v' - 2 \eta u) / (1 - 2 \eta)$
    and $x = k - \frac{h}{2} v$. The error estimate is $h (u - v)$; dense output is the
    cubic Hermite interpolant with the velocities for slopes.

    **Arguments:**

    - `damping`: $\eta$, in $(0, 1]$ but not $\frac{1}{2}$. Less than one makes the
      method stable on decaying problems (see `nodegrad.is_stable`), but of first order
      only, and rounding grows by $1 / \lvert 1 - 2 \eta \rvert$ with every step back.
    - `resync_every`: after how many accepted steps to resync, $v := f(t, x)$. This
      makes the undamped method stable on decaying problems too, at second order.
      `nodegrad.ReversibleAdjoint` stores the state at every resync.

    **Raises:** `TypeError` or `ValueError` for other arguments, and for stochastic
    equations. A solve whose velocity has come apart from the vector field ends with
    `nodegrad.RESULTS.coupling_lost` (inside `diffrax.diffeqsolve` with an adjoint of
    Diffrax: `diffrax.RESULTS.nonlinear_divergence`).

    **Cost:** one evaluation of the vector field a step, one before the first step, and
    one at every resync.

    **When not to use it:** undamped without `resync_every` on anything that decays: the
    region of stability is the segment from $-i$ to $i$, and adaptive steps stall.

    ??? cite "Reference"

        Mutze: An asynchronous leapfrog method II, 2013, arXiv:1311.6602; Zhuang et al.:
        MALI: A memory efficient and reverse accurate integrator for Neural ODEs,
        ICLR 2021, Algorithms 2 and 3.
    """

    damping: float = eqx.field(static=True, default=1.0)
    resync_every: int | None = eqx.field(static=True, default=None)

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.AbstractLocalInterpolation]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )

    def __check_init__(self):
        check_resync_every("ALF", self.resync_every)
        check_number("damping", self.damping)
        if not 0 < self.damping <= 1 or self.damping == 0.5:
            msg = (
                "`damping` must be a number in (0, 1] other than 0.5, with which steps "
                f"cannot be undone; got {self.damping}."
            )
            raise ValueError(msg)

    @property
    def reversal_cls(self):
        """How `nodegrad.ReversibleAdjoint` undoes a step."""
        return LeapfrogReversal

    @property
    def evaluations(self) -> tuple[int, int] | None:
        """Vector field evaluations before the first step, and of each."""
        return (1, 1) if self.resync_every is None else None

    def order(self, terms):
        del terms
        return 2 if self.damping == 1 else 1

    def error_order(self, terms):
        del terms
        return 2

    def init(self, terms, t0, t1, y0, args):
        del t1
        if is_sde(terms):
            msg = (
                "`nodegrad.ALF` is for ordinary and controlled equations without noise."
            )
            raise ValueError(msg)
        velocity = terms.vf(t0, y0, args)
        speed = jax.lax.stop_gradient(velocity)
        zero = jnp.zeros_like(size(speed))
        return VelocityState(
            velocity, magnitudes(speed), zero, jnp.array(False), jnp.array(0)
        )

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        step = LeapfrogReversal(self, terms, args)
        parts: dict[str, Callable] = step.parts()
        evaluate = lambda part, _, *part_args: parts[part](*part_args)
        count = solver_state.steps_taken
        resync = made_jump | is_regular_resync(self.resync_every, count)
        v0, twice = solver_state.velocity, 2 * self.damping
        if resync is not False:
            v0 = parts["resynced"](t0, y0, v0, resync)
        y1, v1, info = step.forward(evaluate, t0, t1, y0, v0, False)
        error = ((info["k1"] ** ω - info["k0"] ** ω) / twice).ω
        gap, speed = jax.lax.stop_gradient((((v1**ω - v0**ω) / twice).ω, v1))
        scale = magnitudes(solver_state.scale, speed)
        lost = ~(relative_size(gap, scale) <= _OVERWHELMING) & (count >= FIRST_STEPS)
        result = diffrax.RESULTS.where(lost, COUPLING_LOST, diffrax.RESULTS.successful)
        new_state = VelocityState(v1, scale, size(gap), lost, count + 1)
        return y1, error, info, new_state, result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class VelocityState(eqx.Module):
    """The state of `ALF`: the velocity, and how far it is from the vector field."""

    velocity: PyTree[Array]
    scale: Any
    distance: Any
    lost: Any
    steps_taken: Any


class LeapfrogReversal(AbstractInvertibleStep):
    """The step of `ALF` and its inverse; see there for the equations."""

    resyncs_at_jumps: ClassVar[bool] = True

    def parts(self):
        vf = lambda t, y: self.terms.vf(t, y, self.args)
        return dict(
            control=self.terms.contr,
            vf=lambda t0, t1, y: vf(t0 + 0.5 * (t1 - t0), y),
            resynced=lambda t, y, velocity, resync: jax.lax.cond(
                resync, lambda: vf(t, y), lambda: velocity
            ),
            product=self.terms.prod,
        )

    def replay_state(self, solver_state):
        return solver_state.velocity

    def with_replay_state(self, solver_state, replay_state):
        get = lambda s: s.velocity
        return eqx.tree_at(get, solver_state, replay_state, is_leaf=lambda x: x is None)

    def forward(self, evaluate, t0, t1, y0, state0, resync):
        v0 = state0
        if resync is not False:
            v0 = evaluate("resynced", "resync", t0, y0, v0, resync)
        control = evaluate("control", "control", t0, t1)
        k0 = evaluate("product", "start", v0, control)
        u = evaluate("vf", "middle", t0, t1, (y0**ω + 0.5 * k0**ω).ω)
        v1 = (v0**ω + 2 * self.solver.damping * (u**ω - v0**ω)).ω
        k1 = evaluate("product", "end", v1, control)
        y1 = ((y0**ω + 0.5 * k0**ω) + 0.5 * k1**ω).ω
        return y1, v1, dict(y0=y0, y1=y1, k0=k0, k1=k1)

    def backward(self, evaluate, t0, t1, before, y1, state1):
        del before
        v1, twice = state1, 2 * self.solver.damping
        control = evaluate("control", "control", t0, t1)
        k1 = evaluate("product", "end", v1, control)
        middle = (y1**ω - 0.5 * k1**ω).ω
        u = evaluate("vf", "middle", t0, t1, middle)
        v0 = ((v1**ω - twice * u**ω) / (1 - twice)).ω
        k0 = evaluate("product", "undo", v0, control)
        return (middle**ω - 0.5 * k0**ω).ω, v0
