"""`hessian_blocks`: all second derivatives of a loss along a solve, in one sweep."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._internal.compat import nondifferentiable, nondifferentiable_backward
from .._internal.tree import flatten
from .._solve.adjoints import ACAAdjoint
from .._solve.odesolve import raised
from .._solve.recorded_adjoint import AbstractRecordedAdjoint
from .discrete_blocks import differentiate_steps, linearized
from .loss import checked_loss, common_dtype, plain_field


_Time = Real[ArrayLike, ""]
_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()

_FORWARD_ONLY = (
    "What `nodegrad.hessian_blocks` returns cannot be differentiated by reverse mode. "
    "The first and second derivatives of the loss in `y0` and `args` are among its "
    "fields; for a gradient in anything else take `jax.grad` of a loss made with "
    "`nodegrad.odesolve`, for third derivatives forward mode (`jax.jvp`)."
)

_FROZEN = (
    "The Gauss-Newton blocks of a loss with a running cost, "
    "`nodegrad.hessian_blocks(..., running_cost=..., exact=False)`, cannot be "
    "differentiated. Those with `exact=True` can, by forward mode."
)


class HessianBlocks(eqx.Module):
    r"""A loss and its first and second derivatives, structured as `jax.hessian` does.

    `value`, `grad_y`, `grad_args`, `hess_yy`, `hess_yargs` and `hess_argsargs`; in the
    notation of the paper $Q, Q_x, Q_u, Q_{xx}, Q_{xu}, Q_{uu}$. A second derivative is
    a pytree of pytrees: for each leaf of the first argument, a pytree like the second
    one, whose leaves have the shapes of both. Leaves of `args` that are not floating
    point arrays are `None`. Blocks along `ts` have a leading axis for them. All numbers
    have the widest type of `y0` and `args`.

    **Arguments:** those fields, filled by `nodegrad.hessian_blocks` or
    `nodegrad.theorem1_blocks`.

    **Cost:** $(m + n)^2$ numbers for $m$ of the state and $n$ of `args`.
    """

    value: Array
    grad_y: PyTree[Array]
    grad_args: PyTree[Array]
    hess_yy: PyTree[Array]
    hess_yargs: PyTree[Array]
    hess_argsargs: PyTree[Array]


def hessian_blocks(
    terms: Callable[[Array, PyTree, PyTree], PyTree] | PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: _Time,
    t1: _Time,
    dt0: _Time | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    terminal_cost: Callable[[PyTree], Array],
    running_cost: Callable[[Array, PyTree, PyTree], Array] | None = None,
    exact: bool = False,
    ts: Real[ArrayLike, " times"] | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int = 4096,
) -> HessianBlocks:
    r"""All first and second derivatives of a loss along a solve, in one reverse sweep.

    The loss is $L = \Phi(y(t_1)) + \int_{t_0}^{t_1} \ell(t, y, u)\, dt$ with $u$ the
    floating point arrays in `args`; the derivatives are those with respect to $y_0$ and
    $u$. The sweep goes back over the accepted steps $y_{i+1} = \Phi_i(y_i, u)$, with
    the states from where `adjoint` has them from, and carries the derivatives of the
    loss yet to come, $Q$, from step to step. With $J_i$ the Jacobian of
    $(\Phi_i, \mathrm{id})$,

    $$\nabla^2 Q_i = J_i^\top\, \nabla^2 Q_{i+1}\, J_i
      + \Big[\sum_k (\nabla_y Q_{i+1})_k\, \nabla^2 \Phi_{i,k}\Big].$$

    With `exact=True` this is the Hessian of the computed loss with the step sizes held
    constant, as `jax.hessian` finds it, to rounding. With `exact=False` the term in
    brackets is dropped as far as it comes from the vector field: the (generalised)
    Gauss-Newton matrix, which is what the published equations compute. It is positive
    semidefinite if the costs are convex (with a running cost, if moreover no weight
    $b_i$ of the solver is negative: so with `nodegrad.RK4`, and up to the local error
    with `diffrax.Tsit5`). The two agree if the vector field is affine in $(y, u)$
    together.

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `dt0`, `y0`, `args`, `stepsize_controller`,
      `adjoint`, `max_steps`: as for `nodegrad.odesolve`. What is to be differentiated
      has to be in `args`: arrays that the vector field closes over, and arrays inside
      of `terms`, are constants, and so are Python numbers.
    - `terminal_cost`: $\Phi$, a function of `y` to a real scalar.
    - `running_cost`: $\ell$, a function of `(t, y, args)` to a real scalar. It is
      integrated as one more component of the state, which the error control sees as
      well. Needs a plain vector field (a function or a `diffrax.ODETerm`).
    - `exact`: whether to count the second derivatives of the vector field.
    - `ts`: times, from `t0` towards `t1`, at which to return the derivatives of the
      loss from there on, with respect to $y$ there. They have to be the ends of steps:
      adaptive steps are made to end there, constant steps and `diffrax.StepTo` must do
      so already.

    **Returns:** `nodegrad.HessianBlocks`, at `t0` or along `ts`.

    **Raises:** `ValueError` or `TypeError` for arguments that do not fit together, at
    trace time where they are known then. `RuntimeError` if a solve fails. Forward mode
    passes through the result (third derivatives), reverse mode does not.

    **Cost:** for $m$ states and $n$ parameters, a step costs $m + n$ second-order
    pullbacks; Gauss-Newton without a running cost $m$ pullbacks (or $m + n$
    pushforwards, if $n \le m$), and matrix products of $m n^2$. Memory: $(m + n)^2$,
    and that of a first-order gradient, so that with `nodegrad.ReversibleAdjoint` it
    does not depend on the number of steps.
    A new function object compiles again: define the vector field and the costs once,
    outside of loops.

    **When not to use it:** for more than some thousand parameters, where the matrix
    itself is too large: `nodegrad.hvp`, `nodegrad.ggn_vp`. For a loss of few residuals:
    `nodegrad.low_rank_blocks`. For a loss of several solves or of outputs at several
    times: `jax.hessian`. For the backward differential equations of the paper instead
    of the derivatives of the computed loss: `nodegrad.theorem1_blocks`.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, Theorem 1
        (without the bracket above).
    """
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
    if running_cost is not None:
        plain_field(
            loss.terms, "A `running_cost`", "Add the cost to the state by hand."
        )
    sol = _discrete_blocks(
        loss.terms,
        solver,
        loss.t0,
        loss.t1,
        loss.dt0,
        loss.y0,
        args,
        terminal_cost=loss.terminal_cost,
        running_cost=loss.running_cost,
        exact=exact,
        ts=loss.ts,
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
    )
    blocks: Any = raised(sol).ys
    return blocks


@eqx.filter_jit
def _discrete_blocks(
    terms,
    solver,
    t0,
    t1,
    dt0,
    y0,
    args,
    *,
    terminal_cost,
    running_cost,
    exact,
    **kwargs,
) -> diffrax.Solution:
    """The solve, with its blocks for `ys`."""
    dtype = common_dtype(y0, args)
    loss, y_init, without_curvature = terminal_cost, y0, None
    if running_cost is not None:
        field = terms.vector_field
        terms = _with_cost(field, running_cost)
        y_init = y0, jnp.zeros((), dtype)
        loss = lambda y__cost: terminal_cost(y__cost[0]) + y__cost[1]
        if not exact:
            without_curvature = _with_cost(linearized(field), running_cost)
    sol, value, carry = differentiate_steps(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y_init,
        args,
        loss=loss,
        without_curvature=without_curvature,
        curved=exact or running_cost is not None,
        dtype=dtype,
        **kwargs,
    )
    size = flatten(y0, dtype)[0].size
    restrict = lambda expansion: expansion.of_first(size)
    if carry.rows is None:
        gradient, hessian = restrict(carry.expansion)
    else:
        rows = carry.rows.finished(sol.result == diffrax.RESULTS.successful)
        gradient, hessian = jax.vmap(restrict)(rows.expansion)
        # What the running cost has come to by then is not to come.
        value = value - jnp.sum(rows.state[:, size:], axis=1)
    blocks = structured(value, gradient, hessian, y0, args)
    if without_curvature is not None:
        blocks = nondifferentiable(blocks, msg=_FROZEN)
    else:
        blocks = nondifferentiable_backward(blocks, msg=_FORWARD_ONLY)
    return replace(sol, ys=blocks)


def _with_cost(field: Callable, running_cost: Callable) -> diffrax.ODETerm:
    """The vector field of the state and of what the running cost has come to."""

    def with_cost(t, y__cost, args):
        y, cost = y__cost
        rate = jnp.asarray(running_cost(t, y, args)).astype(cost.dtype)
        return field(t, y, args), rate

    return diffrax.ODETerm(with_cost)


def structured(
    value: Array,
    gradient: Array,
    hessian: Array,
    y0: PyTree[Array],
    args: PyTree,
) -> HessianBlocks:
    """The blocks of a flat gradient and Hessian in `(y0, args)`.

    `value`, `gradient` and `hessian` may all have one more leading axis, for times.
    """
    y0, args = eqx.filter((y0, args), eqx.is_inexact_array)
    axis = gradient.ndim - 1
    size = sum(x.size for x in jax.tree.leaves(y0))

    def block(matrix: Array, rows: PyTree[Array], columns: PyTree[Array]):
        split_columns = lambda x: _split(x, x.ndim - 1, columns)
        return jax.tree.map(split_columns, _split(matrix, axis, rows))

    upper, lower = jnp.split(hessian, [size], axis)
    return HessianBlocks(
        value=value,
        grad_y=_split(gradient[..., :size], axis, y0),
        grad_args=_split(gradient[..., size:], axis, args),
        hess_yy=block(upper[..., :size], y0, y0),
        hess_yargs=block(upper[..., size:], y0, args),
        hess_argsargs=block(lower[..., size:], args, args),
    )


def _split(array: Array, axis: int, like: PyTree[Array]) -> PyTree[Array]:
    """`array` as a pytree like `like`, with `axis` in the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves], dtype=int)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    parts = [
        jnp.reshape(part, before + x.shape + after)
        for part, x in zip(jnp.split(array, ends[:-1], axis), leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, parts)
