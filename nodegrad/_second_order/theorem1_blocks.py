"""`theorem1_blocks`: second derivatives by backward differential equations."""

# Annotations stay strings, so `help` shows them as they are written here.
from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._internal.tree import check_flag
from .._solve.aca_adjoint import ACAAdjoint
from .._solve.odesolve import odesolve
from .._solve.recorded_adjoint import AbstractRecordedAdjoint
from .hessian_blocks import HessianBlocks, structured
from .loss import checked_loss, Loss, plain_field
from .theorem1 import LossToGo, solve_both_ways


_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()


def theorem1_blocks(
    terms: Callable[[Array, PyTree, PyTree], PyTree] | diffrax.ODETerm,
    solver: diffrax.AbstractSolver,
    t0: Real[ArrayLike, ""],
    t1: Real[ArrayLike, ""],
    dt0: Real[ArrayLike, ""] | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    terminal_cost: Callable[[PyTree], Array],
    running_cost: Callable[[Array, PyTree, PyTree], Array] | None = None,
    exact: bool = False,
    backsolve: bool = False,
    ts: Real[ArrayLike, " times"] | Sequence[float] | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int = 4096,
) -> HessianBlocks:
    r"""Returns second derivatives of a loss by the equations of SNOpt's Theorem 1.

    **Loss:** as for `nodegrad.hessian_blocks`,
    $L = \Phi(y(t_1)) + \int_{t_0}^{t_1} \ell(t, y, u)\, dt$, with $\Phi$ the
    `terminal_cost`, $\ell$ the `running_cost`, $F$ the vector field and $u$ the
    floating point arrays in `args`.

    **Example:**

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    decay = lambda t, y, rate: -rate * y
    misfit = lambda y: 0.5 * jnp.sum((y - 1.0) ** 2)
    blocks = nodegrad.theorem1_blocks(
        decay, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.array([2.0]), jnp.array(0.7),
        terminal_cost=misfit, exact=True,
    )
    print(blocks.hess_argsargs.round(3))  # 0.98
    ```

    **Method:** let $Q(t)$ be the loss from time $t$ on,
    $z = (y, u)$ and $A = \partial F / \partial z$. The equations

    $$-\dot Q = \ell, \qquad -\dot Q_z = \ell_z + A^\top Q_y, \qquad
      -\dot Q_{zz} = \ell_{zz} + A^\top P + P^\top A
      + \Big[\sum_k (Q_y)_k\, \partial_{zz} F_k\Big]$$

    with $P = (Q_{yy}, Q_{yu})$ are integrated from $t_1$ back to $t_0$ by the same
    `solver`. With `exact=False` the term in brackets is dropped, as in the paper: the
    result is the Gauss-Newton matrix. With `exact=True` it is the Hessian.

    The result is a discretisation of the derivatives of the exact solution. It differs
    from the derivatives of the computed loss, which `nodegrad.hessian_blocks` returns,
    by an error of the size of the tolerance.

    **Arguments:**

    - `terms`: the vector field `F(t, y, args)`, or a `diffrax.ODETerm`.
    - `solver`, `t0`, `t1`, `dt0`, `y0`, `args`, `terminal_cost`, `running_cost`: as for
      `nodegrad.hessian_blocks`.
    - `exact`: whether to include the second derivatives of the vector field.
    - `backsolve`: how the backward equations get the state. `False`: from the dense
      output of the forward solve. `True`: the state is integrated backwards with them,
      as in the paper.
    - `ts`: times, from `t0` towards `t1`. For each of them the result has the
      derivatives of the loss from that time on, with respect to $y$ at that time. They
      are interpolated, so the times need not be ends of steps.
    - `stepsize_controller`, `adjoint`, `max_steps`: as for `nodegrad.odesolve`, for
      each of the two solves. The error control of the backward solve includes $Q$,
      $Q_z$ and $Q_{zz}$. `adjoint` only matters for derivatives of the result.

    **Returns:** `nodegrad.HessianBlocks`, at `t0` or along `ts`. `value` is $Q$,
    `grad_y` and `grad_args` are $Q_y$ and $Q_u$, and `hess_yy`, `hess_yargs` and
    `hess_argsargs` are $Q_{yy}$, $Q_{yu}$ and $Q_{uu}$.

    **Raises:** `TypeError` if `terms` are not a plain vector field, if `exact` or
    `backsolve` is not a `bool`, and for complex numbers. `ValueError` for
    `max_steps=None`, for costs that do not return a real scalar, and for times out of
    order. `RuntimeError` if a solve fails. The result can be differentiated by reverse
    mode, and not by forward mode; for `nodegrad.hessian_blocks` the opposite holds.

    **Cost:** for $m$ states and $n$ parameters, an evaluation of the backward
    equations costs $m$ pullbacks of the vector field and matrix products of
    $m (m + n)^2$. A running cost adds $m + n$ second-order products, and so does
    `exact=True`. A new function object compiles again: define the vector field and the
    costs once, outside of loops.

    Memory: some copies of $(m + n)^2$ numbers, one for each stage of the solver.
    `backsolve=False` also stores the dense output of `max_steps` forward steps;
    `backsolve=True` stores only the final state.

    **When not to use it:** for the derivatives of the computed loss, for terms that are
    not a plain vector field, or for memory that does not depend on `max_steps`:
    `nodegrad.hessian_blocks`. Do not use `backsolve=True` on decaying problems: errors
    grow when they are integrated backwards. This function is for reproducing the paper,
    and for checking a tolerance: the two functions agree if it is tight enough.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, Theorem 1
        (without the bracket above).
    """
    check_flag("backsolve", backsolve)
    loss = checked_loss(
        terms,
        t0,
        t1,
        dt0,
        y0,
        args,
        terminal_cost=terminal_cost,
        running_cost=running_cost,
        exact=exact,
        ts=ts,
        adjoint=adjoint,
        max_steps=max_steps,
    )
    field = plain_field(
        loss.terms,
        "`nodegrad.theorem1_blocks`",
        "For other terms use `nodegrad.hessian_blocks`.",
    )
    backward = solve_both_ways(
        loss,
        field,
        args,
        ft.partial(odesolve, solver=solver, adjoint=adjoint, max_steps=max_steps),
        stepsize_controller,
        exact=exact,
        backsolve=backsolve,
    )
    return _blocks_of(loss, backward.ys, args)


@eqx.filter_jit
def _blocks_of(loss: Loss, ys: Any, args: PyTree) -> HessianBlocks:
    """Returns the blocks in the order of `loss.ts`, or at `t0`.

    `ys` is what the backward solve saved: a `LossToGo` with a leading axis for times,
    last to first.
    """
    if loss.ts is None:
        to_go: LossToGo = jax.tree.map(lambda x: x[0], ys)
    else:
        to_go = jax.tree.map(lambda x: x[::-1], ys)
    return structured(to_go.value, to_go.gradient, to_go.hessian, loss.y0, args)
