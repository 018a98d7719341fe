"""Explicit Runge-Kutta methods that Diffrax does not have, as Diffrax solvers."""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, PyTree, Real

from .._internal.tree import check_counts
from .solvers import AbstractReversibleSolver


class RK4(diffrax.AbstractERK):
    r"""The classical fourth order Runge-Kutta method of Kutta (1901).

    $k_1 = f(t_0, y_0)$, $k_2 = f(t_0 + h/2, y_0 + h k_1/2)$,
    $k_3 = f(t_0 + h/2, y_0 + h k_2/2)$, $k_4 = f(t_1, y_0 + h k_3)$,
    $y_1 = y_0 + h (k_1 + 2 k_2 + 2 k_3 + k_4)/6$.

    This is a Diffrax solver. Use it in `nodegrad.odesolve` or `diffrax.diffeqsolve`,
    with a constant step size or `diffrax.StepTo`. Dense output is the cubic Hermite
    interpolant, of third order.

    **Arguments:** `scan_kind`, as of all Runge-Kutta methods of Diffrax: the loop in
    their `step`. nodegrad evaluates the stages itself and does not use it.

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


def _quadratic(
    *,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    y0: PyTree[Array],
    y1: PyTree[Array],
    k: PyTree[Array],
) -> diffrax.ThirdOrderHermitePolynomialInterpolation:
    """Returns the parabola through both ends with the first stage for its slope."""
    # No stage is at the end of the step. This slope there makes the cubic term zero.
    k0 = jax.tree.map(lambda k: k[0], k)
    k1 = jax.tree.map(lambda y0, y1, k0: 2 * (y1 - y0) - k0, y0, y1, k0)
    return diffrax.ThirdOrderHermitePolynomialInterpolation(
        t0=t0, t1=t1, y0=y0, y1=y1, k0=k0, k1=k1
    )


class EffectivelySymmetric(
    diffrax.AbstractERK, diffrax.AbstractStratonovichSolver, AbstractReversibleSolver
):
    """An explicit method whose steps a step of the opposite size almost undoes."""

    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = staticmethod(_quadratic)

    resync_every: int | None = eqx.field(static=True, default=None)

    # There is no solver state, so jumps make no difference.
    resyncs_at_jumps: ClassVar[bool] = False

    def __check_init__(self) -> None:
        check_counts(None, resync_every=self.resync_every)

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        """Returns 2, the order for ordinary differential equations."""
        del terms
        return 2

    def strong_order(self, terms: PyTree[diffrax.AbstractTerm]) -> float:
        """Returns 0.5, the strong order for stochastic equations."""
        del terms
        return 0.5

    def backward_step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y1: PyTree,
        args: PyTree,
        ts_state: PyTree[Real[Array, ""]],
        solver_state: PyTree,
        made_jump: bool | Bool[Array, ""],
    ) -> tuple[PyTree, dict[str, PyTree], PyTree, diffrax.RESULTS]:
        """Undoes a step up to the defect, by a step from `t1` to `t0`."""
        del ts_state
        y0, *_ = self.step(terms, t1, t0, y1, args, solver_state, made_jump)
        _, _, dense_info, solver_state, result = self.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y0, dense_info, solver_state, result


class EES25(EffectivelySymmetric):
    r"""EES(2,5), an explicit method of order two that is almost symmetric.

    With three stages $k_i$, a step is $\Phi_h(y_0) = y_0 + \sum_i b_i k_i$. A symmetric
    method is one with $\Phi_{-h} \circ \Phi_h = \mathrm{id}$. No explicit method is
    symmetric. This one is up to order five:
    $\Phi_{-h} \circ \Phi_h = \mathrm{id} + O(h^6)$. So a step of size $-h$ undoes a
    step, up to this defect, without the second copy of the state that
    `nodegrad.Reversible` has. The tableau is that of the family EES(2,5;$x$) for
    $x = \frac{1}{10}$.

    With `nodegrad.ReversibleAdjoint` no state is stored. The gradient is **not exact**:
    its relative error is $O(h^5)$. `nodegrad.ReversibleAdjoint(check=True)` measures
    the reconstruction error, which has the same size. With `nodegrad.ACAAdjoint` the
    gradient is exact.

    This is a Diffrax solver, for any controller and adjoint. It is stable for real
    $h a$ in $(-3.09, 0)$; decay does not make the solution unstable, as it does with
    `nodegrad.Reversible`. Stochastic equations are solved in the sense of Stratonovich,
    with strong order one half. The error estimate is the difference to Euler's method.
    Dense output is a parabola, of second order.

    **Example:**

    ```python
    import diffrax
    import jax
    import jax.numpy as jnp
    import nodegrad

    def loss(rate, adjoint):
        relax = diffrax.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(t)))
        solver = nodegrad.EES25(resync_every=10)
        sol = diffrax.diffeqsolve(
            relax, solver, 0.0, 10.0, 0.1, 0.0, rate, adjoint=adjoint
        )
        return sol.ys[0]

    grad = jax.grad(loss)(2.0, nodegrad.ReversibleAdjoint())
    exact = jax.grad(loss)(2.0, nodegrad.ACAAdjoint())
    print(abs(grad - exact) < 1e-3 * abs(exact))  # True
    ```

    **Arguments:**

    - `resync_every`: an integer `K`. The backward pass of `nodegrad.ReversibleAdjoint`
      continues from the exact state before every `K`-th step. It stores 33 states at
      most, and computes the others again from these. On a problem that decays at
      the rate $a$, the defects grow by $e^{a T}$ in the backward pass from time $T$ on,
      as all errors do if such a problem is solved backwards. With `resync_every` they
      grow for `K` steps only. The solution does not depend on it.
    - `scan_kind`: as of `nodegrad.RK4`.

    **Raises:** `TypeError` or `ValueError` for another `resync_every`.

    **Cost:** three vector field evaluations a step; six, and three pullbacks, in the
    backward pass of `nodegrad.ReversibleAdjoint`.

    **When not to use it:** if the gradient has to be exact, and no state can be stored
    (`nodegrad.Reversible`); without noise and where states can be stored, if a higher
    order is wanted (`diffrax.Tsit5` with `nodegrad.ACAAdjoint`).

    ??? cite "Reference"

        Shmelev, Ebrahimi-Fard, Tapia, Salvi: Explicit and Effectively Symmetric
        Runge-Kutta Methods, 2025, arXiv:2507.21006; Shmelev, Salvi: Explicit and
        Effectively Symmetric Schemes for Neural SDEs, 2025, arXiv:2509.20599.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 3]), np.array([-5 / 48, 15 / 16])),
        b_sol=np.array([1 / 10, 1 / 2, 2 / 5]),
        # The weights of Euler's method are (1, 0, 0).
        b_error=np.array([1 / 10 - 1, 1 / 2, 2 / 5]),
        c=np.array([1 / 3, 5 / 6]),
    )


