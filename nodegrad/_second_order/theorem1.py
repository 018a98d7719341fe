r"""The backward differential equations of the second-order adjoint (Theorem 1).

With $F$ the vector field, $\ell$ the running cost, $z = (x, u)$ the state and the
parameters together, $A = \partial F / \partial z$, and $Q$ the loss from time $t$ on,

$$-\dot Q = \ell, \qquad -\dot Q_z = \ell_z + A^\top Q_x, \qquad
  -\dot Q_{zz} = \ell_{zz} + A^\top P + P^\top A
  + \Big[\sum_k (Q_x)_k\, \partial_{zz} F_k\Big],$$

where $P = (Q_{xx}, Q_{xu})$ are the upper rows of $Q_{zz}$. The published equations do
not have the term in brackets: they give the Gauss-Newton matrix. With it they give the
Hessian.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.tree import flatten
from .expansion import expand


class LossToGo(eqx.Module):
    r"""$Q, Q_z, Q_{zz}$ at one time; also the state `y` if it is integrated with them.

    `gradient` and `hessian` are flat: the state first, the parameters after it.
    """

    value: Array
    gradient: Array
    hessian: Array
    y: PyTree[Array] | None


def loss_to_go(
    terminal_cost: Callable, y1: PyTree[Array], args: PyTree, dtype, with_state: bool
) -> LossToGo:
    """The `LossToGo` at the end of the solve, where the state is `y1`."""
    s, unravel = flatten(y1, dtype)
    u, _ = flatten(args, dtype)
    expansion = expand(lambda s, _: terminal_cost(unravel(s)), s, u)
    gradient, hessian = expansion.of_first(len(s))
    value = terminal_cost(y1)
    return LossToGo(value, gradient, hessian, y1 if with_state else None)


class LossToGoRates(eqx.Module):
    """The vector field of a `LossToGo`.

    A module rather than a closure: its functions are leaves, so two solves with the
    same functions share one compiled program.

    `states` is the forward solution, or `None` if the state is part of the `LossToGo`.
    """

    field: Callable
    running_cost: Callable | None
    states: diffrax.DenseInterpolation | None
    exact: bool = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __call__(self, t: Any, to_go: LossToGo, args: PyTree) -> LossToGo:
        y: Any = to_go.y if self.states is None else self.states.evaluate(t)
        x, unravel_y = flatten(y, self.dtype)
        u, unravel_args = flatten(args, self.dtype)
        size, q_x = len(x), to_go.gradient[: len(x)]

        def flat_field(x, u):
            rate = self.field(t, unravel_y(x), unravel_args(u))
            return flatten(_like(y, rate), self.dtype)[0]

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
            hamiltonian = expand(lambda x, u: q_x @ flat_field(x, u), x, u)
            hessian = hessian + hamiltonian.of_first(size)[1]
        return LossToGo(
            value=-value,
            gradient=-gradient,
            hessian=-hessian,
            y=self.field(t, y, args) if self.states is None else None,
        )


def _like(y: PyTree[Array], rate: PyTree) -> PyTree[Array]:
    """`rate` in the shapes of `y`: a field may return scalars for whole arrays."""
    return jax.tree.map(lambda y, f: jnp.broadcast_to(f, y.shape), y, rate)
