"""The Y/Z coupling that makes any explicit Runge-Kutta method reversible."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._internal.compat import is_sde, WrapTerm, ω
from .._internal.results import COUPLING_LOST
from .._internal.tree import where
from .._steps.increment import Increment
from .._steps.step import DelegatingSolver
from .._steps.tableau import combine, explicit_tableau, num_inner_stages
from .coupling_monitor import CouplingMonitor
from .invertible_step import (
    AbstractInvertibleStep,
    check_number,
    check_resync_every,
    is_regular_resync,
)


class Reversible(DelegatingSolver, diffrax.AbstractStratonovichSolver):
    r"""Makes an explicit Runge-Kutta method algebraically reversible.

    Two copies of the solution, $y$ and $z$, take turns. With $\Psi_h(t, x)$ the
    increment of `solver` over a step of size $h$ and $\lambda$ the
    `coupling_parameter`,

    $$y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \qquad
      z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1}), \qquad y_0 = z_0,$$

    which can be solved for $(y_n, z_n)$ given $(y_{n+1}, z_{n+1})$. The solution $y$
    has the order of `solver`. What is carried is $z$ and $D = y - z$, which is the same
    map with a fraction of the rounding: with $p = \Psi_h(z)$,
    $y' = z + (\lambda D + p)$ and $q = \Psi_{-h}(y')$,

    $$z' = z - q, \qquad D' = \lambda D + (p + q).$$

    A Diffrax solver: use it with any controller and adjoint, of which
    `nodegrad.ReversibleAdjoint` needs no memory for the states. Dense output is the
    cubic Hermite interpolant of $y$. The error estimate is that of the step of $z$,
    with $f(y')$ for the last stage if that is evaluated at the end of the step.

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method: `diffrax.Tsit5()`, `nodegrad.RK4()`,
      ... For stochastic equations one that converges to the Stratonovich solution:
      `diffrax.Heun`, `Midpoint`, `Ralston`.
    - `coupling_parameter`: $\lambda$, in $(0, 1]$. The two copies are stable together
      only where $h \lvert a \rvert < 1 - \lambda$ for a decay rate $a$ of the problem,
      see `nodegrad.is_stable`; and going back, rounding grows by $\lambda^{-N}$.
    - `resync_every`: after how many accepted steps to couple anew, $z := y$. This
      removes the restriction: the solution is as stable as that of `solver`, and
      rounding grows only from one resync to the next. `ReversibleAdjoint` stores the
      state at every resync. Ten to twenty is right for most problems.

    **Raises:** `TypeError` or `ValueError` for other arguments, and for stochastic
    equations with a `solver` that is not Stratonovich. A solve whose copies have come
    apart ends with `nodegrad.RESULTS.coupling_lost` (inside `diffrax.diffeqsolve` with
    an adjoint of Diffrax: `diffrax.RESULTS.nonlinear_divergence`): usually long before
    that is visible, but driven by noise or by a path of several channels, where the
    vector fields of two steps cannot be compared, only when the copies are apart by a
    quarter of the solution.

    **Cost:** twice that of `solver`, without the last stage of a method that shares it
    with the next step: 12 evaluations a step for `Tsit5`, 6 for `Bosh3`.

    **When not to use it:** on problems with fast decay without `resync_every`; where
    time counts and the memory for $2.5\sqrt{\mathtt{max\_steps}}$ states is there:
    `solver` itself with `nodegrad.ACAAdjoint` is faster.

    ??? cite "Reference"

        McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs,
        2024, arXiv:2410.11648, equations (3) to (6).
    """

    solver: diffrax.AbstractSolver
    coupling_parameter: float = eqx.field(static=True, default=0.999)
    resync_every: int | None = eqx.field(static=True, default=None)

    interpolation_cls: ClassVar[Callable[..., diffrax.AbstractLocalInterpolation]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )
    # Diffrax's adjoints ask this of everything that wraps a Runge-Kutta method.
    scan_kind: ClassVar[str] = "lax"

    def __check_init__(self):
        check_resync_every("Reversible", self.resync_every)
        if explicit_tableau(self.solver) is None:
            msg = (
                "`nodegrad.Reversible` takes an explicit Runge-Kutta method such as "
                f"`diffrax.Tsit5()`; got {self.solver}."
            )
            raise TypeError(msg)
        check_number("coupling_parameter", self.coupling_parameter)
        if not 0 < self.coupling_parameter <= 1:
            msg = (
                "`coupling_parameter` must be a number in (0, 1]; got "
                f"{self.coupling_parameter}."
            )
            raise ValueError(msg)

    @property
    def reversal_cls(self):
        """How `nodegrad.ReversibleAdjoint` undoes a step."""
        return CoupledReversal

    @property
    def evaluations(self) -> tuple[int, int]:
        """Vector field evaluations before the first step, and of each."""
        return 0, 2 * num_inner_stages(explicit_tableau(self.solver))

    def init(self, terms, t0, t1, y0, args):
        del args
        if is_sde(terms) and not isinstance(
            self.solver, diffrax.AbstractStratonovichSolver
        ):
            msg = (
                "For a stochastic equation `nodegrad.Reversible` needs a solver that "
                "converges to the Stratonovich solution, such as `diffrax.Heun()` or "
                f"`diffrax.Midpoint()`; got {self.solver}."
            )
            raise ValueError(msg)
        monitor = CouplingMonitor.init(y0, _have_slopes(terms, t0, t1))
        difference = jax.tree.map(jnp.zeros_like, y0)
        return CoupledState(y0, difference, monitor, jnp.array(0))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        step = CoupledReversal(self, terms, args)
        ks, control = {}, terms.contr(t0, t1)

        def evaluate(part, key, *part_args):
            if part == "control":
                return control
            increment, ks[key] = step.increment.evaluate(*part_args)
            return increment, ks[key][0]

        count, (z0, d0) = solver_state.steps_taken, step.replay_state(solver_state)
        resync = is_regular_resync(self.resync_every, count)
        if resync is not False:
            z0, d0 = step.coupled(z0, d0, resync)
        y1, (z1, d1), info = step.forward(evaluate, t0, t1, y0, (z0, d0), False)
        monitor = solver_state.monitor.update(
            d0, d1, info, control, self.coupling_parameter, made_jump, count
        )
        result = diffrax.RESULTS.where(
            monitor.lost, COUPLING_LOST, diffrax.RESULTS.successful
        )
        new_state = CoupledState(z1, d1, monitor, count + 1)
        error = self._error(ks["forward"], info["k1"])
        return y1, error, info, new_state, result

    def _error(self, ks, k1):
        tableau = explicit_tableau(self.solver)
        if not np.any(tableau.b_error):
            return None
        return combine(tableau.b_error, [*ks, k1] if tableau.fsal else ks)


def _have_slopes(terms: PyTree, t0, t1) -> bool:
    """Whether the vector fields of two steps differ by no more than their state."""
    if is_sde(terms):
        return False
    is_single = lambda x: (
        isinstance(x, diffrax.AbstractTerm)
        and not isinstance(x, diffrax.MultiTerm | WrapTerm)
    )
    singles = filter(is_single, jax.tree.leaves(terms, is_leaf=is_single))
    if all(isinstance(term, diffrax.ODETerm) for term in singles):
        return True
    control = jax.tree.leaves(jax.eval_shape(terms.contr, t0, t1))
    return len(control) == 1 and control[0].shape == ()


class CoupledState(eqx.Module):
    """The state of `Reversible`: $z$, $D = y - z$, and how far apart they are."""

    z: PyTree[Array]
    difference: PyTree[Array]
    monitor: CouplingMonitor
    steps_taken: Any

    @property
    def distance(self) -> Any:
        """The root mean square of the difference."""
        return self.monitor.distance

    @property
    def lost(self) -> Any:
        """Whether the copies have come apart."""
        return self.monitor.lost


class CoupledReversal(AbstractInvertibleStep):
    """The coupled step and its inverse; see `Reversible` for the equations."""

    @property
    def increment(self) -> Increment:
        r"""$\Psi$, and the first stage."""
        product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        return Increment(explicit_tableau(self.solver.solver), product, "first")

    def parts(self):
        return dict(control=self.terms.contr, increment=self.increment)

    def replay_state(self, solver_state):
        return solver_state.z, solver_state.difference

    def with_replay_state(self, solver_state, replay_state):
        get = lambda s: (s.z, s.difference)
        return eqx.tree_at(get, solver_state, replay_state, is_leaf=lambda x: x is None)

    def coupled(self, z0, d0, resync):
        """The copies coupled anew, if `resync`."""
        zero = jax.tree.map(jnp.zeros_like, d0)
        return where(resync, ((z0**ω + d0**ω).ω, zero), (z0, d0))

    def forward(self, evaluate, t0, t1, y0, state0, resync):
        del y0
        z0, d0 = state0
        if resync is not False:
            z0, d0 = self.coupled(z0, d0, resync)
        decayed = (self.solver.coupling_parameter * d0**ω).ω
        control = evaluate("control", "control", t0, t1)
        p, k0 = evaluate("increment", "forward", t0, t1, control, z0)
        y1 = (z0**ω + (decayed**ω + p**ω)).ω
        q, k1 = evaluate("increment", "backward", t1, t0, _negative(control), y1)
        z1 = (z0**ω - q**ω).ω
        d1 = (decayed**ω + (p**ω + q**ω)).ω
        y0, y1 = (z0**ω + d0**ω).ω, (z1**ω + d1**ω).ω
        return y1, (z1, d1), dict(y0=y0, y1=y1, k0=k0, k1=_negative(k1))

    def backward(self, evaluate, t0, t1, before, y1, state1):
        del before, y1
        z1, d1 = state1
        control = evaluate("control", "control", t0, t1)
        y1 = (z1**ω + d1**ω).ω
        q, _ = evaluate("increment", "backward", t1, t0, _negative(control), y1)
        z0 = (z1**ω + q**ω).ω
        p, _ = evaluate("increment", "forward", t0, t1, control, z0)
        d0 = ((d1**ω - (p**ω + q**ω)) / self.solver.coupling_parameter).ω
        return (z0**ω + d0**ω).ω, (z0, d0)


def _negative(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.negative, tree)