_R = np.sqrt(2.0)


class EES27(EffectivelySymmetric):
    r"""EES(2,7), an explicit method of order two that is almost symmetric.

    As `nodegrad.EES25`, with four stages and the smaller defect
    $\Phi_{-h} \circ \Phi_h = \mathrm{id} + O(h^8)$. With
    `nodegrad.ReversibleAdjoint`, which stores no state, the relative error of a
    gradient is $O(h^7)$: with steps that resolve the solution it is often not larger
    than that of rounding. `nodegrad.ReversibleAdjoint(check=True)` measures it.

    **Example:**

    ```python
    import jax.numpy as jnp
    import nodegrad

    swing = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])
    sol = nodegrad.odesolve(
        swing, nodegrad.EES27(), 0.0, 4.0, 0.1, jnp.array([1.0, 0.0]),
        adjoint=nodegrad.ReversibleAdjoint(check=True),
    )
    print(sol.stats["reconstruction_error"] < 1e-5)  # True
    ```

    **Arguments:** `resync_every` and `scan_kind`, as for `nodegrad.EES25`.

    **Raises:** `TypeError` or `ValueError` for another `resync_every`.

    **Cost:** four vector field evaluations a step; eight, and four pullbacks, in the
    backward pass of `nodegrad.ReversibleAdjoint`.

    **When not to use it:** as `nodegrad.EES25`.

    ??? cite "Reference"

        Shmelev, Ebrahimi-Fard, Tapia, Salvi: Explicit and Effectively Symmetric
        Runge-Kutta Methods, 2025, arXiv:2507.21006.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(
            np.array([(2 - _R) / 3]),
            np.array([(_R - 4) / 24, (4 + _R) / 8]),
            np.array([(145 * _R - 176) / 168, 3 * (8 - 5 * _R) / 56, 3 * (3 - _R) / 7]),
        ),
        b_sol=np.array(
            [(5 - 3 * _R) / 14, (3 + _R) / 14, 3 * (2 * _R - 1) / 14, (9 - 4 * _R) / 14]
        ),
        b_error=np.array(
            [
                (5 - 3 * _R) / 14 - 1,
                (3 + _R) / 14,
                3 * (2 * _R - 1) / 14,
                (9 - 4 * _R) / 14,
            ]
        ),
        c=np.array([(2 - _R) / 3, (2 + _R) / 6, (4 + _R) / 6]),
    )
