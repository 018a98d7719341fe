r"""Rosenbrock methods for stiff equations: one linear system a stage, no iterations.

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


def _lower(rows: list[list[float]]) -> np.ndarray:
    """Returns the square matrix with these rows below its diagonal."""
    size = len(rows) + 1
    return np.array([row + [0.0] * (size - len(row)) for row in [[], *rows]])


def _rosenbrock23() -> RosenbrockTableau:
    """Returns the coefficients of Shampine and Reichelt, for stages without $J$."""
    gamma, e = 1 / (2 + np.sqrt(2)), 6 + np.sqrt(2)
    alpha = np.array([[0, 0, 0], [0.5, 0, 0], [0, 1.0, 0]])
    # The published stages are k = inverse(gammas) u. The third one is for the error.
    gammas = gamma * np.array([[1, 0, 0], [-1, 1, 0], [e - 2, -e, 1.0]])
    inverse = np.linalg.inv(gammas)
    near = 1 / (1 - 2 * gamma)
    rows = np.array([[0, 1, 0], [-1 / 6, 1 / 3, -1 / 6], [near, -near, 0]])
    m, error, dense = rows @ inverse
    a, g = alpha @ inverse, np.eye(3) / gamma - inverse
    c, d = alpha.sum(1), gammas.sum(1)
    return RosenbrockTableau(gamma, a, g, c, d, m, error, dense[None])


class Rosenbrock23(AbstractRosenbrock):
    r"""The Rosenbrock method of orders 2 and 3 of Shampine and Reichelt.

    For stiff equations and low accuracy; MATLAB has it under the name `ode23s`. With
    $\gamma = 1 / (2 + \sqrt 2)$ and $W = I - \gamma h J$, where $J$ and $f_t$ are the
    derivatives of the vector field at the start of the step,

    $$W k_1 = f(t_0, y_0) + \gamma h f_t, \quad
      W (k_2 - k_1) = f(t_0 + \tfrac{h}{2}, y_0 + \tfrac{h}{2} k_1) - k_1, \quad
      y_1 = y_0 + h k_2.$$

    The method is L-stable, and nothing is iterated. A third stage estimates the error.
    Dense output has order two.

    **Example:**

    ```python
    import diffrax
    import jax
    import jax.numpy as jnp
    import nodegrad

    relax = lambda t, y, rate: -rate * (y - jnp.cos(t))
    solve = lambda rate: nodegrad.odesolve(
        relax, nodegrad.Rosenbrock23(), 0.0, 1.0, None, 0.0, rate,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-5),
    )
    sol = solve(1e4)
    print(sol.ys[0].round(3), sol.stats["num_steps"] < 100)  # 0.54 True
    print(jax.grad(lambda rate: solve(rate).ys[0])(100.0).round(5))  # -8e-05
    ```

    **Arguments:** none.

    **Raises:** `ValueError` for stochastic equations and for complex states.

    **Cost:** for a state of $n$ numbers, each step evaluates the vector field three
    times, pushes $n + 1$ tangents through it for $J$ and $f_t$, factorises one
    $n \times n$ matrix and solves with it three times. The pullback makes the step
    again, and solves with the transpose. Nothing is iterated.

    **When not to use it:** for large systems (the matrix is dense), for high accuracy
    (`nodegrad.Rodas5P`), and for equations that are not stiff (`diffrax.Tsit5`).

    ??? cite "Reference"

        Shampine, Reichelt: The MATLAB ODE suite, SIAM Journal on Scientific Computing
        18, 1997, section 3.
    """

    tableau: ClassVar[RosenbrockTableau] = _rosenbrock23()

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        """Returns 2."""
        del terms
        return 2

    def error_order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        """Returns 3: the estimate is that of the local error of order 3."""
        del terms
        return 3


# The last three stages, and the solution, add weights of one to these.
# fmt: off
_A6 = [-7.502846399306121, 2.561846144803919, -11.627539656261098,
       -0.18268767659942256, 0.030198172008377946]
_RODAS5P = RosenbrockTableau(
    gamma=0.21193756319429014,
    a=_lower([
        [3.0],
        [2.849394379747939, 0.45842242204463923],
        [-6.954028509809101, 2.489845061869568, -10.358996098473584],
        [2.8029986275628964, 0.5072464736228206, -0.3988312541770524,
         -0.04721187230404641],
        _A6, [*_A6, 1.0], [*_A6, 1.0, 1.0],
    ]),
    g=_lower([
        [-14.155112264123755],
        [-17.97296035885952, -2.859693295451294],
        [147.12150275711716, -1.41221402718213, 71.68940251302358],
        [165.43517024871676, -0.4592823456491126, 42.90938336958603,
         -5.961986721573306],
        [24.854864614690072, -3.0009227002832186, 47.4931110020768,
         5.5814197821558125, -0.6610691825249471],
        [30.91273214028599, -3.1208243349937974, 77.79954646070892,
         34.28646028294783, -19.097331116725623, -28.087943162872662],
        [37.80277123390563, -3.2571969029072276, 112.26918849496327,
         66.9347231244047, -40.06618937091002, -54.66780262877968,
         -9.48861652309627],
    ]),
    c=np.array([0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716,
                0.4288403609558664, 1, 1, 1]),
    d=np.array([0.21193756319429014, -0.42387512638858027, -0.3384627126235924,
                1.8046452872882734, 2.325825639765069, 0, 0, 0]),
    m=np.array([*_A6, 1.0, 1.0, 1.0]),
    error=np.array([0, 0, 0, 0, 0, 0, 0, 1.0]),
    dense=np.array([
        [25.948786856663858, -2.5579724845846235, 10.433815404888879,
         -2.3679251022685204, 0.524948541321073, 1.1241088310450404,
         0.4272876194431874, -0.17202221070155493],
        [-9.91568850695171, -0.9689944594115154, 3.0438037242978453,
         -24.495224566215796, 20.176138334709044, 15.98066361424651,
         -6.789040303419874, -6.710236069923372],
        [11.419903575922262, 2.8879645146136994, 72.92137995996029,
         80.12511834622643, -52.072871366152654, -59.78993625266729,
         -0.15582684282751913, 4.883087185713722],
    ]),
)
# fmt: on


class Rodas5P(AbstractRosenbrock):
    r"""The Rosenbrock method of order 5 of Steinebach, with eight stages.

    For stiff equations and medium to high accuracy. Each stage solves a linear system
    with the same matrix $\frac{1}{\gamma} I - h J$, where $J$ is the Jacobian at the
    start of the step. The method is L-stable, of order 5 with an embedded one of order
    4. Dense output has order 4 too.

    **Example:**

    ```python
    import diffrax
    import jax
    import jax.numpy as jnp
    import nodegrad

    jax.config.update("jax_enable_x64", True)

    def van_der_pol(t, y, mu):
        return jnp.stack([y[1], mu * ((1 - y[0] ** 2) * y[1] - y[0])])

    solve = lambda mu: nodegrad.odesolve(
        van_der_pol, nodegrad.Rodas5P(), 0.0, 0.5, None, jnp.array([2.0, 0.0]), mu,
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
    )
    value, gradient = jax.value_and_grad(lambda mu: solve(mu).ys[0, 0])(1e3)
    print(value.round(6), jnp.round(1e6 * gradient, 3))  # 1.597324 -0.554
    ```

    **Arguments:** none.

    **Raises:** `ValueError` for stochastic equations and for complex states.

    **Cost:** as `nodegrad.Rosenbrock23`, with eight evaluations of the vector field and
    eight solves a step.

    **When not to use it:** for large systems (the matrix is dense), for low accuracy
    (`nodegrad.Rosenbrock23`), and for equations that are not stiff (`diffrax.Tsit5`).

    ??? cite "Reference"

        Steinebach: Construction of Rosenbrock-Wanner method Rodas5P and numerical
        benchmarks within the Julia Differential Equations package, BIT Numerical
        Mathematics 63, 2023.
    """

    tableau: ClassVar[RosenbrockTableau] = _RODAS5P

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        """Returns 5."""
        del terms
        return 5
