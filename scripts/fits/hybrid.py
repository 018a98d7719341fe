"""Fits of models with a network in them: by gradients, and by Gauss-Newton."""

from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.measure import Clock, compile_program
from benchmarks.report import Budget, Report

import nodegrad

from . import peers
from .likelihood import Fit, Settings
from .networks import expected_llh, read_hybrid
from .study import check_likelihood, FITS, NOMINAL, Options, TOLERANCE


CHECKED_NETWORK = Settings(diffrax.Tsit5(), rtol=1e-11, atol=1e-11, max_steps=40_000)
NETWORK = Settings(diffrax.Tsit5(), rtol=1e-8, atol=1e-8, max_steps=4096)


def fit_hybrid(
    options: Options, names: Sequence[str], clock: Clock, report: Report
) -> None:
    """Likelihoods, gradients and fits of models with networks in them."""
    if not names:
        return
    iterations = (50, 50) if options.quick else (1000, 1500)
    report.note(
        f"Hybrid models: {iterations[0]} iterations of Adam from the nominal "
        f"parameters, then at most {iterations[1]} of L-BFGS-B; and steps of "
        "`scale_by_gauss_newton(adaptive=True, acceleration=True)` for as long."
    )
    nominal, fitted = [], []
    for name in names:
        folder = options.folder / name
        fit = read_hybrid(folder, NETWORK)
        reference = expected_llh(folder)
        checked = read_hybrid(folder, CHECKED_NETWORK)
        nominal.append(check_likelihood(checked, reference, report))
        first = _fit_by_gradients(fit, *iterations, clock)
        second = _fit_by_gauss_newton(fit, first["cpu_seconds"], clock)
        fitted += [{"case": name, **record} for record in (first, second)]
        above = np.exp(reference - first["best_llh"])
        what = "likelihood of the nominal parameters"
        report.budgets.append(Budget(what, name, "the fit", float(above), 1.0))
    report.table("hybrid models, at nominal parameters", NOMINAL, nominal)
    report.table("hybrid models, fits", FITS, fitted)


def _fit_by_gauss_newton(fit: Fit, limit: float, clock: Clock) -> dict[str, Any]:
    """Gauss-Newton in the space of the measurements, for `limit` seconds.

    The size of the noise is known in both problems: the log-likelihood is a constant
    minus half the sum of the squares of the residuals.
    """

    def residuals(x: Any) -> Any:
        return fit.residuals(fit.outputs(jnp.clip(x, fit.lower, fit.upper)))

    optim = nodegrad.scale_by_gauss_newton(adaptive=True, acceleration=True)

    def step(x: Any, state: Any) -> Any:
        updates, state = optim.update(x, state, x, residual_fn=residuals)
        return x - updates, state

    x = jnp.asarray(fit.nominal)
    state = optim.init(x)
    program = compile_program(clock, step, x, state)
    before, iterations = clock.now(), 0
    while clock.now() - before < limit:
        x, state = jax.block_until_ready(program.run(x, state))
        iterations += 1
    seconds = clock.now() - before
    x = jnp.clip(x, fit.lower, fit.upper)
    return {
        "method": "Gauss-Newton",
        "best_llh": -float(jax.jit(fit.negative_log_likelihood)(x)),
        "iterations": iterations,
        "cpu_seconds": seconds,
        "build_seconds": program.build_seconds,
    }


def _fit_by_gradients(fit: Fit, adam: int, lbfgs: int, clock: Clock) -> dict[str, Any]:
    """Adam from the nominal parameters, then L-BFGS-B."""
    value_and_grad = jax.value_and_grad(fit.negative_log_likelihood)
    optim = optax.adam(optax.cosine_decay_schedule(1e-3, adam))

    def train(x: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            x, state = carry
            _, gradient = value_and_grad(x)
            updates, state = optim.update(gradient, state)
            x = jnp.clip(x + updates, fit.lower, fit.upper)
            return (x, state), None

        return jax.lax.scan(step, (x, optim.init(x)), length=adam)[0][0]

    x = jnp.asarray(fit.nominal)
    by_adam = compile_program(clock, train, x)
    gradient = compile_program(clock, value_and_grad, x)
    before = clock.now()
    x0 = np.asarray(by_adam.run(x))
    end = peers.fit_by_lbfgs(fit, gradient.run, x0, lbfgs, TOLERANCE)
    return {
        "method": "Adam, L-BFGS-B",
        "best_llh": -end.value,
        "iterations": adam + end.iterations,
        "cpu_seconds": clock.now() - before,
        "build_seconds": by_adam.build_seconds + gradient.build_seconds,
    }
