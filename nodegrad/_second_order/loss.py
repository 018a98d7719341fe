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
from jaxtyping import Array, PyTree

from .._solve.arguments import as_state, as_times, check_supported, check_ts, is_terms


class Loss(NamedTuple):
    """The checked arguments: terms are Diffrax terms, numbers are arrays.

    `dtype` is the widest type of the numbers in `y0` and `args`.
    """

    terms: PyTree[diffrax.AbstractTerm]
    t0: Array
    t1: Array
    dt0: Array | None
    y0: PyTree[Array]
    terminal_cost: Callable
    running_cost: Callable | None
    ts: Array | None
    dtype: Any


class _Cost(eqx.Module):
    """A cost that may return a Python number.

    A module rather than a closure: two modules of the same function are equal, so
    `eqx.filter_jit` does not compile again.
    """

    cost: Callable
    dtype: Any = eqx.field(static=True)

    def __call__(self, *args):
        out = self.cost(*args)
        return jnp.asarray(out, self.dtype) if isinstance(out, float) else out


def checked_loss(
    terms,
    t0,
    t1,
    dt0,
    y0,
    args: PyTree,
    *,
    terminal_cost: Callable,
    running_cost: Callable | None,
    exact: bool,
    ts,
    adjoint,
    max_steps: int | None,
) -> Loss:
    """Raises for arguments that do not fit together; converts the others."""
    saveat = diffrax.SaveAt(t1=True) if ts is None else _save_at(ts)
    check_supported(adjoint, saveat)
    check_flag("exact", exact)
    if max_steps is None:
        msg = (
            "Second derivatives along a solve need a bound on the number of steps, to "
            "allocate memory for them: pass `max_steps=...`."
        )
        raise ValueError(msg)
    if not is_terms(terms):
        terms = diffrax.ODETerm(terms)
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


def check_flag(name: str, value: Any):
    """Refuses everything but the two Python truth values."""
    if not isinstance(value, bool):
        msg = f"`{name}` must be `True` or `False`; got {value!r}."
        raise TypeError(msg)


def plain_field(terms: PyTree[diffrax.AbstractTerm], needed_by: str, cure: str):
    """The function that is the vector field; raises if `terms` are anything else."""
    if type(terms) is not diffrax.ODETerm:
        msg = (
            f"{needed_by} needs a plain vector field, that is, a function or a "
            f"`diffrax.ODETerm`; got {terms}. {cure}"
        )
        raise TypeError(msg)
    return terms.vector_field


def common_dtype(y0: PyTree, args: PyTree):
    """The widest type of the numbers in `y0` and `args`."""
    leaves = jax.tree.leaves(eqx.filter((y0, args), eqx.is_inexact_array))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*leaves)


def _save_at(ts) -> diffrax.SaveAt:
    if np.ndim(ts) != 1 or np.size(ts) == 0:
        msg = f"`ts` must be a sequence of one or more times; got {ts}."
        raise ValueError(msg)
    return diffrax.SaveAt(ts=jnp.asarray(ts))


def _check_cost(name: str, cost: Callable, *inputs: Any):
    out = eqx.filter_eval_shape(cost, *inputs)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", bool)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        msg = f"`{name}` must return a real scalar array; got {out}."
        raise ValueError(msg)
