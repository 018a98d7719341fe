"""Explicit Butcher tableaus, and the evaluation of their stages."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ._rk4 import RK4


# Beyond this many stages unrolling costs more to compile than it saves at run time.
_MAX_UNROLLED_STAGES = 7


class _EulerTableau:
    """Euler's method; `diffrax.ButcherTableau` takes no fewer than two stages."""

    num_stages = 1
    fsal = False
    a_lower = ()
    b_sol = np.array([1.0])
    b_error = np.array([0.0])
    c = np.array([])


def has_explicit_tableau(solver: Any) -> bool:
    """Whether `solver` is an explicit Runge-Kutta method and nothing else.

    (`isinstance` would look through `diffrax.HalfSolver` at the solver inside.)
    """
    cls = type(solver)
    return issubclass(cls, diffrax.AbstractERK) and cls.step in (
        diffrax.AbstractERK.step,
        RK4.step,
    )


def explicit_tableau(solver: Any) -> Any:
    """The tableau of an explicit Runge-Kutta method, Euler's included; else `None`."""
    if type(solver) is diffrax.Euler:
        return _EulerTableau
    return solver.tableau if has_explicit_tableau(solver) else None


def num_inner_stages(tableau: Any) -> int:
    """How many stages the solution needs: all but one that the next step shares."""
    return tableau.num_stages - (1 if tableau.fsal else 0)


def stages(tableau: Any, product: Callable, t0, t1, y0, k0) -> list[PyTree]:
    r"""The stages $k_i$ that the solution needs, of which `k0` is the first.

    `product(t, y)` is the vector field times the control of the whole step.
    """
    inner = num_inner_stages(tableau)
    run = _unrolled if tableau.num_stages <= _MAX_UNROLLED_STAGES else _scanned
    return run(tableau, inner, product, t0, t1, y0, k0)


def _unrolled(tableau, inner, product, t0, t1, y0, k0) -> list[PyTree]:
    ks = [k0]
    for a, c in zip(tableau.a_lower[: inner - 1], tableau.c, strict=False):
        # No rounding error at the end of the step.
        t = t1 if c == 1 else t0 + float(c) * (t1 - t0)
        ks.append(product(t, advance_by(y0, a, ks)))
    return ks


def _scanned(tableau, inner, product, t0, t1, y0, k0) -> list[PyTree]:
    lower = np.zeros((inner - 1, inner))
    for i, row in enumerate(tableau.a_lower[: inner - 1]):
        lower[i, : i + 1] = row

    def stage(ks, inputs):
        a, c, index = inputs
        t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
        increment = jax.tree.map(
            lambda k: jnp.tensordot(a.astype(k.dtype), k, axes=1), ks
        )
        k = product(t, jax.tree.map(jnp.add, y0, increment))
        return jax.tree.map(lambda buffer, x: buffer.at[index].set(x), ks, k), None

    ks = jax.tree.map(lambda k: jnp.zeros((inner, *k.shape), k.dtype).at[0].set(k), k0)
    dtype = jnp.result_type(t0)
    c = jnp.asarray(tableau.c[: inner - 1], dtype)
    ks, _ = jax.lax.scan(
        stage, ks, (jnp.asarray(lower, dtype), c, jnp.arange(1, inner))
    )
    return [jax.tree.map(lambda k, i=i: k[i], ks) for i in range(inner)]


def combine(weights: np.ndarray, ks: list[PyTree]) -> PyTree[Array]:
    r"""$\sum_j w_j k_j$."""
    total = None
    for weight, k in zip(weights, ks, strict=True):
        if weight != 0:
            scaled = jax.tree.map(lambda x, w=float(weight): w * x, k)
            total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
    return total


def advance_by(y0: PyTree, weights: np.ndarray, ks: list[PyTree]) -> PyTree[Array]:
    r"""$y_0 + \sum_j w_j k_j$."""
    return jax.tree.map(jnp.add, y0, combine(weights, ks))
