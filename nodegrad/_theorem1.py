r"""The backward differential equations of the second-order adjoint (Theorem 1).

With $F$ the vector field, $\ell$ the running cost, $z = (x, u)$ the state and the
parameters together, $A = \partial F / \partial z$, and $Q$ the loss from time $t$ on,

$$-\dot Q = \ell, \qquad -\dot Q_z = \ell_z + A^\top Q_x, \qquad
  -\dot Q_{zz} = \ell_{zz} + A^\top P + P^\top A
  + \Big[\sum_k (Q_x)_k\, \partial_{zz} F_k\Big],$$

where $P = (Q_{xx}, Q_{xu})$ are the upper rows of $Q_{zz}$, and the term in brackets
tells the Hessian from its published, Gauss-Newton form.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._expansion import expand
from ._odesolve import odesolve
from ._tree import flatten


class LossToGo(eqx.Module):
    r"""$Q, Q_z, Q_{zz}$ at one time; `y` if the state is integrated along."""

    value: Array
    gradient: Array
    hessian: Array
    y: PyTree[Array] | None


def solve_backwards(
    field: Callable,
    t0,
    t1,
    dt0,
    y0: PyTree[Array],
    args: PyTree,
    *,
    running_cost: Callable,
    terminal_cost: Callable,
    exact: bool,
    backsolve: bool,
    dtype,
    ts: Array | None,
    stepsize_controller: diffrax.AbstractStepSizeController,
    **kwargs,
) -> tuple[diffrax.Solution, diffrax.Solution]:
    """The solution forwards, and the `LossToGo` backwards.

    The latter at `t0` or, in this order, at `ts`. `kwargs` are those of `odesolve`.
    """
    forward = odesolve(
        diffrax.ODETerm(field),
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=y0,
        args=args,
        saveat=diffrax.SaveAt(t1=True, dense=not backsolve),
        stepsize_controller=stepsize_controller,
        **kwargs,
    )
    y1 = jax.tree.map(lambda x: x[0], forward.ys)
    s, unravel = flatten(y1, dtype)
    u, _ = flatten(args, dtype)
    terminal = expand(lambda s, _: terminal_cost(unravel(s)), s, u)
    gradient, hessian = terminal.of_first(len(s))
    last = LossToGo(terminal_cost(y1), gradient, hessian, y1 if backsolve else None)
    interpolation: Any = forward.interpolation
    evaluate = None if backsolve else interpolation.evaluate
    backward = odesolve(
        diffrax.ODETerm(_rates(field, running_cost, exact, evaluate, y0, dtype)),
        t0=t1,
        t1=t0,
        dt0=None if dt0 is None else -dt0,
        y0=last,
        args=args,
        saveat=diffrax.SaveAt(t1=True) if ts is None else diffrax.SaveAt(ts=ts[::-1]),
        stepsize_controller=_reversed(stepsize_controller),
        **kwargs,
    )
    ys = backward.ys if ts is None else jax.tree.map(lambda x: x[::-1], backward.ys)
    return forward, eqx.tree_at(lambda sol: sol.ys, backward, ys)


def _rates(
    field, running_cost, exact: bool, evaluate: Callable | None, y0, dtype
) -> Callable:
    """The vector field of a `LossToGo`; `evaluate(t)` is the state, if known."""
    _, unravel_y = flatten(y0, dtype)

    def rates(t, to_go: LossToGo, args: Any) -> LossToGo:
        y = to_go.y if evaluate is None else evaluate(t)
        x, _ = flatten(y, dtype)
        u, unravel_args = flatten(args, dtype)

        def flat_field(x, u):
            rate = field(t, unravel_y(x), unravel_args(u))
            full = lambda y, f: jnp.broadcast_to(f, y.shape)
            return flatten(jax.tree.map(full, y0, rate), dtype)[0]

        def flat_cost(x, u):
            return running_cost(t, unravel_y(x), unravel_args(u))

        by_x, by_u = jax.jacobian(flat_field, argnums=(0, 1))(x, u)
        jacobian = jnp.concatenate([by_x, by_u], axis=1)
        q_x = to_go.gradient[: len(x)]
        cost_gradient, hessian = expand(flat_cost, x, u).of_first(len(x))
        if exact:
            hamiltonian = lambda x, u: q_x @ flat_field(x, u)
            _, curvature = expand(hamiltonian, x, u).of_first(len(x))
            hessian = hessian + curvature
        growth = jacobian.T @ to_go.hessian[: len(x)]
        return LossToGo(
            value=-flat_cost(x, u),
            gradient=-(cost_gradient + jacobian.T @ q_x),
            hessian=-(hessian + growth + growth.T),
            y=field(t, y, args) if evaluate is None else None,
        )

    return rates


def _reversed(controller):
    """The controller for the way back."""
    if isinstance(controller, diffrax.StepTo):
        return diffrax.StepTo(controller.ts[::-1])
    return controller
