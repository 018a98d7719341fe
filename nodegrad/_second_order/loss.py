"""Checks and converts the arguments of a loss along a solve.

`hessian_blocks` and `theorem1_blocks` differentiate the same loss, a terminal cost plus
the integral of a running cost, and take the same arguments for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._internal.tree import check_flag
from .._solve.arguments import (
    as_state,
    as_terms,
    as_times,
    check_supported,
    check_ts,
)


class Loss(NamedTuple):
    """The checked arguments: terms are Diffrax terms, numbers are arrays.

    - `dt0`: `None` if the controller chooses the first step size.
    - `running_cost`: `None` if the loss is the terminal cost alone.
    - `ts`: the times at which to return derivatives; `None` for `t0` alone.
    - `dtype`: the widest floating point type in `y0` and `args`.
    """

    terms: PyTree[diffrax.AbstractTerm]
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    dt0: Float[Array, ""] | None
    y0: PyTree[Array]
    terminal_cost: Callable[[PyTree], Array]
    running_cost: Callable[[Array, PyTree, PyTree], Array] | None
    ts: Float[Array, " times"] | None
    dtype: Any


class _Cost(eqx.Module):
    """Makes an array of type `dtype` of a Python number that `cost` returns.

    A module, not a closure: two modules of the same function are equal, so
    `eqx.filter_jit` does not compile again.
    """

    cost: Callable
    dtype: Any = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        # The result may be anything: `_check_cost` checks it.
        out = self.cost(*args)
        return jnp.asarray(out, self.dtype) if isinstance(out, float) else out


def checked_loss(
    terms: Any,
    t0: ArrayLike,
    t1: ArrayLike,
    dt0: ArrayLike | None,
    y0: PyTree[ArrayLike],
    args: PyTree,
    *,
    terminal_cost: Callable[[PyTree], Any],
    running_cost: Callable[[Array, PyTree, PyTree], Any] | None,
    exact: bool,
    ts: Any,
    adjoint: Any,
    max_steps: int | None,
) -> Loss:
    """Converts the arguments; raises an error if they do not fit together.

    Arguments of type `Any` may be anything a user passes, and are checked here.
    """
    # Saving at `ts` has the same checks as differentiating there.
    saveat = diffrax.SaveAt(t1=True) if ts is None else _save_at(ts)
    check_supported(adjoint, saveat)
    check_flag("exact", exact)
    if max_steps is None:
        msg = (
            "Second derivatives along a solve need a bound on the number of steps, to "
            "allocate memory for them: pass `max_steps=...`."
        )
        raise ValueError(msg)
    terms = as_terms(terms)
    t0, t1, dt0 = as_times(t0, t1, dt0, saveat)
    y0 = jax.tree.map(lambda x: as_state(t0.dtype, x), y0)
    check_ts(saveat, t0, t1)
    dtype = common_dtype(y0, args)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        msg = (
            "Second derivatives along a solve need a real state and real `args`. "
            "Split complex ones into their real and imaginary parts."
        )
        raise TypeError(msg)
    terminal_cost = _Cost(terminal_cost, dtype)
    _check_cost("terminal_cost(y)", terminal_cost, y0)
    if running_cost is not None:
        running_cost = _Cost(running_cost, dtype)
        _check_cost("running_cost(t, y, args)", running_cost, t0, y0, args)
    ts = None if ts is None else jnp.asarray(ts, t0.dtype)
    return Loss(terms, t0, t1, dt0, y0, terminal_cost, running_cost, ts, dtype)


def plain_field(
    terms: PyTree[diffrax.AbstractTerm], needed_by: str, cure: str
) -> Callable[..., PyTree[Array]]:
    """Returns the function that is the vector field.

    Raises an error if `terms` is not a `diffrax.ODETerm`: it says what the field is
    `needed_by`, and the `cure`.
    """
    if type(terms) is not diffrax.ODETerm:
        msg = (
            f"{needed_by} needs a plain vector field, that is, a function or a "
            f"`diffrax.ODETerm`; got {terms}. {cure}"
        )
        raise TypeError(msg)
    return terms.vector_field


def common_dtype(y0: PyTree[Array], args: PyTree) -> Any:
    """Returns the widest floating point (or complex) type in `y0` and `args`."""
    leaves = jax.tree.leaves(eqx.filter((y0, args), eqx.is_inexact_array))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*leaves)


def _save_at(ts: Any) -> diffrax.SaveAt:
    """Returns `SaveAt(ts=ts)`; raises an error unless `ts` is a vector of times."""
    if np.ndim(ts) != 1 or np.size(ts) == 0:
        msg = f"`ts` must be a sequence of one or more times; got {ts}."
        raise ValueError(msg)
    return diffrax.SaveAt(ts=jnp.asarray(ts))


def _check_cost(name: str, cost: Callable, *inputs: Any) -> None:
    """Raises an error unless `cost(*inputs)` is a real scalar array."""
    # Results without a type, such as `None`, count as `bool`, which is refused.
    out = eqx.filter_eval_shape(cost, *inputs)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", bool)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        msg = f"`{name}` must return a real scalar array; got {out}."
        raise ValueError(msg)
