"""Linear stability of solvers, in closed form."""

from typing import Any

import diffrax
import numpy as np

from .._steps.tableau import explicit_tableau
from .alf import ALF
from .reversible import Reversible


def stability_polynomial(solver: diffrax.AbstractSolver) -> np.ndarray:
    r"""The polynomial $R$ by which a step multiplies the solution of $y' = a y$.

    With $z = h a$ and the tableau $(A, b, c)$ of `solver`,
    $R(z) = 1 + \sum_{k \ge 1} (b^\top A^{k-1} 1)\, z^k$.

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method; of `nodegrad.Reversible(solver)` it is
      the polynomial of the `solver` inside.

    **Returns:** the coefficients from the lowest to the highest, as for
    `numpy.polynomial.Polynomial`.

    **Raises:** `TypeError` for other solvers.

    **Cost:** arithmetic with the tableau, in double precision; nothing is compiled.
    """
    inner = solver.solver if type(solver) is Reversible else solver
    tableau = explicit_tableau(inner)
    if tableau is None:
        msg = (
            "`stability_polynomial` and `is_stable` are for explicit Runge-Kutta "
            f"methods, plain or coupled, and for `nodegrad.ALF`; got {solver}."
        )
        raise TypeError(msg)
    size = tableau.num_stages
    lower = np.zeros((size, size))
    for i, row in enumerate(tableau.a_lower):
        lower[i + 1, : i + 1] = row
    coefficients, column = [1.0], np.ones(size)
    for _ in range(size):
        coefficients.append(float(tableau.b_sol @ column))
        column = lower @ column
    return np.trim_zeros(np.array(coefficients), "b")


def is_stable(
    solver: diffrax.AbstractSolver, z: Any, coupling_parameter: float | None = None
) -> np.ndarray:
    r"""Whether `solver` is stable on $y' = a y$ with steps of size $h$, for $z = h a$.

    - A Runge-Kutta method: $\lvert R(z) \rvert < 1$, with `stability_polynomial` $R$.
    - Coupled with parameter $\lambda$: one step is a matrix of determinant $\lambda$
      and trace $\tau(z) = 1 + \lambda - (1 - \lambda) P(-z) - P(z) P(-z)$ with
      $P = R - 1$, and both its eigenvalues lie in the unit disc if and only if $\tau$
      lies in the ellipse
      $(\mathrm{Re}\,\tau / (1 + \lambda))^2 + (\mathrm{Im}\,\tau / (1 - \lambda))^2$
      $< 1$.
    - `nodegrad.ALF` with damping $\eta$ and $r = (1 - \eta) / \eta$: the ellipse
      $((\mathrm{Re}\,z + r) / r)^2 + (\mathrm{Im}\,z)^2 < 1$.

    For $\lambda = 1$ and $\eta = 1$ the ellipses are segments, on which nothing grows
    and nothing decays; these count as stable. With `resync_every` the question is
    that of the `solver` inside.

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method, `nodegrad.Reversible` or `nodegrad.ALF`.
    - `z`: complex numbers, an array of any shape.
    - `coupling_parameter`: of the coupling of a plain `solver`.

    **Returns:** an array of booleans in the shape of `z`.

    **Raises:** `TypeError` for other solvers, `ValueError` if there are two coupling
    parameters.

    **Cost:** arithmetic in double precision; nothing is compiled.

    ??? cite "Reference"

        McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs,
        2024, arXiv:2410.11648, section 2.3, for real $z$.
    """
    z = np.asarray(z, dtype=complex)
    if isinstance(solver, ALF):
        return _is_in_leapfrog_ellipse(z, solver.damping)
    if type(solver) is Reversible:
        if coupling_parameter is not None:
            msg = "`coupling_parameter` is for a plain solver: this one has its own."
            raise ValueError(msg)
        coupling_parameter = solver.coupling_parameter
    polynomial = np.polynomial.Polynomial(stability_polynomial(solver))
    if coupling_parameter is None:
        return np.abs(polynomial(z)) < 1
    forward, backward = polynomial(z) - 1, polynomial(-z) - 1
    apart = 1 - coupling_parameter
    trace = 1 + coupling_parameter - apart * backward - forward * backward
    return _is_in_ellipse(trace, 1 + coupling_parameter, apart)


def _is_in_leapfrog_ellipse(z: Any, damping: float) -> np.ndarray:
    if damping == 1:
        return (z.real == 0) & (np.abs(z.imag) < 1)
    radius = (1 - damping) / damping
    return _is_in_ellipse(z + radius, radius, 1.0)


def _is_in_ellipse(w: Any, real: float, imaginary: float) -> np.ndarray:
    if imaginary == 0:
        return (w.imag == 0) & (np.abs(w.real) < real)
    return (w.real / real) ** 2 + (w.imag / imaginary) ** 2 < 1
