"""Asynchronous leapfrog, the reversible solver of MALI."""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._internal.compat import is_sde, ω
from .._internal.norms import magnitudes, relative_size, size
from .._internal.results import COUPLING_LOST
from .._internal.tree import all_finite, check_counts, check_numbers, where
from .._trajectory.state_source import Evaluate
from .coupling_monitor import FIRST_STEPS
from .invertible_step import (
    AbstractInvertibleStep,
    Flag,
    is_regular_resync,
    Resync,
    SharingSolver,
    Time,
)


# The coupling is lost if the vector field in the middle of a step differs from the
# velocity by more than this fraction of the largest velocity so far. With 0.5, the
# problem in tests/reversible/test_reversible.py that follows a cosine is reported
# before its error is 1.
_OVERWHELMING = 0.5


class ALF(SharingSolver, diffrax.AbstractAdaptiveSolver):
    r"""Asynchronous leapfrog, a reversible method of second order.

    The solver carries a velocity $v$ in addition to the state $x$, with
    $v_0 = f(t_0, x_0)$. With $\eta$ for the `damping`, a step is

    $$k = x + \tfrac{h}{2} v, \quad u = f(t + \tfrac{h}{2}, k), \quad
      v' = v + 2 \eta (u - v), \quad x' = k + \tfrac{h}{2} v',$$

    Its inverse is $k = x' - \frac{h}{2} v'$, $v = (v' - 2 \eta u) / (1 - 2 \eta)$ and
    $x = k - \frac{h}{2} v$. The error estimate is $h (u - v)$. Dense output is the
    cubic Hermite interpolant whose slopes are the velocities.

    **Example:**

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    pendulum = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])]))
    y0 = jnp.array([1.0, 0.0])
    sol = nodegrad.odesolve(pendulum, nodegrad.ALF(), 0.0, 2.0, 0.01, y0)
    print(sol.ys[0, 0].round(3))  # -0.306
    ```

    **Arguments:**

    - `damping`: $\eta$, in $(0, 1]$ but not $\frac{1}{2}$. A value below one makes the
      method stable on decaying problems (see `nodegrad.is_stable`), but reduces it to
      first order, and rounding grows by $1 / \lvert 1 - 2 \eta \rvert$ with every step
      of the backward pass.
    - `resync_every`: after how many accepted steps to resync, $v := f(t, x)$. This
      makes the undamped method stable on decaying problems as well, at second order.
      `nodegrad.ReversibleAdjoint` stores the state at every resync.

    **Raises:** `TypeError` or `ValueError` for other arguments, and for stochastic
    equations. A solve whose velocity has diverged from the vector field ends with
    `nodegrad.RESULTS.coupling_lost` (inside `diffrax.diffeqsolve` with an adjoint of
    Diffrax: `diffrax.RESULTS.nonlinear_divergence`).

    **Cost:** one evaluation of the vector field a step, one before the first step, and
    one at every resync.

    **When not to use it:** undamped without `resync_every` on a problem that decays:
    the region of stability is the segment from $-i$ to $i$, and adaptive steps stall.

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

    def __check_init__(self) -> None:
        check_counts(None, resync_every=self.resync_every)
        check_numbers(static=True, damping=self.damping)
        if not 0 < self.damping <= 1 or self.damping == 0.5:
            msg = (
                "`damping` must be a number in (0, 1] other than 0.5, with which steps "
                f"cannot be undone; got {self.damping}."
            )
            raise ValueError(msg)

    @property
    def reversal_cls(self) -> type[AbstractInvertibleStep]:
        """The class by which `nodegrad.ReversibleAdjoint` undoes a step."""
        return LeapfrogReversal

    @property
    def evaluations(self) -> tuple[int, int] | None:
        """Vector field evaluations before the first step, and per step.

        `None` with resyncs, which make further evaluations.
        """
        return (1, 1) if self.resync_every is None else None

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        del terms
        return 2 if self.damping == 1 else 1

    def error_order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        del terms
        return 2

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        args: PyTree,
    ) -> "VelocityState":
        del t1
        if is_sde(terms):
            msg = (
                "`nodegrad.ALF` is for ordinary and controlled equations without noise."
            )
            raise ValueError(msg)
        # A sample that starts at NaN is evaluated at ones. If a loss ignores it, its
        # cotangents are zero. A pullback through NaN would turn these into NaN for the
        # parameters that it shares with the other samples of a batch.
        is_valid = all_finite(y0)
        velocity = terms.vf(
            t0, where(is_valid, y0, jax.tree.map(jnp.ones_like, y0)), args
        )
        velocity = jax.tree.map(lambda x: jnp.where(is_valid, x, jnp.nan), velocity)
        speed = jax.lax.stop_gradient(velocity)
        zero = jnp.zeros_like(size(speed))
        return VelocityState(
            velocity, magnitudes(speed), zero, jnp.array(False), jnp.array(0)
        )

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        args: PyTree,
        solver_state: "VelocityState",
        made_jump: Flag,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], "VelocityState", diffrax.RESULTS]:
        step = LeapfrogReversal(self, terms, args)
        parts: dict[str, Callable] = step.parts()
        evaluate = lambda part, _, *part_args: parts[part](*part_args)
        count = solver_state.steps_taken
        resync = made_jump | is_regular_resync(self.resync_every, count)
        v0, twice = solver_state.velocity, 2 * self.damping
        if resync is not False:
            v0 = parts["resynced"](t0, y0, v0, resync)
        y1, v1, info = step.forward(evaluate, t0, t1, y0, v0, False)
        # h (u - v), since v' - v = 2 eta (u - v).
        error = ((info["k1"] ** ω - info["k0"] ** ω) / twice).ω
        # The same gap u - v, without h, against the largest velocities so far.
        gap, speed = jax.lax.stop_gradient((((v1**ω - v0**ω) / twice).ω, v1))
        scale = magnitudes(solver_state.scale, speed)
        lost = ~(relative_size(gap, scale) <= _OVERWHELMING) & (count >= FIRST_STEPS)
        result = diffrax.RESULTS.where(lost, COUPLING_LOST, diffrax.RESULTS.successful)
        new_state = VelocityState(v1, scale, size(gap), lost, count + 1)
        return y1, error, info, new_state, result

    def func(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Time,
        y0: PyTree[Array],
        args: PyTree,
    ) -> PyTree[Array]:
        return terms.vf(t0, y0, args)


class VelocityState(eqx.Module):
    """The state of `ALF`.

    - `velocity`: $v$.
    - `scale`: for each component, the largest absolute value so far of $v$.
    - `distance`: the root mean square of $u - v$ in the last step.
    - `lost`: whether the velocity has diverged from the vector field.
    - `steps_taken`: the number of steps, including those of a solve that this one
      continues.
    """

    velocity: PyTree[Array]
    scale: PyTree[Array]
    distance: Float[Array, ""]
    lost: Bool[Array, ""]
    steps_taken: Int[Array, ""]


class LeapfrogReversal(AbstractInvertibleStep):
    """The step of `ALF` and its inverse; see `ALF` for the equations.

    The replay state is $v$. The velocity is multiplied by the control (the step size of
    an ordinary equation), so `k0` is $h v$, and `k1` is $h v'$.
    """

    @property
    def resyncs_at_jumps(self) -> bool:
        # A jump changes the vector field, so the velocity has to be evaluated again.
        return True

    def parts(self) -> dict[str, Callable]:
        def vf(t: Time, y: PyTree[Array]) -> PyTree[Array]:
            return self.terms.vf(t, y, self.args)

        return dict(
            control=self.terms.contr,
            vf=lambda t0, t1, y: vf(t0 + 0.5 * (t1 - t0), y),
            resynced=lambda t, y, velocity, resync: jax.lax.cond(
                resync, lambda: vf(t, y), lambda: velocity
            ),
            product=self.terms.prod,
        )

    def replay_state(self, solver_state: PyTree) -> PyTree:
        return solver_state.velocity

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        # Leaves are `None` in tangents and cotangents that are zero.
        get = lambda s: s.velocity
        return eqx.tree_at(get, solver_state, replay_state, is_leaf=lambda x: x is None)

    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        v0 = state0
        if resync is not False:
            v0 = evaluate("resynced", "resync", t0, y0, v0, resync)
        control = evaluate("control", "control", t0, t1)
        # u = f(t + h / 2, x + h / 2 v)
        k0 = evaluate("product", "start", v0, control)
        u = evaluate("vf", "middle", t0, t1, (y0**ω + 0.5 * k0**ω).ω)
        # v' = v + 2 eta (u - v)
        v1 = (v0**ω + 2 * self.solver.damping * (u**ω - v0**ω)).ω
        k1 = evaluate("product", "end", v1, control)
        # x' = x + h / 2 v + h / 2 v'
        y1 = ((y0**ω + 0.5 * k0**ω) + 0.5 * k1**ω).ω
        return y1, v1, dict(y0=y0, y1=y1, k0=k0, k1=k1)

    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        del before
        v1, twice = state1, 2 * self.solver.damping
        control = evaluate("control", "control", t0, t1)
        # The state in the middle, k = x' - h / 2 v', and u = f(t + h / 2, k)
        k1 = evaluate("product", "end", v1, control)
        middle = (y1**ω - 0.5 * k1**ω).ω
        u = evaluate("vf", "middle", t0, t1, middle)
        # v = (v' - 2 eta u) / (1 - 2 eta)
        v0 = ((v1**ω - twice * u**ω) / (1 - twice)).ω
        # x = k - h / 2 v. The key is not "start": where a velocity is stored, `forward`
        # starts from that one.
        k0 = evaluate("product", "undo", v0, control)
        return (middle**ω - 0.5 * k0**ω).ω, v0
