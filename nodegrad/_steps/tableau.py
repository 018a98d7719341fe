"""Explicit Butcher tableaus, and the evaluation of their stages."""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._internal.compat import Jaxpr
from .._internal.tree import set_row
from .rk4 import RK4
from .work import products_dominate


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


def is_scanned(tableau: Any, product: Jaxpr) -> bool:
    """Whether to evaluate the stages in a loop, given the vector field that they use.

    XLA's compiler for CPUs fuses operations on single elements, and computes again in
    each of the fused kernels what they share: the cost of unrolled stages, and of their
    pullback above all, grows explosively with their number. A loop is what stops a
    fusion. (2048 samples of the Lorenz equations, Tsit5, a step and its pullback: 9.4
    ms unrolled, 0.4 ms in loops.) Products of matrices are not fused; a vector field
    that mostly consists of these is better unrolled.
    """
    return tableau.num_stages > _MAX_UNROLLED_STAGES or not products_dominate(product)


def stages(tableau: Any, product: Callable, t0, t1, y0, k0=None) -> list[PyTree]:
    r"""The stages $k_i$ that the solution needs, of which `k0` is the first if given.

    `product(t, y)` is the vector field times the control of the whole step.
    """
    num = num_inner_stages(tableau)
    if tableau.num_stages > _MAX_UNROLLED_STAGES:
        ks, _ = scanned_stages(tableau, num, product, t0, t1, y0, k0)
        return unstacked(ks, num)
    # Tracing the vector field once serves every stage.
    run = jax.jit(product)
    ks = [run(t0, y0) if k0 is None else k0]
    for a, c in zip(tableau.a_lower[: num - 1], tableau.c, strict=False):
        # No rounding error at the end of the step.
        t = t1 if c == 1 else t0 + float(c) * (t1 - t0)
        ks.append(run(t, advance_by(y0, a, ks)))
    return ks


def scanned_stages(
    tableau: Any, num: int, product: Callable, t0, t1, y0: PyTree, k0: PyTree = None
) -> tuple[PyTree[Array], PyTree[Array]]:
    """The first `num` stages, and the states they are evaluated at.

    Arrays with one more axis in front, for the stages. With `k0` the states lack the
    first one.
    """
    a, c = coefficients(tableau, num, jnp.result_type(t0))
    first = 0 if k0 is None else 1

    def stage(ks, inputs):
        index, a, c = inputs
        state = jax.tree.map(functools.partial(add_weighted, a), y0, ks)
        return set_row(ks, index, product(stage_time(c, t0, t1), state)), state

    ks = jax.tree.map(lambda y: jnp.zeros((num, *y.shape), y.dtype), y0)
    if k0 is not None:
        ks = set_row(ks, 0, k0)
    inputs = jnp.arange(first, num), a[first:], c[first:]
    return jax.lax.scan(stage, ks, inputs)


def add_weighted(weights: Array, x: Array, rows: Array) -> Array:
    """`x` plus the weighted sum of `rows`."""
    # Some accelerators multiply matrices in less than the precision of their entries.
    precision = jax.lax.Precision.HIGHEST
    return x + jnp.tensordot(weights.astype(rows.dtype), rows, 1, precision=precision)


def stage_time(c: Array, t0: Array, t1: Array) -> Array:
    """The time of the stage with node `c`."""
    # No rounding error at the end of the step.
    return jnp.where(c == 1, t1, t0 + c * (t1 - t0))


def coefficients(tableau: Any, num: int, dtype: Any) -> tuple[Array, Array]:
    """The matrix and the nodes of the first `num` stages."""
    a = np.zeros((num, num))
    for i, row in enumerate(tableau.a_lower[: num - 1], start=1):
        a[i, :i] = row
    c = np.concatenate([[0.0], tableau.c[: num - 1]])
    return jnp.asarray(a, dtype), jnp.asarray(c, dtype)


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


def stacked(ks: list[PyTree], axis: int = 0) -> PyTree[Array]:
    """The stages as one array with a new axis."""
    return jax.tree.map(lambda *k: jnp.stack(k, axis), *ks)


def unstacked(rows: PyTree[Array], num: int) -> list[PyTree]:
    """The inverse of `stacked`."""
    return [jax.tree.map(lambda k, i=i: k[i], rows) for i in range(num)]
