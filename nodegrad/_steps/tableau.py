"""Reads explicit Butcher tableaus and evaluates their stages."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Real

from .._internal.batch import set_row
from .._internal.closure_convert import as_struct
from .._internal.compat import Jaxpr
from .._layers.work import products_dominate
from .explicit_methods import RK4


# Tableaus with more stages are always scanned. Unrolled stages run faster, but the time
# to compile them, and with many stages that of their pullback as well, grows with their
# number. On CPUs unrolling paid for Tsit5 (7 stages) and not for Dopri8 (14 stages).
_MAX_UNROLLED_STAGES = 7


class _EulerTableau:
    """The tableau of Euler's method: `diffrax.ButcherTableau` needs two stages or more.

    It has the attributes of that class that this package reads.
    """

    num_stages = 1
    fsal = False
    a_lower = ()
    b_sol = np.array([1.0])
    b_error = np.array([0.0])
    c = np.array([])


# An explicit tableau. Both classes have `num_stages`, `fsal`, `a_lower`, `b_sol`,
# `b_error` and `c`; `Any`, because they have no base class in common.
Tableau = Any


def has_explicit_tableau(solver: Any) -> TypeGuard[diffrax.AbstractERK]:
    """Whether `solver` is an explicit Runge-Kutta method, fully given by its tableau.

    `isinstance` is also true of a wrapper, such as `diffrax.HalfSolver`, around one.
    """
    # A subclass with another `step` does not do what its tableau says.
    cls = type(solver)
    return issubclass(cls, diffrax.AbstractERK) and cls.step in (
        diffrax.AbstractERK.step,
        RK4.step,
    )


def explicit_tableau(solver: Any) -> Tableau | None:
    """Returns the tableau of an explicit Runge-Kutta method or Euler; else `None`."""
    if type(solver) is diffrax.Euler:
        return _EulerTableau
    return solver.tableau if has_explicit_tableau(solver) else None


def num_inner_stages(tableau: Tableau) -> int:
    """Returns how many stages `y1` needs: all but one that the next step shares."""
    return tableau.num_stages - (1 if tableau.fsal else 0)


def is_scanned(tableau: Tableau, product: Jaxpr, differentiated: bool = True) -> bool:
    """Whether to evaluate the stages in a loop; `product` is the traced vector field.

    `differentiated` says whether the stages are pulled back, too.

    XLA's compiler for CPUs fuses elementwise operations, and every fused kernel
    computes the values that it shares with other kernels again. So the cost of unrolled
    stages, and of their pullback above all, grows much faster than their number. A loop
    ends a fusion. `scripts/benchmarks/ensembles.py` has such problems, the Lorenz
    equations for one. Matrix products are not fused, so a vector field that mostly
    consists of them is better unrolled.

    Without a pullback it is the other way round. Fused stages of cheap operations are
    faster (2048 solves of the Lorenz equations: 14 ms, and 21 ms with a loop). Those of
    matrix products take the same time in a loop, which compiles faster.

    On a GPU every iteration of a loop costs launches of kernels, and unrolled stages
    are faster: on an H100 the gradient of 2048 solves of the Lorenz equations takes 7
    ms, and 17 ms with a loop. The program is taken to run on JAX's default backend: a
    trace does not know where it will run, and only speed depends on it.
    """
    if tableau.num_stages > _MAX_UNROLLED_STAGES:
        return True
    on_gpu = jax.default_backend() == "gpu"
    return not on_gpu and products_dominate(product) != differentiated


def stages(
    tableau: Tableau,
    product: Callable[..., PyTree[Array]],
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    y0: PyTree[Array],
    k0: PyTree[Array] = None,
    scanned: bool = False,
) -> list[PyTree[Array]]:
    r"""Returns the stages $k_i$ that $y_1$ needs, each with the shape of `y0`.

    `product(t, y)` is the vector field times the control of the whole step. `k0` is the
    first stage, or `None` to evaluate it. `scanned` asks for a loop over the stages;
    many stages always are one.
    """
    num = num_inner_stages(tableau)
    if scanned or tableau.num_stages > _MAX_UNROLLED_STAGES:
        ks, _ = scanned_stages(tableau, num, product, t0, t1, y0, k0)
        return unstacked(ks, num)
    # `jit` traces the vector field once for all stages.
    run = jax.jit(product)
    ks = [run(t0, y0) if k0 is None else k0]
    # `a_lower` and `c` start with the second stage; `c` has further entries.
    for a, c in zip(tableau.a_lower[: num - 1], tableau.c, strict=False):
        # `t0 + (t1 - t0)` may differ from `t1` by rounding.
        t = t1 if c == 1 else t0 + float(c) * (t1 - t0)
        ks.append(run(t, advance_by(y0, a, ks)))
    return ks


def stages_alone(
    tableau: Tableau,
    product: Callable[..., PyTree[Array]],
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    y0: PyTree[Array],
    k0: PyTree[Array] = None,
) -> list[PyTree[Array]]:
    """Returns what `stages` returns, for a step that is not differentiated."""
    # `jit` traces the vector field once, for its kind and for all stages.
    run = jax.jit(product)
    jaxpr, first = jax.make_jaxpr(run, return_shape=True)(t0, y0)
    # A loop would cast stages of another type, such as complex ones, to that of `y0`.
    fits = jax.tree.leaves(as_struct(first)) == jax.tree.leaves(as_struct(y0))
    scanned = fits and is_scanned(tableau, jaxpr.jaxpr, False)
    return stages(tableau, run, t0, t1, y0, k0, scanned)


def scanned_stages(
    tableau: Tableau,
    num: int,
    product: Callable[..., PyTree[Array]],
    t0: Real[Array, "..."],
    t1: Real[Array, "..."],
    y0: PyTree[Array],
    k0: PyTree[Array] = None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Returns the first `num` stages, and the states they are evaluated at.

    Both have the shape of `y0` after a first axis of stages. Times and states may have
    batch axes. If the first stage `k0` is given, the states start with the second one.
    """
    a, c = coefficients(tableau, num, jnp.result_type(t0))
    first = 0 if k0 is None else 1

    # `ks` has zeros for stages to come, and their weights in `a` are zero too.
    def stage(
        ks: PyTree[Array], inputs: tuple[Any, Array, Array]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        index, a, c = inputs
        state = jax.tree.map(functools.partial(add_weighted, a), y0, ks)
        return set_row(ks, index, product(stage_time(c, t0, t1), state)), state

    ks = jax.tree.map(lambda y: jnp.zeros((num, *y.shape), y.dtype), y0)
    if k0 is not None:
        ks = set_row(ks, 0, k0)
    # An array of NumPy is a constant. XLA compiles a kernel for one of JAX.
    inputs = np.arange(first, num), a[first:], c[first:]
    return jax.lax.scan(stage, ks, inputs)


class TwoRegisters(NamedTuple):
    r"""Coefficients with which a step needs two registers instead of all its stages.

    Williamson (1980): with $d_0 = 0$ and $w_1 = 0$,

    $$d_i = A_i d_{i-1} + k_i, \qquad w_{i+1} = w_i + B_i d_i, \qquad
      Y_i = y_0 + w_i,$$

    and $w_{s+1}$ is the increment. So $B_i$ is the entry of the tableau below the
    diagonal, and $B_i A_i$ is the change of the weight of $k_{i-1}$ in stage $i$.
    """

    a: np.ndarray
    b: np.ndarray


def two_registers(tableau: Tableau) -> TwoRegisters | None:
    """Returns the coefficients of the form with two registers; `None` without one."""
    num = num_inner_stages(tableau)
    # Row `i` has the weights of the stages in $Y_i$, the last one those in $y_1$.
    rows = np.vstack([stage_weights(tableau, num), tableau.b_sol[:num]])
    a, b = np.zeros(num), np.diag(rows[1:]).copy()
    if np.any(b == 0):
        return None
    a[1:] = np.diag(rows[2:] - rows[1:-1]) / b[1:]
    # The weights of the stages in `w` and in `d`.
    w, d = np.zeros(num), np.zeros(num)
    for i in range(num):
        d = a[i] * d + np.eye(num)[i]
        w = w + b[i] * d
        if not np.allclose(w, rows[i + 1], rtol=0, atol=1e-15):
            return None
    return TwoRegisters(a, b)


def two_register_stages(
    registers: TwoRegisters,
    c: Array,
    product: Callable[..., PyTree[Array]],
    t0: Real[Array, "..."],
    t1: Real[Array, "..."],
    y0: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
    """Returns the increment, the stages, and the states they are evaluated at.

    `c` are the nodes. The arguments and the last two results are those of
    `scanned_stages`; XLA does not compute those that are not used.
    """

    def stage(
        carry: tuple[PyTree[Array], PyTree[Array]], inputs: tuple[Array, Array, Array]
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree]]:
        w, d = carry
        a, b, c = inputs
        state = jax.tree.map(jnp.add, y0, w)
        k = product(stage_time(c, t0, t1), state)
        # With more precise times than states, a stage may be more precise, too.
        k = jax.tree.map(lambda k, y: k.astype(y.dtype), k, state)
        d = jax.tree.map(functools.partial(scale_and_add, a), d, k)
        return (jax.tree.map(functools.partial(scale_and_add, b), d, w), d), (k, state)

    zero = jax.tree.map(jnp.zeros_like, y0)
    inputs = jnp.asarray(registers.a, c.dtype), jnp.asarray(registers.b, c.dtype), c
    (w, _), (ks, states) = jax.lax.scan(stage, (zero, zero), inputs)
    return w, ks, states


def scale_and_add(factor: Array, x: Array, y: Array) -> Array:
    """Returns `factor * x + y`, in the dtype of `x`."""
    return factor.astype(x.dtype) * x + y


def add_weighted(weights: Array, x: Array, rows: Array) -> Array:
    """Returns `x + sum_j weights[j] * rows[j]`; `rows` is `(stages, *x.shape)`."""
    # By default some accelerators multiply float32 matrices with a lower precision.
    precision = jax.lax.Precision.HIGHEST
    return x + jnp.tensordot(weights.astype(rows.dtype), rows, 1, precision=precision)


def stage_time(c: Array, t0: Array, t1: Array) -> Array:
    """Returns the time of the stage with node `c`."""
    # `t0 + (t1 - t0)` may differ from `t1` by rounding.
    return jnp.where(c == 1, t1, t0 + c * (t1 - t0))


def coefficients(
    tableau: Tableau, num: int, dtype: Any
) -> tuple[Real[Array, "stages stages"], Real[Array, " stages"]]:
    """Returns the matrix $A$ and the nodes $c$ of the first `num` stages."""
    c = np.concatenate([[0.0], tableau.c[: num - 1]])
    return jnp.asarray(stage_weights(tableau, num), dtype), jnp.asarray(c, dtype)


def stage_weights(tableau: Tableau, num: int) -> np.ndarray:
    """Returns the matrix $A$ of the first `num` stages, of shape `(num, num)`."""
    a = np.zeros((num, num))
    for i, row in enumerate(tableau.a_lower[: num - 1], start=1):
        a[i, :i] = row
    return a


def combine(weights: np.ndarray, ks: list[PyTree]) -> PyTree[Array]:
    r"""Returns $\sum_j w_j k_j$; `None` if all weights are zero."""
    # Leaving out zero weights saves work, and a NaN in such a stage does no harm.
    total = None
    for weight, k in zip(weights, ks, strict=True):
        if weight != 0:
            scaled = jax.tree.map(lambda x, w=float(weight): w * x, k)
            total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
    return total


def advance_by(y0: PyTree, weights: np.ndarray, ks: list[PyTree]) -> PyTree[Array]:
    r"""Returns $y_0 + \sum_j w_j k_j$."""
    return jax.tree.map(jnp.add, y0, combine(weights, ks))


def stacked(ks: list[PyTree], axis: int = 0) -> PyTree[Array]:
    """Returns the stages `ks` as one array with a new axis."""
    return jax.tree.map(lambda *k: jnp.stack(k, axis), *ks)


def unstacked(rows: PyTree[Array], num: int) -> list[PyTree]:
    """Returns the `num` rows along the first axis: the inverse of `stacked`."""
    return [jax.tree.map(lambda k, i=i: k[i], rows) for i in range(num)]
