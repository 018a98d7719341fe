"""`scale_by_gauss_newton`: exact Gauss-Newton steps, in the space of the samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real

from .._internal.tree import (
    all_finite,
    as_arrays,
    at_least_float32,
    check_numbers,
    flatten,
    widest,
)
from .quadratic_model import damping_factor


# Transtrum and Sethna (arXiv:1201.5885) refuse a step whose acceleration is longer than
# this part of its velocity: the quadratic path does not describe the residuals there.
_LONGEST_ACCELERATION = 0.75
# After a good step the damping falls faster than it grows after a poor one, so that it
# is small near the solution.
_GROW, _SHRINK = 2.0, 1 / 3

_Vector = Float[Array, " n"]
_Matrix = Float[Array, "k n"]
Scalar = Real[ArrayLike, ""]


class GaussNewtonState(NamedTuple):
    r"""The state of `nodegrad.scale_by_gauss_newton`.

    **Arguments:**

    - `previous`: the last step, a vector of all parameters; `None` without momentum.
    - `damping`: $\lambda$ of the next step, in units of the mean eigenvalue of its
      curvature; `None` if it does not adapt.
    - `accepted`: whether the last step lowered the loss. If not, it was zero. `None` if
      the damping does not adapt.
    - `scales`: the diagonal of $D$, a vector (zeros if there are fewer residuals than
      parameters); `None` if the damping does not adapt.
    """

    previous: _Vector | None
    damping: Float[Array, ""] | None
    accepted: Bool[Array, ""] | None
    scales: _Vector | None


def scale_by_gauss_newton(
    damping: Scalar = 1e-3,
    *,
    momentum: Scalar = 0.0,
    acceleration: bool = False,
    adaptive: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient by the inverse of a damped low-rank curvature.

    The curvature is $P^\top P = \sum_k p_k p_k^\top$, where each *column* $p_k$ is a
    pytree like the parameters (and a row of $P$). The step for the gradient $g$ is
    $(\lambda I + P^\top P)^{-1} g$. With few columns and many parameters it is computed
    from the small matrix $P P^\top$, in the space of the samples.

    *With `residual_fn`*, residuals $r(\theta)$ as a function of the parameters, the
    loss is $\frac{1}{2} |r|^2$, $P$ is the Jacobian of $r$, and $g = P^\top r$:

    $$s = \mu s' + P^\top (\lambda I + P P^\top)^{-1} (r - \mu P s').$$

    $s'$ is the step before. $\mu$ is `momentum`: the damping then draws the step to
    $\mu s'$ and not to zero, in the directions in which the samples say nothing. With
    other samples in each step that is SPRING.

    *With `columns`* the curvature is any one of low rank. For $n$ samples $b$ with
    output Hessians $H_b$, the columns $p_{bi} = J_b^\top (H_b / n)^{1/2} e_i$ of all
    samples and outputs $i$ give the Gauss-Newton method for the mean of the losses.

    *Acceleration.* The step $s$ follows the tangent of the path on which the residuals
    fall to zero linearly. The second derivative of this path is the geodesic
    acceleration. Half of it is added, with $r_{ss}$ the second derivative of $r$ along
    $s$:

    $$s \leftarrow s + \tfrac{1}{2} P^\top (\lambda I + P P^\top)^{-1} r_{ss}.$$

    It is left out where it is longer than 3/8 of the step.

    *Adaptive damping* is the method of Levenberg and Marquardt. A step that does not
    lower the loss is zero, and the next one is damped four times as much. With at least
    as many residuals as parameters it has Moré's scales: $\lambda D^2$ is in the place
    of $\lambda I$, and $D_{ii}$ is the largest norm that column $i$ of $P$ has had.
    Then the units of the parameters do not matter.

    ```python
    import diffrax
    import jax
    import jax.numpy as jnp
    import nodegrad
    import optax

    jax.config.update("jax_enable_x64", True)
    times = jnp.linspace(0.0, 3.0, 7)


    def residuals(log_rates):
        field = lambda t, y, rates: -rates[0] * y / (rates[1] + y)
        sol = nodegrad.odesolve(
            field, diffrax.Tsit5(), 0.0, 3.0, 0.1, jnp.array(2.0), jnp.exp(log_rates),
            saveat=diffrax.SaveAt(ts=times),
        )
        return sol.ys - jnp.array([2.0, 1.52, 1.1, 0.73, 0.45, 0.26, 0.14])


    method = nodegrad.scale_by_gauss_newton(acceleration=True, adaptive=True)
    optim = optax.chain(method, optax.scale(-1.0))


    @jax.jit
    def step(x, state):
        updates, state = optim.update(x, state, x, residual_fn=residuals)
        return x + updates, state


    x, state = jnp.zeros(2), optim.init(jnp.zeros(2))
    for _ in range(20):
        x, state = step(x, state)
    print(jnp.exp(x).round(1))  # [1.5 1. ]
    ```

    **Arguments:**

    - `damping`: $\lambda > 0$. With `adaptive`, that of the first step, in units of the
      mean eigenvalue of $D^{-1} P^\top P D^{-1}$, or of $P P^\top$ if that is smaller.
    - `momentum`: $\mu$ in $[0, 1)$.
    - `acceleration`: whether to add the geodesic acceleration.
    - `adaptive`: whether the damping adapts. Then the step has to be taken as it is:
      the only transformation after this one is `optax.scale(-1.0)`.

    **Returns:** an `optax.GradientTransformationExtraArgs`. Its `update` takes one of

    - `columns`: a pytree like the gradient whose leaves have a leading axis for $k$;
    - `residual_fn`: a function of `params`, which are needed too, that returns a pytree
      of arrays. The updates passed in only give the structure then: the gradient is
      that of the residuals. With `acceleration` or `adaptive` it is needed.

    **Raises:** `ValueError` for missing arguments of `update`, columns that do not fit
    the gradient, or numbers out of range; `TypeError` for complex arrays.

    **Cost:** for $K$ columns and $n$ parameters, $n K \min(n, K)$ operations and the
    memory of the columns. `residual_fn`: $K$ pullbacks at once, or $n$ pushforwards if
    there are fewer parameters than residuals (then a solve in it needs an adjoint with
    forward mode, as those of this package). `acceleration`: one evaluation of
    `residual_fn` with two tangents. `adaptive`: one evaluation.

    **When not to use it:** for networks with more samples and outputs than fit as
    columns; take `nodegrad.snopt`. For few parameters and all data at once Optimistix
    has more methods; see the documentation on fits. In float32 with `columns` and a
    damping of less than 1e-6 of the curvature: the step is the small difference of
    large numbers, which `residual_fn` avoids.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        Proposition 2; Korbit, Adeoye, Bemporad, Zanon: Exact Gauss-Newton Optimization
        for Training Deep Neural Networks, 2024, arXiv:2405.14402. Momentum:
        Goldshlager, Abrahamsen, Lin: A Kaczmarz-inspired approach to accelerate the
        optimization of neural network wavefunctions, 2024, arXiv:2401.10190;
        Guzmán-Cordero, Dangel, Goldshlager, Zeinhofer: Improving Energy Natural
        Gradient Descent through Woodbury, Momentum, and Randomization, 2025,
        arXiv:2505.12149. Acceleration: Transtrum, Sethna: Improvements to the
        Levenberg-Marquardt algorithm for nonlinear least-squares minimization, 2012,
        arXiv:1201.5885; Jnini, Vella: Dual Natural Gradient Descent for Scalable
        Training of Physics-Informed Neural Networks, 2025, arXiv:2505.21404.
    """
    check_numbers(damping=damping, momentum=momentum)
    if isinstance(damping, int | float) and not damping > 0:
        msg = f"`damping` must be positive; got {damping}."
        raise ValueError(msg)
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        msg = f"`momentum` must be in [0, 1); got {momentum}."
        raise ValueError(msg)
    has_momentum = not isinstance(momentum, int | float) or momentum > 0
    method = _GaussNewton(
        damping, momentum if has_momentum else None, acceleration, adaptive
    )
    return optax.GradientTransformationExtraArgs(method.init, method.update)


