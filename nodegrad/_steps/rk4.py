"""The classical Runge-Kutta method as a Diffrax solver."""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import numpy as np
from jaxtyping import Array, Bool, PyTree, Real


class RK4(diffrax.AbstractERK):
    r"""The classical fourth order Runge-Kutta method of Kutta (1901).

    $k_1 = f(t_0, y_0)$, $k_2 = f(t_0 + h/2, y_0 + h k_1/2)$,
    $k_3 = f(t_0 + h/2, y_0 + h k_2/2)$, $k_4 = f(t_1, y_0 + h k_3)$,
    $y_1 = y_0 + h (k_1 + 2 k_2 + 2 k_3 + k_4)/6$.

    This is a Diffrax solver. Use it in `nodegrad.odesolve` or `diffrax.diffeqsolve`,
    with a constant step size or `diffrax.StepTo`. Dense output is the cubic Hermite
    interpolant, of third order.

    **Arguments:** none.

    **Cost:** four vector field evaluations a step.

    **When not to use it:** with adaptive step sizes, as it has no error estimate.
    `diffrax.Tsit5()` is the better choice; `diffrax.HalfSolver(RK4())` also works.

    **Example:**

    ```python
    import jax.numpy as jnp
    import nodegrad

    decay = lambda t, y, args: -y
    y0 = jnp.array(1.0)
    sol = nodegrad.odesolve(decay, nodegrad.RK4(), t0=0.0, t1=2.0, dt0=0.1, y0=y0)
    print(sol.ys[0].round(4))  # 0.1353
    ```
    """

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.array([0.0, 0.0, 0.0, 0.0]),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree,
        args: PyTree,
        solver_state: PyTree,
        made_jump: bool | Bool[Array, ""],
    ) -> tuple[PyTree, None, dict[str, PyTree], PyTree, diffrax.RESULTS]:
        """Makes a step, as any Runge-Kutta solver does, without an error estimate."""
        # Diffrax's step would return the error estimate zero, with which an adaptive
        # controller accepts every step. With `None` it raises.
        y1, _, dense_info, solver_state, result = diffrax.AbstractERK.step(
            self, terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, None, dense_info, solver_state, result

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        """Returns 4, the order for ordinary differential equations."""
        del terms
        return 4
