"""`hessian_blocks`: all second derivatives of a loss along a solve, in one sweep."""

# Annotations stay strings, so `help` shows them as they are written here.
from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

from .._internal.compat import nondifferentiable, nondifferentiable_backward
from .._internal.devices import on_each_device
from .._internal.tree import flatten, with_fields
from .._layers.second_order import second_order
from .._solve.aca_adjoint import ACAAdjoint
from .._solve.odesolve import raised
from .._solve.recorded_adjoint import AbstractRecordedAdjoint
from .._steps.rosenbrock import AbstractRosenbrock
from .discrete_blocks import differentiate_steps, linearized
from .loss import checked_loss, common_dtype, plain_field


_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()

_FORWARD_ONLY = (
    "The result of `nodegrad.hessian_blocks` cannot be differentiated by reverse mode. "
    "The first and second derivatives of the loss in `y0` and `args` are among its "
    "fields. For a gradient in other arrays use `jax.grad` of a loss made with "
    "`nodegrad.odesolve`, for third derivatives forward mode (`jax.jvp`)."
)

_FROZEN = (
    "The Gauss-Newton blocks of a loss with a running cost, "
    "`nodegrad.hessian_blocks(..., running_cost=..., exact=False)`, cannot be "
    "differentiated. Those with `exact=True` can, by forward mode."
)


_LINEARIZED = (
    "`nodegrad.hessian_blocks(..., running_cost=..., exact=False)` differentiates the "
    "steps with a linearised vector field, and a step of `{}` contains derivatives of "
    "the vector field. Pass `exact=True`, take another solver, or add the cost to the "
    "state by hand."
)


