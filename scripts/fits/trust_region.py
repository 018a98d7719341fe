"""A trust-region method with bounds, compiled as a whole, for small likelihoods.

The trust region is a box, so its intersection with the bounds is one too, and a step
minimises a quadratic model over a box. The model has the Fisher information in place of
the Hessian: for parameters of the mean it is the Gauss-Newton matrix, and a sigma that
is estimated needs no residual to stand for it. Both come from forward mode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .likelihood import Fit, Outputs, Vector


Matrix = Float[Array, "parameters parameters"]
Scalar = Float[Array, ""]

#: Steps of the method for the quadratic model over a box; it is exact after a few.
_BOX_STEPS = 20
#: What these steps add to the eigenvalues, in units of the largest one.
_DAMPINGS = 10.0 ** jnp.arange(-14.0, 8.0, 0.5)


class Quadratic(NamedTuple):
    """The loss at a point, its gradient, and the Fisher information."""

    value: Scalar
    gradient: Vector
    hessian: Matrix


class Found(NamedTuple):
    """The end of a fit; `evaluations` counts solves without derivatives."""

    x: Vector
    value: Scalar
    iterations: Int[Array, ""]
    evaluations: Int[Array, ""]


class _State(NamedTuple):
    x: Vector
    model: Quadratic
    radius: Scalar
    iterations: Int[Array, ""]
    evaluations: Int[Array, ""]
    done: Bool[Array, ""]


def quadratic(fit: Fit, x: Vector) -> Quadratic:
    """The quadratic model of the loss at `x`, from one Jacobian of the outputs."""

    def with_value(x: Vector) -> tuple[Outputs, Outputs]:
        outputs = fit.outputs(x)
        return outputs, outputs

    jacobian, outputs = jax.jacfwd(with_value, has_aux=True)(x)
    residuals = fit.residuals(outputs)
    of_mean = jacobian.mean * jnp.exp(-outputs.log_sigma)[:, None]  # (n, parameters)
    of_sigma = jacobian.log_sigma  # (n, parameters)
    gradient = residuals @ of_mean + (1.0 - residuals**2) @ of_sigma
    information = of_mean.T @ of_mean + 2.0 * of_sigma.T @ of_sigma
    return Quadratic(fit.loss(outputs), gradient, information)


def minimise_over_box(
    gradient: Vector, hessian: Matrix, lower: Vector, upper: Vector
) -> Vector:
    """A step `s` with a small `gradient @ s + s @ hessian @ s / 2` within a box.

    The box contains zero. Damped Newton steps of the entries that are not held at a
    bound are projected to the box; of many dampings, the best one is taken.
    """

    def value(s: Vector) -> Scalar:
        return gradient @ s + 0.5 * s @ hessian @ s

    def improve(carry: tuple[Vector, Array, Array]) -> tuple[Vector, Array, Array]:
        s, index, _ = carry
        slope = gradient + hessian @ s
        held = ((s <= lower) & (slope > 0)) | ((s >= upper) & (slope < 0))
        slope = jnp.where(held, 0.0, slope)
        free = jnp.where(held[:, None] | held, 0.0, hessian)
        eigenvalues, vectors = jnp.linalg.eigh(free)
        scale = jnp.maximum(jnp.max(eigenvalues), 1e-300)
        damped = jnp.maximum(eigenvalues, 0.0) + scale * _DAMPINGS[:, None]
        directions = -((vectors.T @ slope) / damped) @ vectors.T
        candidates = jnp.clip(s + directions, lower, upper)
        values = jax.vmap(value)(candidates)
        best = candidates[jnp.argmin(values)]
        improved = value(s) - jnp.min(values) > 1e-9 * jnp.abs(value(s))
        return jnp.where(improved, best, s), index + 1, improved

    def unfinished(carry: tuple[Vector, Array, Array]) -> Array:
        _, index, improved = carry
        return improved & (index < _BOX_STEPS)

    start = jnp.zeros_like(gradient), jnp.array(0), jnp.array(True)
    return jax.lax.while_loop(unfinished, improve, start)[0]


def minimise(
    fit: Fit,
    x0: Vector,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
    radius: float = 1.0,
) -> Found:
    """Minimises the negative log-likelihood from `x0` within the bounds.

    It stops if a step changes the loss by less than `tolerance`, as expected. A start
    at which the solve fails is returned as it is.
    """
    lower, upper = jnp.asarray(fit.lower), jnp.asarray(fit.upper)

    def iterate(state: _State) -> _State:
        x, model, radius = state.x, state.model, state.radius
        low, high = (jnp.clip(b - x, -radius, radius) for b in (lower, upper))
        step = minimise_over_box(model.gradient, model.hessian, low, high)
        predicted = -(model.gradient @ step + 0.5 * step @ model.hessian @ step)
        trial = jnp.clip(x + step, lower, upper)
        decrease = model.value - fit.negative_log_likelihood(trial)
        ratio = jnp.where(jnp.isfinite(decrease), decrease / predicted, -1.0)
        accepted = ratio > 1e-4
        size = jnp.max(jnp.abs(step))
        grown = jnp.where(size > 0.9 * radius, 2.0 * radius, radius)
        radius = jnp.where(ratio > 0.75, grown, radius)
        radius = jnp.where(ratio < 0.25, 0.25 * size, radius)
        settled = (predicted < tolerance) & (jnp.abs(decrease) < tolerance)
        done = settled | (radius < 1e-6) | ~(predicted > 0)
        new = jax.lax.cond(
            accepted & ~done, lambda: quadratic(fit, trial), lambda: model
        )
        value = jnp.where(accepted, model.value - decrease, model.value)
        return _State(
            jnp.where(accepted, trial, x),
            new._replace(value=value),
            radius,
            state.iterations + 1,
            state.evaluations + 1,
            done,
        )

    def unfinished(state: _State) -> Array:
        return ~state.done & (state.iterations < max_iterations)

    model = quadratic(fit, x0)
    zero = jnp.array(0)
    failed = ~jnp.isfinite(model.value)
    first = _State(x0, model, jnp.asarray(radius), zero, zero, failed)
    last = jax.lax.while_loop(unfinished, iterate, first)
    return Found(last.x, last.model.value, last.iterations, last.evaluations)
