"""The classical Runge-Kutta method as a Diffrax solver."""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import numpy as np


class RK4(diffrax.AbstractERK):
    r"""The classical fourth order Runge-Kutta method of Kutta (1901).

    $k_1 = f(t_0, y_0)$, $k_2 = f(t_0 + h/2, y_0 + h k_1/2)$,
    $k_3 = f(t_0 + h/2, y_0 + h k_2/2)$, $k_4 = f(t_1, y_0 + h k_3)$,
    $y_1 = y_0 + h (k_1 + 2 k_2 + 2 k_3 + k_4)/6$.

    A Diffrax solver: use it in `nodegrad.odesolve` or `diffrax.diffeqsolve`, with a
    constant step size or `diffrax.StepTo`. It has no embedded error estimate; wrap it
    as `diffrax.HalfSolver(RK4())` for adaptive steps, or better take `diffrax.Tsit5`.
    Dense output is the cubic Hermite interpolant (third order).

    **Arguments:** none.

    **Cost:** four vector field evaluations a step.
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

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """As for any Runge-Kutta solver, but honest about having no error estimate."""
        y1, _, dense_info, solver_state, result = diffrax.AbstractERK.step(
            self, terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, None, dense_info, solver_state, result

    def order(self, terms):
        """Fourth order for ordinary differential equations."""
        del terms
        return 4
