"""Linear stability of solvers, in closed form."""

from collections.abc import Sequence

import diffrax
import numpy as np
from numpy.typing import NDArray

from .._reversible.alf import ALF
from .._reversible.reversible import Reversible
from .._steps.tableau import explicit_tableau, stage_weights


def stability_polynomial(solver: diffrax.AbstractSolver) -> np.ndarray:
    r"""The stability polynomial $R$: a step on $y' = a y$ multiplies $y$ by $R(h a)$.

    With $z = h a$ and the tableau $(A, b, c)$ of `solver`,
    $R(z) = 1 + \sum_{k \ge 1} (b^\top A^{k-1} 1)\, z^k$.

    **Example:**

    ```python
    import diffrax
    import nodegrad

    print(nodegrad.stability_polynomial(diffrax.Heun()))  # [1.  1.  0.5]
    ```

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method. For `nodegrad.Reversible(solver)` the
      result is the polynomial of the `solver` inside.

    **Returns:** the coefficients from the lowest power to the highest, as for
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
    lower = stage_weights(tableau, size)
    # Column `k` is $A^k 1$. Trailing zeros are those of stages that `b` does not use.
    coefficients, column = [1.0], np.ones(size)
    for _ in range(size):
        coefficients.append(float(tableau.b_sol @ column))
        column = lower @ column
    return np.trim_zeros(np.array(coefficients), "b")


def is_stable(
    solver: diffrax.AbstractSolver,
    z: float | complex | Sequence[float | complex] | np.ndarray,
    coupling_parameter: float | None = None,
) -> np.ndarray:
    r"""Whether `solver` is stable on $y' = a y$ with steps of size $h$, for $z = h a$.

    - A Runge-Kutta method is stable if $\lvert R(z) \rvert < 1$, with $R$ the
      `stability_polynomial`.
    - Coupled with parameter $\lambda$, one step is a matrix of determinant $\lambda$
      and trace $\tau(z) = 1 + \lambda - (1 - \lambda) P(-z) - P(z) P(-z)$ with
      $P = R - 1$, and both its eigenvalues lie in the unit disc if and only if $\tau$
      lies in the ellipse
      $(\mathrm{Re}\,\tau / (1 + \lambda))^2 + (\mathrm{Im}\,\tau / (1 - \lambda))^2$
      $< 1$.
    - `nodegrad.ALF` with damping $\eta$ and $r = (1 - \eta) / \eta$: the ellipse
      $((\mathrm{Re}\,z + r) / r)^2 + (\mathrm{Im}\,z)^2 < 1$.

    For $\lambda = 1$ and $\eta = 1$ the ellipses are segments, on which solutions
    neither grow nor decay; these count as stable. The argument `resync_every` of the
    solver is ignored. With it, the `solver` inside decides about stability.

    **Example:**

    ```python
    import diffrax
    import nodegrad

    print(nodegrad.is_stable(diffrax.Bosh3(), [-0.02, -3.0]))  # [ True False]
    print(nodegrad.is_stable(nodegrad.Reversible(diffrax.Bosh3()), -0.02))  # False
    ```

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method, `nodegrad.Reversible` or `nodegrad.ALF`.
    - `z`: complex numbers, an array of any shape.
    - `coupling_parameter`: $\lambda$, to ask about the coupling of a plain `solver`;
      `None` to ask about `solver` itself.

    **Returns:** an array of booleans with the shape of `z`.

    **Raises:** `TypeError` for other solvers. `ValueError` if `coupling_parameter` is
    given for a solver that has one already, or is not in (0, 1].

    **Cost:** arithmetic in double precision; nothing is compiled.

    ??? cite "Reference"

        McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs,
        2024, arXiv:2410.11648, section 2.3, for real $z$.
    """
    z = np.asarray(z, dtype=complex)
    if coupling_parameter is not None:
        if isinstance(solver, ALF | Reversible):
            msg = "`coupling_parameter` is for a plain solver: this one has its own."
            raise ValueError(msg)
        if not 0 < coupling_parameter <= 1:
            msg = f"`coupling_parameter` must be in (0, 1]; got {coupling_parameter}."
            raise ValueError(msg)
    if isinstance(solver, ALF):
        return _is_in_leapfrog_ellipse(z, solver.damping)
    if type(solver) is Reversible:
        coupling_parameter = solver.coupling_parameter
    polynomial = np.polynomial.Polynomial(stability_polynomial(solver))
    if coupling_parameter is None:
        return np.abs(polynomial(z)) < 1
    # The step maps (y, z) linearly; see the docstring for its trace.
    forward, backward = polynomial(z) - 1, polynomial(-z) - 1
    apart = 1 - coupling_parameter
    trace = 1 + coupling_parameter - apart * backward - forward * backward
    return _is_in_ellipse(trace, 1 + coupling_parameter, apart)


def _is_in_leapfrog_ellipse(z: NDArray[np.number], damping: float) -> np.ndarray:
    """Returns whether `ALF` is stable at `z`."""
    if damping == 1:
        # The ellipse has the radius zero: only its imaginary axis is left.
        return (z.real == 0) & (np.abs(z.imag) < 1)
    radius = (1 - damping) / damping
    return _is_in_ellipse(z + radius, radius, 1.0)


def _is_in_ellipse(w: NDArray[np.number], real: float, imaginary: float) -> np.ndarray:
    """Returns whether `w` is inside the ellipse around 0 with these half axes."""
    if imaginary == 0:
        return (w.imag == 0) & (np.abs(w.real) < real)
    return (w.real / real) ** 2 + (w.imag / imaginary) ** 2 < 1