class HessianBlocks(eqx.Module):
    r"""A loss and its first and second derivatives, structured as by `jax.hessian`.

    **Arguments:** the fields. `nodegrad.hessian_blocks` and `nodegrad.theorem1_blocks`
    return them. In the notation of the paper they are $Q, Q_x, Q_u, Q_{xx}, Q_{xu}$ and
    $Q_{uu}$.

    - `value`: the loss.
    - `grad_y`, `grad_args`: the gradients, pytrees like `y0` and `args`.
    - `hess_yy`, `hess_yargs`, `hess_argsargs`: the second derivatives, pytrees of
      pytrees. For each leaf of the first argument they have a pytree like the second
      argument, whose leaves have the concatenated shapes of the two leaves.

    Leaves of `args` that are not floating point arrays are `None`. With `ts` every
    array has a leading axis for the times. All numbers have the widest floating point
    type in `y0` and `args`.

    **Cost:** the memory is $(m + n)^2$ numbers for $m$ numbers in the state and $n$ in
    `args`.
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
    t0: Real[ArrayLike, ""],
    t1: Real[ArrayLike, ""],
    dt0: Real[ArrayLike, ""] | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    terminal_cost: Callable[[PyTree], Array],
    running_cost: Callable[[Array, PyTree, PyTree], Array] | None = None,
    exact: bool = False,
    ts: Real[ArrayLike, " times"] | Sequence[float] | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int = 4096,
) -> HessianBlocks:
    r"""Returns all first and second derivatives of a loss along a solve, in one sweep.

    **Loss:** $L = \Phi(y(t_1)) + \int_{t_0}^{t_1} \ell(t, y, u)\, dt$ with $u$ the
    floating point arrays in `args`. It is differentiated with respect to $y_0$ and $u$.

    **Example:**

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    decay = lambda t, y, rate: -rate * y
    misfit = lambda y: 0.5 * jnp.sum((y - 1.0) ** 2)
    blocks = nodegrad.hessian_blocks(
        decay, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.array([2.0]), jnp.array(0.7),
        terminal_cost=misfit, exact=True,
    )
    print(blocks.hess_argsargs.round(3))  # 0.98
    ```

    **Method:** the sweep visits the accepted steps $y_{i+1} = \Phi_i(y_i, u)$, last to
    first, and carries the derivatives of $Q_i$, the loss as a function of $y_i$ and
    $u$. The states are those that `adjoint` stored or reconstructs. With $J_i$ the
    Jacobian of $(\Phi_i, \mathrm{id})$,

    $$\nabla^2 Q_i = J_i^\top\, \nabla^2 Q_{i+1}\, J_i
      + \Big[\sum_k (\nabla_y Q_{i+1})_k\, \nabla^2 \Phi_{i,k}\Big].$$

    **Hessian or Gauss-Newton:** with `exact=True` the result is the Hessian of the
    computed loss with the step sizes held constant, as from `jax.hessian`, to rounding.
    With `exact=False` the part of the term in brackets that comes from the vector field
    is dropped. The result is the (generalised) Gauss-Newton matrix, which the published
    equations compute. It is positive semidefinite if the costs are convex. With a
    running cost, also no weight $b_i$ of the solver may be negative: this holds for
    `nodegrad.RK4`, and up to the local error for `diffrax.Tsit5`. The two matrices
    agree if the vector field is affine in $(y, u)$ together.

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `dt0`, `y0`, `args`, `stepsize_controller`,
      `adjoint`, `max_steps`: as for `nodegrad.odesolve`. The parameters have to be in
      `args`: arrays that the vector field closes over, arrays inside of `terms`, and
      Python numbers are constants.
    - `terminal_cost`: $\Phi$, a function of `y` to a real scalar.
    - `running_cost`: $\ell$, a function of `(t, y, args)` to a real scalar. It is
      integrated as one more component of the state, and is part of the error control.
      It needs a plain vector field (a function or a `diffrax.ODETerm`).
    - `exact`: whether to include the second derivatives of the vector field.
    - `ts`: times, from `t0` towards `t1`. For each of them the result has the
      derivatives of the loss from that time on, with respect to $y$ at that time. The
      times have to be ends of steps. Adaptive steps are made to end there; constant
      steps and `diffrax.StepTo` must do so already.

    **Returns:** `nodegrad.HessianBlocks`, at `t0` or along `ts`.

    **Raises:** `ValueError` or `TypeError` for arguments that do not fit together, at
    trace time if they are known then, and for Rosenbrock methods with a running cost
    and `exact=False`. `TypeError` for a vector field with a `jax.custom_vjp`, unless
    reverse mode is all that is needed. `RuntimeError` if a solve fails, and for reverse
    mode through the result. Forward mode gives third derivatives.

    **Cost:** for $m$ states and $n$ parameters, a step costs $m + n$ second-order
    pullbacks; Gauss-Newton without a running cost $m$ pullbacks (or $m + n$
    pushforwards, if $n \le m$), and matrix products of $m n^2$. Memory: $(m + n)^2$,
    and that of a first-order gradient, so with `nodegrad.ReversibleAdjoint` it does not
    depend on the number of steps. A new function object compiles again: define the
    vector field and the costs once, outside of loops.

    **When not to use it:** for more than some thousand parameters, because the matrix
    is too large: `nodegrad.hvp`, `nodegrad.ggn_vp`. For a loss of few residuals:
    `nodegrad.low_rank_blocks`. For a loss of several solves or of outputs at several
    times: `jax.hessian`. For the backward differential equations of the paper:
    `nodegrad.theorem1_blocks`.

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
        # Called for its error: other terms have no field to add the cost to.
        plain_field(
            loss.terms, "A `running_cost`", "Add the cost to the state by hand."
        )
        if isinstance(solver, AbstractRosenbrock) and not exact:
            raise ValueError(_LINEARIZED.format(type(solver).__name__))
    return on_each_device(_raised_blocks)(
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


def _raised_blocks(*args: Any, **kwargs: Any) -> HessianBlocks:
    """Returns the blocks, and raises an error if the solve fails."""
    # Outside of the jitted function, as in `odesolve`.
    sol = second_order(ft.partial(_discrete_blocks, **kwargs), *args)
    blocks: Any = raised(sol).ys
    return blocks


@eqx.filter_jit
def _discrete_blocks(
    terms: Any,
    solver: diffrax.AbstractSolver,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    dt0: Float[Array, ""] | None,
    y0: PyTree[Array],
    args: PyTree,
    *,
    terminal_cost: Callable,
    running_cost: Callable | None,
    exact: bool,
    **kwargs: Any,
) -> diffrax.Solution:
    """Returns the solution of the solve, with its blocks in the place of `ys`.

    A solution, because `raised` reads its result and statistics outside of the jitted
    function. `kwargs` are passed to `differentiate_steps`.
    """
    # With a running cost the state is `(y, cost so far)`. Gauss-Newton drops the second
    # derivatives of the vector field, but not those of the running cost. So the steps
    # are differentiated twice, with a linearised field.
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

    # The running cost is the last component of the state, after the `size` numbers of
    # `y`. Its initial value is no variable of the loss.
    size = flatten(y0, dtype)[0].size
    restrict = lambda expansion: expansion.of_first(size)
    if carry.rows is None:
        gradient, hessian = restrict(carry.expansion)
    else:
        rows = carry.rows.finished(sol.result == diffrax.RESULTS.successful)
        gradient, hessian = jax.vmap(restrict)(rows.expansion)
        # The loss from a time on does not contain the running cost up to that time.
        value = value - jnp.sum(rows.state[:, size:], axis=1)
    blocks = structured(value, gradient, hessian, y0, args)
    if without_curvature is not None:
        blocks = nondifferentiable(blocks, msg=_FROZEN)
    else:
        blocks = nondifferentiable_backward(blocks, msg=_FORWARD_ONLY)
    return with_fields(sol, ys=blocks)


def _with_cost(field: Callable, running_cost: Callable) -> diffrax.ODETerm:
    """Returns the vector field of the state `(y, cost so far)`."""

    def with_cost(
        t: Real[ArrayLike, ""], y__cost: tuple[PyTree[Array], Array], args: PyTree
    ) -> tuple[PyTree[Array], Array]:
        y, cost = y__cost
        rate = jnp.asarray(running_cost(t, y, args)).astype(cost.dtype)
        return field(t, y, args), rate

    return diffrax.ODETerm(with_cost)


def structured(
    value: Float[Array, "*times"],
    gradient: Float[Array, "*times z"],
    hessian: Float[Array, "*times z z"],
    y0: PyTree[Array],
    args: PyTree,
) -> HessianBlocks:
    """Splits a flat gradient and Hessian in `(y0, args)` into blocks.

    Of the `z` numbers, those of `y0` come first. The axis for times is optional.
    """
    y0, args = eqx.filter((y0, args), eqx.is_inexact_array)
    axis = gradient.ndim - 1
    size = sum(x.size for x in jax.tree.leaves(y0))

    def block(
        matrix: Float[Array, "*times rows columns"],
        rows: PyTree[Array],
        columns: PyTree[Array],
    ) -> PyTree[Array]:
        # Split the rows first. Then the columns are the last axis of each part.
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
    """Returns `array` as a pytree like `like`: `axis` is split and reshaped."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves], dtype=int)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    parts = [
        jnp.reshape(part, before + x.shape + after)
        for part, x in zip(jnp.split(array, ends[:-1], axis), leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, parts)
