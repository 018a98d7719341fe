"""What is equal to Diffrax on a rough control, and what is not.

A controlled equation whose control is a random walk: adaptive steps are at the edge of
acceptance, so that rounding decides which of them are accepted.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad


_TIMES = jnp.linspace(0.0, 1.0, 100)
_WALKS = 0.3 * jnp.cumsum(jr.normal(jr.PRNGKey(0), (8, 100, 3)), axis=1)
_NET = eqx.nn.MLP(4, 12, 16, 1, jnp.tanh, jnp.tanh, key=jr.PRNGKey(1))
_PID = diffrax.PIDController(1e-3, 1e-6)


def _solve(solver, walk, controller=_PID, **options):
    control = diffrax.LinearInterpolation(_TIMES, walk)
    field = lambda t, y, args: jnp.reshape(_NET(y), (4, 3))
    return solver(
        diffrax.ControlTerm(field, control).to_ode(),
        diffrax.Tsit5(),
        0.0,
        1.0,
        None,
        jnp.full(4, 0.1),
        stepsize_controller=controller,
        **options,
    )


def _difference(left, right):
    return jnp.max(jnp.abs(left - right), axis=-1) / jnp.max(jnp.abs(left), axis=-1)


@pytest.mark.slow
def test_with_the_same_steps_solutions_are_equal_to_rounding():
    save = diffrax.SaveAt(steps=True)
    adaptive = eqx.filter_jit(_solve)(diffrax.diffeqsolve, _WALKS[0], saveat=save)
    accepted = adaptive.ts[jnp.isfinite(adaptive.ts)]
    assert len(accepted) > 100
    steps = diffrax.StepTo(jnp.concatenate([jnp.zeros(1), accepted]))

    def last(solver):
        return eqx.filter_jit(_solve)(solver, _WALKS[0], steps).ys[-1]

    diffrax_last, ours = last(diffrax.diffeqsolve), last(nodegrad.odesolve)
    assert _difference(diffrax_last, ours) < 1e-11
    # They are those of the adaptive solve, too.
    assert _difference(adaptive.ys[len(accepted) - 1], ours) < 1e-11


@pytest.mark.exhaustive
def test_adaptive_steps_differ_as_those_of_diffrax_with_and_without_vmap():
    def found(solver, over):
        run = jax.jit(lambda walk: _solve(solver, walk).ys[-1])
        return over(run)(_WALKS)

    one_by_one = lambda run: lambda walks: jnp.stack([run(walk) for walk in walks])
    reference = found(diffrax.diffeqsolve, one_by_one)
    itself = _difference(reference, found(diffrax.diffeqsolve, jax.vmap))
    ours = _difference(reference, found(nodegrad.odesolve, one_by_one))
    assert jnp.max(itself) > 1e-9
    assert jnp.max(ours) < 100 * jnp.max(itself)
