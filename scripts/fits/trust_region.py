"""A trust-region method with bounds, compiled as a whole, for small likelihoods.

A step minimises a quadratic model over the part of a ball that is within the bounds.
The model has the Fisher information in place of the Hessian: for parameters of the mean
it is the Gauss-Newton matrix, and a sigma that is estimated needs no residual to stand
for it. Both come from forward mode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .likelihood import Fit, Outputs, Vector


Matrix = Float[Array, "parameters parameters"]
Scalar = Float[Array, ""]

#: How often a step is improved, for the sake of bounds that it reaches on its way.
_NUM_IMPROVEMENTS = 10
#: What is added to the eigenvalues of the Hessian, in units of the largest one.
_DAMPINGS = 10.0 ** jnp.arange(-14.0, 8.0, 0.5)
#: The part of the way to a bound that a step may go. With the whole way parameters get
#: stuck at bounds: of 40 starts of Sneyd's model 3 reach the best end, and not 6.
_ROOM = 0.9


class Quadratic(NamedTuple):
    """The loss at a point, its gradient, and the Fisher information."""

    value: Scalar
    gradient: Vector
    hessian: Matrix


class Found(NamedTuple):
    """The end of a fit."""

    x: Vector
    value: Scalar
    iterations: Int[Array, ""]


class _State(NamedTuple):
    x: Vector
    model: Quadratic
    radius: Scalar
    iterations: Int[Array, ""]
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


def best_step(
    gradient: Vector, hessian: Matrix, lower: Vector, upper: Vector, radius: Scalar
) -> Vector:
    """A step `s` with a small `gradient @ s + s @ hessian @ s / 2` within bounds.

    The bounds contain zero, and its length is at most `radius`. Damped Newton steps of
    the entries that are not held at a bound are clipped to the bounds, and shortened;
    of many dampings, the best one is taken.
    """

    def value(s: Vector) -> Scalar:
        return gradient @ s + 0.5 * s @ hessian @ s

    def shortened(s: Vector) -> Vector:
        length = jnp.linalg.norm(s)
        return s * jnp.minimum(1.0, radius / jnp.where(length > 0, length, 1.0))

    def improve(carry: tuple[Vector, Array, Array]) -> tuple[Vector, Array, Array]:
        s, index, _ = carry
        slope = gradient + hessian @ s
        held = ((s <= lower) & (slope > 0)) | ((s >= upper) & (slope < 0))
        slope = jnp.where(held, 0.0, slope)
        of_free = ~jnp.logical_or.outer(held, held)
        eigenvalues, vectors = jnp.linalg.eigh(jnp.where(of_free, hessian, 0.0))
        scale = jnp.maximum(jnp.max(eigenvalues), 1e-300)

        def candidate(damping: Scalar) -> Vector:
            damped = jnp.maximum(eigenvalues, 0.0) + scale * damping
            direction = -vectors @ ((vectors.T @ slope) / damped)
            return shortened(jnp.clip(s + direction, lower, upper))

        candidates = jax.vmap(candidate)(_DAMPINGS)
        values = jax.vmap(value)(candidates)
        best = candidates[jnp.argmin(values)]
        improved = value(s) - jnp.min(values) > 1e-3 * jnp.abs(value(s))
        return jnp.where(improved, best, s), index + 1, improved

    def unfinished(carry: tuple[Vector, Array, Array]) -> Array:
        _, index, improved = carry
        return improved & (index < _NUM_IMPROVEMENTS)

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
        room = _ROOM * (lower - x), _ROOM * (upper - x)
        step = best_step(model.gradient, model.hessian, *room, radius)
        predicted = -(model.gradient @ step + 0.5 * step @ model.hessian @ step)
        trial = jnp.clip(x + step, lower, upper)
        decrease = model.value - fit.negative_log_likelihood(trial)
        better = jnp.isfinite(decrease) & (decrease > 1e-4 * predicted)
        new = jax.lax.cond(better, lambda: quadratic(fit, trial), lambda: model)
        accepted = better & jnp.all(jnp.isfinite(new.gradient))
        ratio = jnp.where(accepted, decrease / predicted, -1.0)
        length = jnp.linalg.norm(step)
        grown = jnp.where(length > 0.9 * radius, 2.0 * radius, radius)
        radius = jnp.where(ratio > 0.75, grown, radius)
        radius = jnp.where(ratio < 0.25, 0.25 * length, radius)
        settled = (predicted < tolerance) & (jnp.abs(decrease) < tolerance)
        return _State(
            jnp.where(accepted, trial, x),
            jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, model),
            radius,
            state.iterations + 1,
            settled | (radius < 1e-6) | ~(predicted > 0),
        )

    def unfinished(state: _State) -> Array:
        return ~state.done & (state.iterations < max_iterations)

    model = quadratic(fit, x0)
    failed = ~jnp.all(jnp.isfinite(model.gradient))
    first = _State(x0, model, jnp.asarray(radius), jnp.array(0), failed)
    last = jax.lax.while_loop(unfinished, iterate, first)
    return Found(last.x, last.model.value, last.iterations)