class _GaussNewton(NamedTuple):
    """The arguments of `scale_by_gauss_newton`; no momentum is `None`."""

    damping: Scalar
    momentum: Scalar | None
    acceleration: bool
    adaptive: bool

    # States are `Any` for type checkers: Optax's type of states excludes named tuples.
    def init(self, params: PyTree) -> Any:
        """Returns the state before the first step."""
        flat, _ = _flattened(params)
        return GaussNewtonState(
            previous=None if self.momentum is None else jnp.zeros_like(flat),
            damping=jnp.asarray(self.damping, flat.dtype) if self.adaptive else None,
            accepted=jnp.array(True) if self.adaptive else None,
            scales=jnp.zeros_like(flat) if self.adaptive else None,
        )

    def update(
        self,
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        columns: PyTree | None = None,
        residual_fn: Callable[[PyTree], PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        """Returns the step, and the next state."""
        del extra
        self._check_arguments(params, columns, residual_fn)
        g, as_updates = _flattened(updates)
        if residual_fn is None:
            _check_columns(updates, columns)
            p = jax.vmap(lambda c: _flattened(c)[0].astype(g.dtype))(columns)
            step, new = self._from_gradient(g, p, state)
        else:
            x, as_params = _flattened(params)

            def residuals(x: _Vector) -> Array:
                return _flattened(residual_fn(as_params(x)))[0].astype(x.dtype)

            step, new = self._from_residuals(residuals, x, state)
        return as_updates(step), new

    def _from_gradient(
        self, g: _Vector, p: _Matrix, state: Any
    ) -> tuple[_Vector, GaussNewtonState]:
        """Returns the step for any gradient and columns."""
        damping = jnp.asarray(self.damping).astype(g.dtype)
        if self.momentum is not None:
            g = g + damping * self._drift(state)
        k, n = p.shape
        factor = _factor(p, damping)
        if k < n:
            # Woodbury's identity.
            step = (g - p.T @ cho_solve(factor, p @ g)) / damping
        else:
            step = cho_solve(factor, g)
        return step, self._after(state, step)

    def _from_residuals(
        self, residuals: Callable[[_Vector], Array], x: _Vector, state: Any
    ) -> tuple[_Vector, GaussNewtonState]:
        """Returns the step for half the sum of the squares of `residuals`."""
        r, p = _linearized(residuals, x)  # (k,), (k, n)
        scales, diagonal = state.scales, jnp.ones_like(x)
        # With fewer residuals than parameters, some hardly matter, and would move most.
        if self.adaptive and p.shape[0] >= p.shape[1]:
            norms = jnp.linalg.norm(p, axis=0)
            scales = jnp.maximum(scales, jnp.where(jnp.isfinite(norms), norms, 0))
            diagonal = jnp.where(scales > 0, scales, 1)
        # From here on, steps are multiplied by $D$.
        after = lambda step: residuals(x - step / diagonal)
        p = p / diagonal[None]
        damping = jnp.asarray(self.damping).astype(x.dtype)
        if self.adaptive:
            damping = state.damping * jnp.sum(p**2) / min(p.shape)
        factor = _factor(p, damping)
        solve = lambda rhs: _least_squares(p, factor, rhs)
        if self.momentum is None:
            step = solve(r)
        else:
            drift = self._drift(state) * diagonal
            step = drift + solve(r - p @ drift)
        whole = step
        if self.acceleration:
            curve = solve(_second_derivative(after, step))
            norm = jnp.linalg.norm
            short = 2 * norm(curve) <= _LONGEST_ACCELERATION * norm(step)
            whole = step + jnp.where(short, curve / 2, 0)
        if not self.adaptive:
            return whole, self._after(state, whole)

        half_square = lambda r: jnp.sum(r**2) / 2
        value = half_square(r)
        predicted = half_square(r - p @ step) - value
        actual = half_square(after(whole)) - value
        # All comparisons with NaN are false.
        accepted = all_finite(whole) & (actual <= 0)
        whole = jnp.where(accepted, whole / diagonal, 0)
        new = _adapted(state.damping, actual, predicted, accepted)
        state = state._replace(damping=new, accepted=accepted, scales=scales)
        return whole, self._after(state, whole)

    def _drift(self, state: Any) -> _Vector:
        return jnp.asarray(self.momentum).astype(state.previous.dtype) * state.previous

    def _after(self, state: Any, step: _Vector) -> GaussNewtonState:
        return state._replace(previous=None if self.momentum is None else step)

    def _check_arguments(
        self, params: PyTree | None, columns: PyTree | None, residual_fn: Any
    ) -> None:
        if residual_fn is None and (self.acceleration or self.adaptive):
            msg = (
                "`scale_by_gauss_newton` with `acceleration` or `adaptive` needs the "
                "residuals: `optim.update(grads, state, params, residual_fn=...)`."
            )
            raise ValueError(msg)
        if (columns is None) == (residual_fn is None):
            msg = (
                "`scale_by_gauss_newton` needs the columns of the curvature or the "
                "residuals, and not both: pass `columns` or `residual_fn` to `update`."
            )
            raise ValueError(msg)
        if residual_fn is not None and params is None:
            msg = "`residual_fn` is evaluated at `params`: pass them to `update`."
            raise ValueError(msg)


def _flattened(tree: PyTree) -> tuple[_Vector, Callable[[_Vector], PyTree]]:
    """Returns all leaves as one vector, in float32 or wider, and the way back."""
    tree = as_arrays(tree)
    dtypes = [getattr(x, "dtype", object) for x in jax.tree.leaves(tree)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        msg = (
            "`scale_by_gauss_newton` takes real floating point arrays; got "
            f"{sorted(map(str, dtypes))}. Pass `eqx.filter(model, "
            "eqx.is_inexact_array)`, and of complex arrays both parts."
        )
        raise TypeError(msg)
    return flatten(tree, widest(map(at_least_float32, dtypes)))


def _linearized(
    residuals: Callable[[_Vector], Array], x: _Vector
) -> tuple[Array, _Matrix]:
    """Returns the residuals and their Jacobian, in the mode that needs fewer passes."""
    k, n = jax.eval_shape(residuals, x).size, x.size
    if k < n:
        r, pullback = jax.vjp(residuals, x)
        return r, jax.vmap(pullback)(jnp.eye(k, dtype=r.dtype))[0]
    r, pushforward = jax.linearize(residuals, x)
    return r, jax.vmap(pushforward, out_axes=1)(jnp.eye(n, dtype=x.dtype))


def _second_derivative(after: Callable[[_Vector], Array], step: _Vector) -> Array:
    """Returns the second derivative of `after` at no step, along `step`."""
    along = lambda at: jax.jvp(after, (at,), (step,))[1]
    return jax.jvp(along, (jnp.zeros_like(step),), (step,))[1]


def _factor(p: _Matrix, damping: Float[Array, ""]) -> Any:
    """Returns the Cholesky factor of the smaller damped Gram matrix of `p`.

    It is NaN if the matrix is not positive definite, for a damping below rounding.
    """
    k, n = p.shape
    gram = p @ p.T if k < n else p.T @ p
    return cho_factor(gram + damping * jnp.eye(min(k, n), dtype=p.dtype))


def _least_squares(p: _Matrix, factor: Any, rhs: Array) -> _Vector:
    """Returns the vector that minimises `|p w - rhs|**2 + damping |w|**2`."""
    k, n = p.shape
    return p.T @ cho_solve(factor, rhs) if k < n else cho_solve(factor, p.T @ rhs)


def _adapted(
    damping: Float[Array, ""],
    actual: Float[Array, ""],
    predicted: Float[Array, ""],
    accepted: Bool[Array, ""],
) -> Float[Array, ""]:
    """Returns the damping of the next step."""
    ratio = actual / jnp.where(predicted < 0, predicted, jnp.nan)
    factor = damping_factor(ratio, accepted, (_SHRINK, _SHRINK, _GROW))
    least = jnp.finfo(damping.dtype).eps
    return jnp.clip(damping * factor.astype(damping.dtype), least, 1 / least)


def _check_columns(updates: PyTree, columns: PyTree) -> None:
    """Raises `ValueError` unless `columns` are stacked trees like `updates`."""

    def shapes(tree: PyTree, skip: int) -> PyTree:
        return jax.tree.map(lambda x: x.shape[skip:], tree)

    same = jax.tree.structure(updates) == jax.tree.structure(columns)
    if not same or shapes(updates, 0) != shapes(columns, 1):
        msg = (
            "`columns` must be like the gradient, with one leading axis for every "
            f"leaf: expected {shapes(updates, 0)} after it, got "
            f"{jax.tree.map(jnp.shape, columns)}."
        )
        raise ValueError(msg)
