"""The coupling of two copies that makes an explicit Runge-Kutta method reversible."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._internal.compat import is_sde, WrapTerm, ω
from .._internal.results import COUPLING_LOST
from .._internal.tree import check_counts, check_numbers, where
from .._steps.increment import Increment
from .._steps.solvers import DelegatingSolver
from .._steps.tableau import combine, explicit_tableau, num_inner_stages
from .._trajectory.state_source import Evaluate
from .coupling_monitor import allowed_difference, CouplingMonitor, with_difference
from .invertible_step import (
    AbstractInvertibleStep,
    Flag,
    is_regular_resync,
    Resync,
    SharingSolver,
    Time,
)


class Reversible(SharingSolver, DelegatingSolver, diffrax.AbstractStratonovichSolver):
    r"""Makes an explicit Runge-Kutta method algebraically reversible.

    The solver carries two copies of the solution, $y$ and $z$. With $\Psi_h(t, x)$ for
    the increment of `solver` over a step of size $h$, and $\lambda$ for the
    `coupling_parameter`, a step is

    $$y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \qquad
      z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1}), \qquad y_0 = z_0,$$

    which can be solved for $(y_n, z_n)$ given $(y_{n+1}, z_{n+1})$. The solution $y$
    has the order of `solver`. The arrays carried are $z$ and $D = y - z$: this is the
    same map, with less rounding. With $p = \Psi_h(z)$, $y' = z + (\lambda D + p)$ and
    $q = \Psi_{-h}(y')$,

    $$z' = z - q, \qquad D' = \lambda D + (p + q).$$

    This is a Diffrax solver, for any controller and adjoint.
    `nodegrad.ReversibleAdjoint` needs no memory that grows with the steps. Dense output
    is the cubic Hermite interpolant of $y$. The error estimate is that of the step of
    $z$, with $f(y')$ for the last stage if that is evaluated at the end of the step,
    and the growth of $\lvert D \rvert$ in the step is added to it.

    **Example:**

    ```python
    import diffrax
    import jax
    import jax.numpy as jnp
    import nodegrad

    solver = nodegrad.Reversible(diffrax.Bosh3())
    decay = diffrax.ODETerm(lambda t, y, a: -a * y)
    solve = lambda a: nodegrad.odesolve(
        decay, solver, 0.0, 1.0, 0.01, 1.0, a, adjoint=nodegrad.ReversibleAdjoint()
    )
    print(jax.grad(lambda a: solve(a).ys[0])(2.0).round(3))  # -0.135
    ```

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method: `diffrax.Tsit5()`, `nodegrad.RK4()`,
      ... For stochastic equations it must converge to the Stratonovich solution:
      `diffrax.Heun`, `Midpoint`, `Ralston`.
    - `coupling_parameter`: $\lambda$, in $(0, 1]$. Between resyncs the coupled method
      is stable only where $h \lvert a \rvert < 1 - \lambda$ for a decay rate $a$ of the
      problem (see `nodegrad.is_stable`). In the backward pass, rounding grows by
      $\lambda^{-1}$ in every step from one resync to the next.
    - `resync_every`: when to resync the copies, $z := y$ and $D := 0$. This removes the
      restriction: the solution is as stable as that of `solver`. `"auto"` resyncs where
      it is needed: before a step in which the instability of the coupling would make
      $D$ grow by more than a fiftieth of the error estimate of `solver`. An integer `K`
      resyncs after every `K` accepted steps. `None` never does. Resyncs are part of the
      map that is differentiated, so gradients are exact. `stats["num_resyncs"]` counts
      them.

    **Raises:** `TypeError` or `ValueError` for other arguments, and for stochastic
    equations with a `solver` that is not Stratonovich.

    A solve whose copies have diverged ends with `nodegrad.RESULTS.coupling_lost`
    (inside `diffrax.diffeqsolve` with an adjoint of Diffrax:
    `diffrax.RESULTS.nonlinear_divergence`). With resyncs this hardly ever happens; with
    `resync_every=None` it is usually found long before it is visible. For noise, or a
    path with several channels, vector fields of two steps cannot be compared: copies
    are then resynced when they differ by a twentieth of the solution, and lost when
    they differ by a quarter of it.

    **Cost:** twice the evaluations of `solver`, without the last stage of a method that
    shares it with the next step: 12 evaluations a step for `Tsit5`, 6 for `Bosh3`.
    `nodegrad.ReversibleAdjoint` stores the states before resyncs, 64 of them at most
    for any number of steps; with `None` it stores none.

    **When not to use it:** with `resync_every=None`, on problems that decay. If there
    is memory for $2.5\sqrt{\mathtt{max\_steps}}$ states, `solver` itself with
    `nodegrad.ACAAdjoint` is faster.

    ??? cite "Reference"

        McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs,
        2024, arXiv:2410.11648, equations (3) to (6).
    """

    solver: diffrax.AbstractSolver
    coupling_parameter: float = eqx.field(static=True, default=0.999)
    resync_every: int | Literal["auto"] | None = eqx.field(static=True, default="auto")

    interpolation_cls: ClassVar[Callable[..., diffrax.AbstractLocalInterpolation]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )
    # Diffrax's adjoints read this field of a solver that wraps a Runge-Kutta method,
    # and replace `None`. The stages of this solver do not use it.
    scan_kind: ClassVar[str] = "lax"

    def __check_init__(self) -> None:
        check_counts("auto", None, resync_every=self.resync_every)
        if explicit_tableau(self.solver) is None:
            msg = (
                "`nodegrad.Reversible` takes an explicit Runge-Kutta method such as "
                f"`diffrax.Tsit5()`; got {self.solver}."
            )
            raise TypeError(msg)
        check_numbers(static=True, coupling_parameter=self.coupling_parameter)
        if not 0 < self.coupling_parameter <= 1:
            msg = (
                "`coupling_parameter` must be a number in (0, 1]; got "
                f"{self.coupling_parameter}."
            )
            raise ValueError(msg)

    @property
    def reversal_cls(self) -> type[AbstractInvertibleStep]:
        """The class by which `nodegrad.ReversibleAdjoint` undoes a step."""
        return CoupledReversal

    @property
    def evaluations(self) -> tuple[int, int]:
        """Vector field evaluations before the first step, and per step."""
        return 0, 2 * num_inner_stages(explicit_tableau(self.solver))

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        args: PyTree,
    ) -> "CoupledState":
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
        # Both copies start at `y0`.
        difference = jax.tree.map(jnp.zeros_like, y0)
        return CoupledState(y0, difference, monitor, jnp.array(0), jnp.array(0))

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        args: PyTree,
        solver_state: "CoupledState",
        made_jump: Flag,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], "CoupledState", diffrax.RESULTS]:
        step = CoupledReversal(self, terms, args)
        ks, control = {}, terms.contr(t0, t1)

        # As `CoupledReversal.parts`, but keeps all stages for the error estimate.
        def evaluate(part: str, key: str, *part_args: PyTree) -> PyTree:
            if part == "control":
                return control
            increment, ks[key] = step.increment.evaluate(*part_args)
            return increment, ks[key][0]

        count, (z0, d0) = solver_state.steps_taken, step.replay_state(solver_state)
        resync = (
            solver_state.resync
            if step.chooses_resyncs
            else is_regular_resync(step.resync_every, count)
        )
        if resync is not False:
            z0, d0 = step.coupled(z0, d0, resync)
        # The resync is done. The monitor compares the difference after it with `d1`.
        y1, (z1, d1), info = step.forward(evaluate, t0, t1, y0, (z0, d0), False)
        error = self._error(ks["forward"], info["k1"])
        resyncs, parameter = self.resync_every is not None, self.coupling_parameter
        allowed = allowed_difference(parameter, resyncs)
        monitor = solver_state.monitor.update(
            d0, d1, info, control, parameter, made_jump, count, error, allowed
        )
        asked = monitor.wants_resync & step.chooses_resyncs
        discards = asked | is_regular_resync(step.resync_every, count + 1)
        monitor = monitor.before_next_step(discards, info["y0"], info["y1"])
        result = diffrax.RESULTS.where(
            monitor.lost, COUPLING_LOST, diffrax.RESULTS.successful
        )
        num_resyncs = solver_state.num_resyncs + jnp.asarray(resync, count.dtype)
        new_state = CoupledState(z1, d1, monitor, num_resyncs, count + 1)
        if error is not None:
            error = with_difference(error, d0, d1, allowed)
        return y1, error, info, new_state, result

    def _error(
        self, ks: list[PyTree[Array]], k1: PyTree[Array]
    ) -> PyTree[Array] | None:
        """Returns the error estimate, or `None` for a method without one.

        `ks` are the stages of the increment of `z`, and `k1` is the vector field at the
        new `y`. For a method that shares its last stage with the next step, `k1` takes
        the place of this stage, which is not evaluated.
        """
        tableau: Any = explicit_tableau(self.solver)  # not `None`, see `__check_init__`
        if not np.any(tableau.b_error):
            return None
        return combine(tableau.b_error, [*ks, k1] if tableau.fsal else ks)


def _have_slopes(terms: PyTree[diffrax.AbstractTerm], t0: Time, t1: Time) -> bool:
    """Returns whether vector fields of successive steps can be compared.

    The monitor compares $f(t_n, y_n)$ of one step and $f(t_n, z_n)$ of the next one,
    each divided by its control. So the control must be one number.
    """
    if is_sde(terms):
        return False

    def is_single(x: PyTree) -> bool:
        return isinstance(x, diffrax.AbstractTerm) and not isinstance(
            x, diffrax.MultiTerm | WrapTerm
        )

    # The control of `ODETerm`s, also of several ones, is the step size.
    singles = filter(is_single, jax.tree.leaves(terms, is_leaf=is_single))
    if all(isinstance(term, diffrax.ODETerm) for term in singles):
        return True
    control = jax.tree.leaves(jax.eval_shape(terms.contr, t0, t1))
    return len(control) == 1 and control[0].shape == ()


class CoupledState(eqx.Module):
    """The state of `Reversible`.

    - `z`: the second copy of the solution.
    - `difference`: $D = y - z$.
    - `monitor`: detects that the copies diverge.
    - `num_resyncs`, `steps_taken`: the numbers of resyncs and steps, including those
      of a solve that this one continues.
    """

    z: PyTree[Array]
    difference: PyTree[Array]
    monitor: CouplingMonitor
    num_resyncs: Int[Array, ""]
    steps_taken: Int[Array, ""]

    @property
    def resync(self) -> Bool[Array, ""]:
        """Whether the next step begins with a resync, if the solver decides."""
        return self.monitor.wants_resync

    @property
    def distance(self) -> Float[Array, ""]:
        """The root mean square of the difference."""
        return self.monitor.distance

    @property
    def lost(self) -> Bool[Array, ""]:
        """Whether the copies have diverged."""
        return self.monitor.lost

    @property
    def limited(self) -> Bool[Array, ""]:
        """Whether the coupling limited the size of the last step."""
        return self.monitor.limited


class CoupledReversal(AbstractInvertibleStep):
    """The coupled step and its inverse; see `Reversible` for the equations.

    The replay state is $(z, D)$, which contains $y = z + D$. The argument `y0` (or
    `y1`) is this sum, rounded, so it is not used.
    """

    @property
    def increment(self) -> Increment:
        r"""Computes the increment $\Psi$, and the first stage."""
        # The first stage is the slope of the Hermite interpolant at the start.
        product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        return Increment(explicit_tableau(self.solver.solver), product, "first")

    @property
    def chooses_resyncs(self) -> bool:
        return self.solver.resync_every == "auto"

    def parts(self) -> dict[str, Callable]:
        return dict(control=self.terms.contr, increment=self.increment)

    def replay_state(self, solver_state: PyTree) -> PyTree:
        return solver_state.z, solver_state.difference

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        # Leaves are `None` in tangents and cotangents that are zero.
        get = lambda s: (s.z, s.difference)
        return eqx.tree_at(get, solver_state, replay_state, is_leaf=lambda x: x is None)

    def to_store(self, y: PyTree[Array], replay_state: PyTree[Array]) -> PyTree[Array]:
        del y
        return replay_state

    def from_store(self, row: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        z, difference = row
        return (z**ω + difference**ω).ω, row

    def coupled(
        self,
        z0: PyTree[Array],
        d0: PyTree[Array],
        resync: Bool[Array, "..."],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Returns $(z, D)$ with $z := y$ and $D := 0$, where `resync`."""
        zero = jax.tree.map(jnp.zeros_like, d0)
        return where(resync, ((z0**ω + d0**ω).ω, zero), (z0, d0))

    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        del y0
        z0, d0 = state0
        if resync is not False:
            z0, d0 = self.coupled(z0, d0, resync)
        decayed = (self.solver.coupling_parameter * d0**ω).ω
        control = evaluate("control", "control", t0, t1)
        # y' = z + (lambda D + p) with p = Psi_h(z)
        p, k0 = evaluate("increment", "forward", t0, t1, control, z0)
        y1 = (z0**ω + (decayed**ω + p**ω)).ω
        # z' = z - q and D' = lambda D + (p + q) with q = Psi_{-h}(y'). The sum p + q is
        # formed first, since p and q nearly cancel.
        q, k1 = evaluate("increment", "backward", t1, t0, _negative(control), y1)
        z1 = (z0**ω - q**ω).ω
        d1 = (decayed**ω + (p**ω + q**ω)).ω
        # The state is z' + D' as rounded, which is where the inverse starts from.
        y0, y1 = (z0**ω + d0**ω).ω, (z1**ω + d1**ω).ω
        return y1, (z1, d1), dict(y0=y0, y1=y1, k0=k0, k1=_negative(k1))

    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        del before, y1
        z1, d1 = state1
        control = evaluate("control", "control", t0, t1)
        # z = z' + q with q = Psi_{-h}(y')
        y1 = (z1**ω + d1**ω).ω
        q, _ = evaluate("increment", "backward", t1, t0, _negative(control), y1)
        z0 = (z1**ω + q**ω).ω
        # D = (D' - (p + q)) / lambda with p = Psi_h(z); the division amplifies rounding
        p, _ = evaluate("increment", "forward", t0, t1, control, z0)
        d0 = ((d1**ω - (p**ω + q**ω)) / self.solver.coupling_parameter).ω
        return (z0**ω + d0**ω).ω, (z0, d0)


def _negative(tree: PyTree[ArrayLike]) -> PyTree[Array]:
    return jax.tree.map(jnp.negative, tree)
