r"""The backward differential equations of the second-order adjoint (Theorem 1).

With $F$ the vector field, $\ell$ the running cost, $z = (x, u)$ the state and the
parameters together, $A = \partial F / \partial z$, and $Q$ the loss from time $t$ on,

$$-\dot Q = \ell, \qquad -\dot Q_z = \ell_z + A^\top Q_x, \qquad
  -\dot Q_{zz} = \ell_{zz} + A^\top P + P^\top A
  + \Big[\sum_k (Q_x)_k\, \partial_{zz} F_k\Big],$$

where $P = (Q_{xx}, Q_{xu})$ are the upper rows of $Q_{zz}$. The published equations do
not have the term in brackets, and give the Gauss-Newton matrix. With that term they
give the Hessian. They are integrated in the user's time, from `t1` to `t0`.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from .._internal.tree import flatten
from .expansion import expand
from .loss import Loss


class LossToGo(eqx.Module):
    r"""The loss from one time on, $Q$, with its derivatives $Q_z$ and $Q_{zz}$.

    Of the `z` numbers, those of the state come first. `y` is the state, if it is
    integrated backwards with the others, and otherwise `None`.
    """

    value: Float[Array, ""]
    gradient: Float[Array, " z"]
    hessian: Float[Array, "z z"]
    y: PyTree[Array] | None


def loss_to_go(
    terminal_cost: Callable[[PyTree], Array],
    y1: PyTree[Array],
    args: PyTree,
    dtype: Any,
    with_state: bool,
) -> LossToGo:
    """Returns the `LossToGo` at the end of the solve, where the state is `y1`."""
    s, unravel = flatten(y1, dtype)
    u, _ = flatten(args, dtype)
    expansion = expand(lambda s, _: terminal_cost(unravel(s)), s, u)
    gradient, hessian = expansion.of_first(len(s))
    value = terminal_cost(y1)
    return LossToGo(value, gradient, hessian, y1 if with_state else None)


class LossToGoRates(eqx.Module):
    """The vector field of a `LossToGo`.

    A module, not a closure: its functions are leaves, so two solves with the same
    functions share one compiled program.

    - `field`, `running_cost`: functions of `(t, y, args)`.
    - `states`: the forward solution; `None` if the state is part of the `LossToGo`.
    - `exact`: whether to include the term in brackets.
    - `dtype`: the type of all flat vectors.
    """

    field: Callable[..., PyTree[Array]]
    running_cost: Callable[..., Array] | None
    states: diffrax.DenseInterpolation | None
    exact: bool = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    # Diffrax's type for times, which includes Python numbers, is private: `t` is `Any`.
    def __call__(self, t: Any, to_go: LossToGo, args: PyTree) -> LossToGo:
        # `evaluate` of Diffrax has no narrower type.
        y: Any = to_go.y if self.states is None else self.states.evaluate(t)
        x, unravel_y = flatten(y, self.dtype)
        u, unravel_args = flatten(args, self.dtype)
        size, q_x = len(x), to_go.gradient[: len(x)]

        def flat_field(x: Float[Array, " x"], u: Float[Array, " u"]) -> Array:
            rate = self.field(t, unravel_y(x), unravel_args(u))
            return flatten(_like(y, rate), self.dtype)[0]

        # The Jacobian A, of shape (x, x + u), and A^T P.
        by_x, by_u = jax.jacobian(flat_field, argnums=(0, 1))(x, u)
        jacobian = jnp.concatenate([by_x, by_u], axis=1)
        growth = jacobian.T @ to_go.hessian[:size]
        value = jnp.zeros((), self.dtype)
        gradient, hessian = jacobian.T @ q_x, growth + growth.T
        if self.running_cost is not None:
            cost = self.running_cost
            flat_cost = lambda x, u: cost(t, unravel_y(x), unravel_args(u))
            cost_gradient, cost_hessian = expand(flat_cost, x, u).of_first(size)
            value = flat_cost(x, u)
            gradient, hessian = gradient + cost_gradient, hessian + cost_hessian
        if self.exact:
            # `q_x` is a constant here: only the second derivatives of F are wanted.
            hamiltonian = expand(lambda x, u: q_x @ flat_field(x, u), x, u)
            hessian = hessian + hamiltonian.of_first(size)[1]
        # The equations above give the rates of -Q. The rate of `y` is not negated: both
        # are integrated from `t1` to `t0`.
        return LossToGo(
            value=-value,
            gradient=-gradient,
            hessian=-hessian,
            y=self.field(t, y, args) if self.states is None else None,
        )


def _like(y: PyTree[Array], rate: PyTree) -> PyTree[Array]:
    """Returns `rate` in the shapes of `y`: a field may return a scalar for an array."""
    return jax.tree.map(lambda y, f: jnp.broadcast_to(f, y.shape), y, rate)


def solve_both_ways(
    loss: Loss,
    field: Callable,
    args: PyTree,
    solve: Callable[..., diffrax.Solution],
    stepsize_controller: diffrax.AbstractStepSizeController,
    *,
    exact: bool,
    backsolve: bool,
) -> diffrax.Solution:
    """Solves forwards, then backwards. Returns the solution of the backward equations.

    `solve` is `odesolve` with the options that both solves share.
    """
    forward = solve(
        loss.terms,
        t0=loss.t0,
        t1=loss.t1,
        dt0=loss.dt0,
        y0=loss.y0,
        args=args,
        saveat=diffrax.SaveAt(t1=True, dense=not backsolve),
        stepsize_controller=stepsize_controller,
    )
    # `None` with `backsolve`: then the state is part of the `LossToGo`.
    states: Any = forward.interpolation
    rates = LossToGoRates(field, loss.running_cost, states, exact, loss.dtype)
    return solve(
        diffrax.ODETerm(rates),
        t0=loss.t1,
        t1=loss.t0,
        dt0=None if loss.dt0 is None else -loss.dt0,
        y0=_at_the_end(loss, forward.ys, args, backsolve),
        args=args,
        saveat=_save_backwards(loss.ts),
        stepsize_controller=_reversed(stepsize_controller),
    )


# Jitted, because differentiating the cost twice may take many operations.
@eqx.filter_jit
def _at_the_end(
    loss: Loss, ys: PyTree[Array] | None, args: PyTree, backsolve: bool
) -> LossToGo:
    """Returns the initial value of the backward solve.

    `ys` is the end of the forward solve, with a leading axis of length 1.
    """
    y1 = jax.tree.map(lambda x: x[0], ys)
    return loss_to_go(loss.terminal_cost, y1, args, loss.dtype, with_state=backsolve)


def _save_backwards(ts: Real[Array, " times"] | None) -> diffrax.SaveAt:
    """Returns where the backward solve saves: at `ts`, or at its end if `None`."""
    return diffrax.SaveAt(t1=True) if ts is None else diffrax.SaveAt(ts=ts[::-1])


def _reversed(
    controller: diffrax.AbstractStepSizeController,
) -> diffrax.AbstractStepSizeController:
    """Returns the controller of the backward solve."""
    # Prescribed times in the reverse order. Other controllers work in both directions.
    if isinstance(controller, diffrax.StepTo):
        return diffrax.StepTo(controller.ts[::-1])
    return controller
