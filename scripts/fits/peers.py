"""Other optimisers, for one start at a time, fed by the same compiled derivatives."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import fides
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array

from .likelihood import Fit
from .trust_region import Quadratic


Point = np.ndarray


class End(NamedTuple):
    """The last point of a fit, NaN as value if the optimiser gave up."""

    x: Point
    value: float
    iterations: int


def fit_by_fides(
    fit: Fit,
    quadratic: Callable[[Array], Quadratic],
    x0: Point,
    max_iterations: int,
    tolerance: float,
) -> End:
    """Fides: a trust region, reflected at bounds, with the Fisher information."""

    def evaluate(x: Point) -> tuple[float, Point, Point]:
        found = quadratic(jnp.asarray(x))
        return float(found.value), np.array(found.gradient), np.array(found.hessian)

    options = {
        fides.Options.MAXITER: max_iterations,
        fides.Options.FATOL: tolerance,
        fides.Options.FRTOL: 0.0,
    }
    optimiser = fides.Optimizer(
        evaluate, fit.upper, fit.lower, verbose=logging.CRITICAL, options=options
    )
    try:
        value, x, *_ = optimiser.minimize(np.array(x0))
    except RuntimeError:
        # It raises this where a derivative is not finite.
        return End(np.array(x0), np.nan, optimiser.iteration)
    return End(x, float(value), optimiser.iteration)


def fit_by_lbfgs(
    fit: Fit,
    value_and_grad: Callable[[Array], tuple[Array, Array]],
    x0: Point,
    max_iterations: int,
    tolerance: float,
) -> End:
    """L-BFGS-B of SciPy, with gradients by reverse mode."""

    def evaluate(x: Point) -> tuple[float, Point]:
        value, gradient = value_and_grad(jnp.asarray(x))
        # The line search needs numbers; these make it shorten its step.
        if not np.isfinite(value) or not np.all(np.isfinite(gradient)):
            return 1e10, np.zeros_like(x)
        return float(value), np.array(gradient)

    found = scipy.optimize.minimize(
        evaluate,
        np.array(x0),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(fit.lower, fit.upper, strict=True)),
        options={"maxiter": max_iterations, "maxfun": 10**9, "ftol": tolerance / 1e2},
    )
    return End(found.x, float(found.fun), int(found.nit))
