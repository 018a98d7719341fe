"""`low_rank_blocks`: Gauss-Newton blocks in factors, for a cost of low rank."""

# Annotations stay strings, so `help` shows them as they are written here.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._internal.devices import on_each_device
from .._solve.aca_adjoint import ACAAdjoint
from .._solve.arguments import as_state, as_times
from .._solve.odesolve import odesolve
from .._solve.recorded_adjoint import AbstractRecordedAdjoint


_SAVE_T1 = diffrax.SaveAt(t1=True)
_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()


class LowRankBlocks(eqx.Module):
    r"""The factors of Gauss-Newton blocks, at the start of a solve.

    **Arguments:** the fields. `nodegrad.low_rank_blocks` returns them.

    - `y1`: the final state.
    - `q`: $q_i = (\partial y(t_1) / \partial y_0)^\top c_i$, like `y0` with a leading
      axis for the columns $c_i$.
    - `p`: $p_i = (\partial y(t_1) / \partial u)^\top c_i$, like the floating point
      arrays of `args` with the same leading axis.

    **Cost:** the memory is $R (m + n)$ numbers for $R$ columns, $m$ numbers in the
    state and $n$ in `args`.
    """

    y1: PyTree[Array]
    q: PyTree[Array]
    p: PyTree[Array]


def low_rank_blocks(
    terms: Callable[[Array, PyTree, PyTree], PyTree] | PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Real[ArrayLike, ""],
    t1: Real[ArrayLike, ""],
    dt0: Real[ArrayLike, ""] | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    columns: PyTree[Array] | Callable[[PyTree], PyTree[Array]],
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int = 4096,
) -> LowRankBlocks:
    r"""Returns Gauss-Newton blocks in factors, for a terminal cost of low rank.

    If $\nabla^2 \Phi(y(t_1)) = \sum_{i=1}^R s_i\, c_i c_i^\top$, then the Gauss-Newton
    blocks of $\Phi$ (`nodegrad.hessian_blocks(..., exact=False)`) are

    $$Q_{yy} = \sum_i s_i\, q_i q_i^\top, \qquad Q_{yu} = \sum_i s_i\, q_i p_i^\top,
      \qquad Q_{uu} = \sum_i s_i\, p_i p_i^\top,$$

    where $q_i$ and $p_i$ are the pullbacks of the columns $c_i$ to `y0` and to the
    floating point arrays $u$ in `args`. One sweep pulls back all columns.

    **Example:** for the cost $\frac12 \lvert y(t_1) - \mathrm{target} \rvert^2$ the
    columns are those of the identity.

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    decay = lambda t, y, rate: -rate * y
    blocks = nodegrad.low_rank_blocks(
        decay, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.array([2.0, 1.0]), jnp.array(0.7),
        columns=jnp.eye(2),
    )
    print((blocks.p @ blocks.p).round(3))  # 1.233
    ```

    **Choice of columns:** the gradient of $\Phi$ as the only column gives the gradient
    of the loss, and the outer product of the empirical Fisher information. The rows of
    a Jacobian of residuals at $t_1$ give the exact Gauss-Newton matrix of least
    squares. A square root of the Hessian of the cost, times random signs, gives an
    unbiased sample.

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `dt0`, `y0`, `args`, `stepsize_controller`,
      `adjoint`, `max_steps`: as for `nodegrad.hessian_blocks`.
    - `columns`: the $c_i$, a pytree like `y0` with a leading axis of length $R$; or a
      function of the final state that returns them.

    **Returns:** `nodegrad.LowRankBlocks`: the final state, $q$ and $p$.

    **Raises:** `ValueError` for columns that do not fit `y0`; otherwise as
    `nodegrad.odesolve`.

    **Cost:** one replay and $R$ pullbacks of every accepted step. Memory: $R (m + n)$
    numbers in addition to that of one gradient.

    **When not to use it:** with more columns than states ($R > m$), or for the Hessian:
    `nodegrad.hessian_blocks`.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        Proposition 2.
    """
    return on_each_device(_low_rank_blocks)(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        columns,
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
    )


@eqx.filter_jit
def _low_rank_blocks(
    terms: Any,
    solver: diffrax.AbstractSolver,
    t0: Real[ArrayLike, ""],
    t1: Real[ArrayLike, ""],
    dt0: Real[ArrayLike, ""] | None,
    y0: PyTree[ArrayLike],
    args: PyTree,
    columns: PyTree[Array] | Callable[[PyTree], PyTree[Array]],
    **kwargs: Any,
) -> LowRankBlocks:
    """Returns the blocks. `kwargs` are passed to `odesolve`, which checks `terms`."""
    # `jax.vjp` differentiates by `y0` as it is passed: convert it before the solve.
    time, *_ = as_times(t0, t1, dt0, _SAVE_T1)
    y0 = jax.tree.map(lambda x: as_state(time.dtype, x), y0)
    inexact, rest = eqx.partition(args, eqx.is_inexact_array)

    def solve(y0: PyTree[Array], inexact: PyTree[Array]) -> PyTree[Array]:
        args = eqx.combine(inexact, rest)
        sol = odesolve(terms, solver, t0, t1, dt0, y0, args, **kwargs)
        return jax.tree.map(lambda x: x[0], sol.ys)

    y1, pull = jax.vjp(solve, y0, inexact)
    if callable(columns):
        columns = columns(y1)
    _check_columns(columns, y1)
    # One batched pullback: the sweep reconstructs or replays each step once.
    q, p = jax.vmap(pull)(columns)
    return LowRankBlocks(y1, q, p)


def _check_columns(columns: PyTree, y1: PyTree[Array]) -> None:
    """Raises an error unless `columns` is like `y1`, with one more leading axis."""
    expected, received = jax.tree.structure(y1), jax.tree.structure(columns)
    if expected != received:
        msg = f"`columns` must be a pytree like `y0`: {expected}, got {received}."
        raise ValueError(msg)
    # The leading axis must have the same size in all leaves.
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(columns)}
    for c, y in zip(jax.tree.leaves(columns), jax.tree.leaves(y1), strict=True):
        if (jnp.shape(c)[1:], jnp.result_type(c)) != (y.shape, y.dtype) or (
            len(sizes) != 1 or () in sizes
        ):
            msg = (
                "`columns` must have the shapes and dtypes of `y0` with one more, "
                f"leading axis: for a leaf {y.dtype}{list(y.shape)}, got "
                f"{jnp.result_type(c)}{list(jnp.shape(c))}."
            )
            raise ValueError(msg)
