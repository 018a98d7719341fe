"""Two Rosenbrock methods for stiff equations, as Diffrax solvers."""

from typing import ClassVar

import diffrax
import numpy as np
from jaxtyping import PyTree

from .rosenbrock import AbstractRosenbrock, RosenbrockTableau


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
