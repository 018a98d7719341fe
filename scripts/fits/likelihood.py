"""Negative log-likelihoods as pure functions of the parameters to estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import nodegrad

from .sbml import symbol, TIME, to_function
from .tables import Observable, Tables


Vector = Float[Array, " parameters"]


class Outputs(NamedTuple):
    """What a model says of `n` measurements, on the scales of their observables.

    `mean` and `log_sigma` of their normal distributions have shape `(n,)`. They are NaN
    if the solve fails.
    """

    mean: Float[Array, " n"]
    log_sigma: Float[Array, " n"]


@dataclass(frozen=True)
class Fit:
    """Parameters to estimate, with bounds, and the likelihood of measurements.

    - `outputs`: a pure function of the parameters on their scales.
    - `data`: the measurements, on the scales of their observables.
    - `constant`: the part of the negative log-likelihood that no parameter changes.
    """

    name: str
    names: tuple[str, ...]
    nominal: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    outputs: Callable[[Vector], Outputs]
    data: np.ndarray
    constant: float

    def residuals(self, outputs: Outputs) -> Float[Array, " n"]:
        """Distances of the means from the data, in units of sigma."""
        return (outputs.mean - self.data) * jnp.exp(-outputs.log_sigma)

    def loss(self, outputs: Outputs) -> Array:
        """The negative log-likelihood of the data."""
        squares = 0.5 * jnp.sum(self.residuals(outputs) ** 2)
        return squares + jnp.sum(outputs.log_sigma) + self.constant

    def negative_log_likelihood(self, x: Vector) -> Array:
        """The negative log-likelihood of the parameters `x`, on their scales."""
        return self.loss(self.outputs(x))


@dataclass(frozen=True)
class Settings:
    """How all conditions of a problem are solved."""

    solver: diffrax.AbstractSolver
    rtol: float = 1e-8
    atol: float = 1e-8
    max_steps: int = 2000

    def states(
        self, field: Callable[..., Any], y0: Array, args: Any, times: Array
    ) -> tuple[Array, Array]:
        """The states at `times` from time 0, `(times, states)`, and if it succeeds.

        An error would stop a whole vmap of solves, so a failure is returned.
        """
        sol: Any = nodegrad.odesolve(
            field,
            self.solver,
            0.0,
            times[-1],
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            max_steps=self.max_steps,
            throw=False,
        )
        return sol.ys, sol.result == nodegrad.RESULTS.successful


def make_fit(tables: Tables, settings: Settings) -> Fit:
    """The likelihood of a mechanistic model.

    Every condition is solved at the times of all measurements, so that the solves have
    the same shapes, and are one vmap.
    """
    model, parameters = tables.model, tables.parameters
    states = [symbol(s) for s in model.states]
    constants = [symbol(s) for s in tables.names]
    slopes = to_function(model.slopes, TIME, states, constants)
    initial = to_function(model.initial, constants)
    readers = [reader(o, states, constants) for o in tables.observables]
    times = jnp.asarray(tables.times)

    def solve(constants: Array) -> tuple[Array, Array]:
        return settings.states(slopes, initial(constants), constants, times)

    def outputs(x: Vector) -> Outputs:
        linear = unscaled(x, parameters.scales)
        values = jnp.asarray(parameters.values).at[parameters.estimated].set(linear)
        numbers = jnp.concatenate([values, tables.numbers])
        of_condition = numbers[tables.indices]  # (conditions, constants)
        ys, successful = jax.vmap(solve)(of_condition)  # (conditions, times, states)
        found = [read(numbers, times, ys, of_condition) for read in readers]
        mean, log_sigma = jnp.concatenate(found, axis=-1)
        valid = jnp.all(successful)
        return Outputs(*(jnp.where(valid, z, jnp.nan) for z in (mean, log_sigma)))

    return Fit(
        tables.name,
        tuple(parameters.names[i] for i in parameters.estimated),
        parameters.nominal,
        parameters.lower,
        parameters.upper,
        outputs,
        *gathered([(o.values, o.transformation) for o in tables.observables]),
    )


def reader(
    observable: Observable, states: Sequence[Any], constants: Sequence[Any]
) -> Callable[[Array, Array, Array, Array], Array]:
    """Means and logarithms of sigma, `(2, n)`, from the states of all conditions."""
    formulas = observable.formula, observable.noise
    function = to_function(formulas, TIME, states, constants, observable.placeholders)
    transform = TRANSFORMATIONS[observable.transformation]

    def read(numbers: Array, times: Array, ys: Array, constants: Array) -> Array:
        mean, sigma = jax.vmap(function, out_axes=1)(
            times[observable.times],
            ys[observable.conditions, observable.times],
            constants[observable.conditions],
            numbers[observable.overrides],
        )
        return jnp.stack([transform(mean), jnp.log(sigma)])

    return read


TRANSFORMATIONS: dict[str, Callable[[Array], Array]] = {
    "lin": jnp.asarray,
    "log": jnp.log,
    "log10": jnp.log10,
}


def gathered(measured: Sequence[tuple[np.ndarray, str]]) -> tuple[np.ndarray, float]:
    """Measurements on the scales of their observables, and the constant of a `Fit`.

    The density of a measurement has the derivative of its transformation as a factor.
    """
    data = [np.asarray(TRANSFORMATIONS[scale](jnp.asarray(m))) for m, scale in measured]
    constant = 0.5 * np.log(2 * np.pi) * sum(len(m) for m, _ in measured)
    for values, scale in measured:
        if scale != "lin":
            base = np.log(10.0) if scale == "log10" else 1.0
            constant += np.sum(np.log(values * base))
    return np.concatenate(data), float(constant)


def unscaled(x: Vector, scales: Sequence[str]) -> Vector:
    """Parameters on linear scale."""
    is_log = np.array([scale != "lin" for scale in scales])
    bases = np.array([10.0 if scale == "log10" else np.e for scale in scales])
    return jnp.where(is_log, bases ** jnp.where(is_log, x, 0.0), x)
