"""`low_rank_blocks`: Hessian blocks of a loss whose curvature is a few columns."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._solve.adjoints import ACAAdjoint
from .._solve.arguments import as_state, as_times
from .._solve.odesolve import odesolve
from .._solve.recorded_adjoint import AbstractRecordedAdjoint


_Time = Real[ArrayLike, ""]
_SAVE_T1 = diffrax.SaveAt(t1=True)
_CONSTANT = diffrax.ConstantStepSize()
_ACA = ACAAdjoint()


class LowRankBlocks(eqx.Module):
    r"""The columns of Gauss-Newton blocks, at the start of a solve.

    - `y1`: the final state.
    - `q`: $q_i = (\partial y(t_1) / \partial y_0)^\top c_i$, like `y0` with a leading
      axis over the columns $c_i$.
    - `p`: $p_i = (\partial y(t_1) / \partial u)^\top c_i$, like the floating point
      arrays of `args` with a leading axis.

    **Arguments:** those fields, filled by `nodegrad.low_rank_blocks`.

    **Cost:** $R (m + n)$ numbers.
    """

    y1: PyTree[Array]
    q: PyTree[Array]
    p: PyTree[Array]


def low_rank_blocks(
    terms: Callable[[Array, PyTree, PyTree], PyTree] | PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: _Time,
    t1: _Time,
    dt0: _Time | None,
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    columns: PyTree[Array] | Callable[[PyTree], PyTree[Array]],
    stepsize_controller: diffrax.AbstractStepSizeController = _CONSTANT,
    adjoint: AbstractRecordedAdjoint = _ACA,
    max_steps: int = 4096,
) -> LowRankBlocks:
    r"""Gauss-Newton blocks in factors, from a low-rank curvature of the terminal cost.

    If $\nabla^2 \Phi(y(t_1)) = \sum_{i=1}^R s_i\, c_i c_i^\top$, then the Gauss-Newton
    blocks of $\Phi$ (`nodegrad.hessian_blocks(..., exact=False)`) are

    $$Q_{yy} = \sum_i s_i\, q_i q_i^\top, \qquad Q_{yu} = \sum_i s_i\, q_i p_i^\top,
      \qquad Q_{uu} = \sum_i s_i\, p_i p_i^\top,$$

    with the pullbacks $q_i, p_i$ of the columns $c_i$ to `y0` and to the floating point
    arrays $u$ in `args`. All columns go back in the same sweep.

    What to take for columns: the gradient of $\Phi$ alone gives the gradient of the
    loss and the outer product of the empirical Fisher information; the rows of a
    Jacobian of residuals at $t_1$ give the exact Gauss-Newton matrix of least squares;
    a square root of the Hessian of the cost, times random signs, gives an unbiased
    sample.

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `dt0`, `y0`, `args`, `stepsize_controller`,
      `adjoint`, `max_steps`: as for `nodegrad.hessian_blocks`.
    - `columns`: the $c_i$, a pytree like `y0` with a leading axis of length $R$; or a
      function of the final state that returns them.

    **Returns:** `nodegrad.LowRankBlocks`: the final state, $q$ and $p$.

    **Raises:** `ValueError` for columns that do not fit `y0`; otherwise as
    `nodegrad.odesolve`.

    **Cost:** $R$ pullbacks of every accepted step, and one replay of it. Memory:
    $R (m + n)$ beyond that of one gradient.

    **When not to use it:** with more columns than states ($R > m$), or for the Hessian:
    `nodegrad.hessian_blocks`.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        Proposition 2.
    """
    return _low_rank_blocks(
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
    terms, solver, t0, t1, dt0, y0, args, columns, **kwargs
) -> LowRankBlocks:
    time, *_ = as_times(t0, t1, dt0, _SAVE_T1)
    y0 = jax.tree.map(lambda x: as_state(time.dtype, x), y0)
    inexact, rest = eqx.partition(args, eqx.is_inexact_array)

    def solve(y0, inexact):
        args = eqx.combine(inexact, rest)
        sol = odesolve(terms, solver, t0, t1, dt0, y0, args, **kwargs)
        return jax.tree.map(lambda x: x[0], sol.ys)

    y1, pull = jax.vjp(solve, y0, inexact)
    if callable(columns):
        columns = columns(y1)
    _check_columns(columns, y1)
    q, p = jax.vmap(pull)(columns)
    return LowRankBlocks(y1, q, p)


def _check_columns(columns: PyTree, y1: PyTree[Array]):
    expected, received = jax.tree.structure(y1), jax.tree.structure(columns)
    if expected != received:
        msg = f"`columns` must be a pytree like `y0`: {expected}, got {received}."
        raise ValueError(msg)
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
