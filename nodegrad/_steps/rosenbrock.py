r"""Makes a step of a Rosenbrock method: one linear system a stage, and no iterations.

With $J$ and $f_t$ for the derivatives of the vector field at $(t_0, y_0)$, a step is

$$(\tfrac{1}{\gamma} I - h J)\, u_i = h f(t_0 + c_i h,\, y_0 + \textstyle\sum_{j<i}
  a_{ij} u_j) + \sum_{j<i} g_{ij} u_j + d_i h^2 f_t, \qquad
  y_1 = y_0 + \sum_i m_i u_i.$$

The matrix is the same for all stages, and factorised once. The stages are linear
combinations of those of the usual form of a Rosenbrock method (Hairer and Wanner:
Solving Ordinary Differential Equations II, section IV.7), without products with $J$.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Real

from .._internal.batch import set_row
from .._internal.compat import is_sde
from .._internal.tree import flatten
from .tableau import add_weighted, stage_time


@dataclasses.dataclass(frozen=True)
class RosenbrockTableau:
    r"""The coefficients of a Rosenbrock method with $s$ stages, as NumPy arrays.

    - `gamma`, `a`, `g`, `c`, `d`, `m`: see above; `a` and `g` are strictly lower
      triangular, `(s, s)`, the others `(s,)`.
    - `error`: the error estimate is $\sum_i e_i u_i$.
    - `dense`: $p$, rows `(rows, s)`. Inside of the step $y(\theta) = (1 - \theta) y_0
      + \theta (y_1 + (1 - \theta) \sum_l \theta^{l-1} K_l)$, $K_l = \sum_i p_{li} u_i$.
    """

    gamma: float
    a: np.ndarray
    g: np.ndarray
    c: np.ndarray
    d: np.ndarray
    m: np.ndarray
    error: np.ndarray
    dense: np.ndarray


class RosenbrockInterpolation(diffrax.AbstractLocalInterpolation):
    """The polynomial inside of a step; see `RosenbrockTableau`. `k` has its rows."""

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    y0: PyTree[Array]
    y1: PyTree[Array]
    k: PyTree[Array]

    def evaluate(
        self, t0: Real[Array, ""], t1: Real[Array, ""] | None = None, left: bool = True
    ) -> PyTree[Array]:
        del left
        if t1 is not None:
            difference = lambda end, start: end - start
            return jax.tree.map(difference, self.evaluate(t1), self.evaluate(t0))
        # Without a step there is no time inside of it, and no NaN either.
        length = jnp.where(self.t1 == self.t0, 1, self.t1 - self.t0)
        theta = (t0 - self.t0) / length

        def polynomial(y0: Array, y1: Array, k: Array) -> Array:
            x = jnp.asarray(theta, y0.dtype)
            inside = ft.reduce(lambda total, row: total * x + row, k[::-1])
            return (1 - x) * y0 + x * (y1 + (1 - x) * inside)

        return jax.tree.map(polynomial, self.y0, self.y1, self.k)


class AbstractRosenbrock(diffrax.AbstractAdaptiveSolver):
    """A Rosenbrock method, given by its tableau."""

    tableau: eqx.AbstractClassVar[RosenbrockTableau]

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.AbstractLocalInterpolation]] = (
        RosenbrockInterpolation
    )

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        args: PyTree,
    ) -> None:
        """Checks the equation. There is no solver state."""
        del t0, t1, args
        name = type(self).__name__
        if is_sde(terms):
            msg = (
                f"`nodegrad.{name}` is for ordinary and controlled equations without "
                "noise."
            )
            raise ValueError(msg)
        if any(jnp.iscomplexobj(y) for y in jax.tree.leaves(y0)):
            msg = (
                f"`nodegrad.{name}` needs a real state, since it solves with the "
                "Jacobian of the vector field; got a complex one. Solve for its real "
                "and imaginary parts."
            )
            raise ValueError(msg)

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        args: PyTree,
        solver_state: None,
        made_jump: bool | Bool[Array, ""],
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], None, Any]:
        """Makes a step, as `diffrax.AbstractSolver.step` does."""
        del solver_state, made_jump
        dtypes = [y.dtype for y in jax.tree.leaves(y0)]
        flat0, unflatten = flatten(y0, ft.reduce(jnp.promote_types, dtypes, dtypes[0]))
        control = terms.contr(t0, t1)

        def product(t: Real[Array, ""], y: Float[Array, " n"]) -> Float[Array, " n"]:
            f = terms.vf_prod(t, unflatten(y), args, control)
            return flatten(f, y.dtype)[0]

        us = self._stages(product, jnp.asarray(t0), jnp.asarray(t1), flat0)
        tableau = self.tableau
        weigh = lambda w: add_weighted(jnp.asarray(w), jnp.zeros_like(flat0), us)
        y1 = unflatten(flat0 + weigh(tableau.m))
        # One row of the polynomial after another; each has the structure of a state.
        rows = [unflatten(weigh(row)) for row in tableau.dense]
        k = jax.tree.map(lambda *rows: jnp.stack(rows), *rows)
        dense_info = dict(y0=y0, y1=y1, k=k)
        error = unflatten(weigh(tableau.error))
        return y1, error, dense_info, None, diffrax.RESULTS.successful

    def _stages(
        self,
        product: Callable[..., Float[Array, " n"]],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: Float[Array, " n"],
    ) -> Float[Array, "stages n"]:
        """Returns the $u_i$; `product(t, y)` is the vector field times the control."""
        n, tableau = y0.size, self.tableau
        # One pass forward for all derivatives: by the time, and by every entry of `y0`.
        times = jnp.zeros(n + 1, t0.dtype).at[0].set(t1 - t0)
        states = jnp.eye(n + 1, n, -1, dtype=y0.dtype)
        push = lambda t, y: jax.jvp(product, (t0, y0), (t, y))
        f0, columns = jax.vmap(push, out_axes=(None, 1))(times, states)
        f_t, jacobian = columns[:, 0], columns[:, 1:]
        matrix = jnp.eye(n, dtype=y0.dtype) / float(tableau.gamma) - jacobian
        # The rule for derivatives uses `matrix`, and the factors as they are.
        factors = jax.lax.stop_gradient(jax.scipy.linalg.lu_factor(matrix))

        def solve(rhs: Float[Array, " n"]) -> Float[Array, " n"]:
            # A singular matrix makes a NaN, with which a controller rejects the step.
            # (Lineax would raise an error where only a tangent is not finite.)
            return jax.lax.custom_linear_solve(
                lambda v: matrix @ v,
                rhs,
                lambda _, b: jax.scipy.linalg.lu_solve(factors, b),
                lambda _, b: jax.scipy.linalg.lu_solve(factors, b, trans=1),
            )

        def stage(us: Float[Array, "stages n"], row: tuple[Array, ...]):
            index, a, g, c, d = row
            f = product(stage_time(c, t0, t1), add_weighted(a, y0, us))
            return set_row(us, index, solve(add_weighted(g, f, us) + d * f_t)), None

        # A loop, so that the vector field is compiled once and not for every stage.
        us = jnp.zeros((len(tableau.m), n), y0.dtype)
        us = set_row(us, 0, solve(f0 + float(tableau.d[0]) * f_t))
        index = np.arange(1, len(tableau.m))
        numbers = ft.partial(jnp.asarray, dtype=y0.dtype)
        a, g, d = (numbers(x[1:]) for x in (tableau.a, tableau.g, tableau.d))
        rows = jnp.asarray(index), a, g, jnp.asarray(tableau.c[1:], t0.dtype), d
        return jax.lax.scan(stage, us, rows)[0]

    def func(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        y0: PyTree[Array],
        args: PyTree,
    ) -> PyTree[Array]:
        """Returns the vector field."""
        return terms.vf(t0, y0, args)
