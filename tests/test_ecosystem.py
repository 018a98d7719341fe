"""Solves inside of what others build on forward mode, with their default options.

Optional: each test is skipped unless the package it is about is installed.
"""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import nodegrad

from .matrix import DOORS
from .problems import relative_error


# Logistic growth, whose rate and capacity are to be found again from 8 exact values.
_TIMES = jnp.linspace(0.25, 2.0, 8)
_TRUTH = jnp.array([2.0, 1.5])
_SMALL = jnp.array([0.1, 0.3])


def _closed_form(params, y0=_SMALL):
    rate, capacity = params
    grown = jnp.exp(rate * _TIMES)[:, None] * y0[None]
    return grown / (1 + (grown - y0[None]) / capacity)


def _grown(params, door, y0=_SMALL, throw=True, adjoint=None, tol=1e-8):
    """The solution at the times of the data."""
    return DOORS[door](
        diffrax.ODETerm(lambda t, y, params: params[0] * y * (1 - y / params[1])),
        diffrax.Tsit5(),
        0.0,
        2.0,
        None,
        y0,
        params,
        saveat=diffrax.SaveAt(ts=_TIMES),
        stepsize_controller=diffrax.PIDController(tol, tol),
        adjoint=nodegrad.ACAAdjoint() if adjoint is None else adjoint,
        max_steps=256,
        throw=throw,
    ).ys


def _solvers():
    optx = pytest.importorskip("optimistix")
    return {
        "LevenbergMarquardt": (optx.least_squares, optx.LevenbergMarquardt),
        "GaussNewton": (optx.least_squares, optx.GaussNewton),
        "Dogleg": (optx.least_squares, optx.Dogleg),
        "BFGS": (optx.minimise, optx.BFGS),
    }


_FITTERS = ["LevenbergMarquardt", "GaussNewton", "Dogleg", "BFGS"]


def _fit(name, door, start, throw):
    """The parameters found from `start`, and whether the fit ended well."""
    method, solver = _solvers()[name]
    data = _closed_form(_TRUTH)

    def residuals(params, args):
        return _grown(params, door, throw=throw) - data

    def loss(params, args):
        return 0.5 * jnp.sum(residuals(params, args) ** 2)

    fn = loss if name == "BFGS" else residuals
    sol = method(fn, solver(rtol=1e-8, atol=1e-8), start, throw=throw)
    return sol.value, sol.result


@pytest.mark.rows(test=0, ci=3)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", _FITTERS)
def test_optimistix_fits_a_solve(name, door):
    found, _ = jax.jit(lambda start: _fit(name, door, start, True))(_TRUTH - 0.3)
    assert relative_error(found, _TRUTH) < 1e-6


@pytest.mark.rows(test=0, ci=3)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", _FITTERS)
def test_optimistix_fits_many_starts_and_a_failed_one_poisons_none(name, door):
    optx = pytest.importorskip("optimistix")
    starts = _TRUTH[None] + 0.15 * jr.normal(jr.PRNGKey(0), (16, 2))
    # Blows up long before the end, and there is no number at all.
    starts = starts.at[3].set(jnp.array([5.0, -0.05])).at[7].set(jnp.nan)
    fits = jax.jit(jax.vmap(lambda start: _fit(name, door, start, False)))
    found, result = fits(starts)
    good = np.delete(np.arange(16), [3, 7])
    assert relative_error(found[good], jnp.tile(_TRUTH, (14, 1))) < 1e-6
    assert jnp.all((result == optx.RESULTS.successful)[good])
    assert not jnp.any((result == optx.RESULTS.successful)[np.array([3, 7])])


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_laplax_has_the_gauss_newton_matrix_of_a_solve(door):
    ggn = pytest.importorskip("laplax.curv.ggn")
    y0s = jnp.array([[0.1, 0.3], [0.2, 0.5], [0.4, 0.05]])
    targets = jnp.zeros((3, 16))
    model = lambda input, params: _grown(params, door, input).ravel()
    loss = lambda output, target: jnp.sum((output - target) ** 4)
    data = {"input": y0s, "target": targets}
    product = ggn.create_ggn_mv(model, _TRUTH, data, loss)
    matrix = jax.vmap(product)(jnp.eye(2))

    def dense(y0):
        output = lambda params: _closed_form(params, y0).ravel()
        jacobian = jax.jacfwd(output)(_TRUTH)
        return jacobian.T @ (12 * output(_TRUTH)[:, None] ** 2 * jacobian)

    # Up to the errors of the solves.
    assert relative_error(matrix, jnp.sum(jax.vmap(dense)(y0s), axis=0)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_matfree_has_the_eigenvalues_of_a_hessian(door):
    decomp = pytest.importorskip("matfree.decomp")
    weights = jr.normal(jr.PRNGKey(1), (3, 3))

    def loss(params):
        sol = DOORS[door](
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w.reshape(3, 3) @ y)),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            jnp.array([0.3, -0.5, 1.0]),
            params,
            adjoint=nodegrad.ACAAdjoint(),
            max_steps=16,
        )
        return jnp.sum(jnp.cos(3 * sol.ys))

    params = weights.ravel()
    lanczos = decomp.tridiag_sym(9, reortho="full", materialize=True)
    product = lambda v: nodegrad.hvp(loss, params, v)
    tridiagonal = jax.jit(lambda v: lanczos(product, v).J_small)(jnp.ones(9))
    expected = np.linalg.eigvalsh(jax.jit(jax.hessian(loss))(params))
    assert relative_error(np.linalg.eigvalsh(tridiagonal), expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_numpyro_has_the_laplace_approximation_of_a_solve(door):
    numpyro = pytest.importorskip("numpyro")
    data = _closed_form(_TRUTH) + 0.02 * jr.normal(jr.PRNGKey(2), (8, 2))

    prior = jnp.array([1.8, 1.4])

    def model(grown):
        normal = numpyro.distributions.Normal
        params = numpyro.sample("params", normal(prior, 0.5).to_event(1))
        numpyro.sample("data", normal(grown(params), 0.05), obs=data)

    ours = lambda params: _grown(params, door, tol=1e-10)
    start = numpyro.infer.init_to_value(values={"params": prior})
    guide = numpyro.infer.autoguide.AutoLaplaceApproximation(model, init_loc_fn=start)
    optimiser = numpyro.optim.Adam(0.02)
    svi = numpyro.infer.SVI(model, guide, optimiser, numpyro.infer.Trace_ELBO())
    result = svi.run(jr.PRNGKey(0), 100, ours, progress_bar=False)
    posterior = guide.get_posterior(result.params)

    def potential(params):
        misfit = jnp.sum((_closed_form(params) - data) ** 2) / 0.05**2
        return 0.5 * (jnp.sum((params - prior) ** 2) / 0.5**2 + misfit)

    hessian = jax.hessian(potential)(posterior.loc)
    covariance = jnp.linalg.inv(hessian)
    assert relative_error(posterior.covariance_matrix, covariance) < 1e-5
