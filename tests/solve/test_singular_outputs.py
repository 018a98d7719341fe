"""Outputs whose function has no derivative at times that are not saved.

Zero times NaN is NaN: what is not saved must not be differentiated, not even with a
cotangent of zero.
"""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import nodegrad

from ..matrix import DOORS


ACA = nodegrad.ACAAdjoint()
_DOORS = ["native", pytest.param("diffrax", marks=pytest.mark.slow)]


@pytest.mark.parametrize("door", _DOORS)
def test_at_the_start(door):
    # The derivative of y log(t) is infinite at t = 0.
    saveat = diffrax.SaveAt(
        ts=jnp.array([1.0, 2.0]), fn=lambda t, y, args: y * jnp.log(t)
    )

    @jax.jit
    def loss(y0):
        sol = DOORS[door](
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Tsit5(), 0.0, 2.0, 0.05, y0, None,
            saveat=saveat, adjoint=ACA, max_steps=64,
        )  # fmt: skip
        return jnp.sum(sol.ys)

    exact = jnp.exp(-2.0) * jnp.log(2.0)
    assert jnp.abs(jax.grad(loss)(1.0) - exact) < 1e-8
    assert jnp.abs(jax.jvp(loss, (1.0,), (1.0,))[1] - exact) < 1e-8


def test_rows_of_a_solve_without_steps_are_those_of_its_start():
    # The first sample makes no step.
    def ys(y0, t1):
        saveat = diffrax.SaveAt(
            ts=jnp.stack([t1 / 2, t1]), fn=lambda t, y, args: y * (1 + t)
        )
        return nodegrad.odesolve(
            lambda t, y, args: -y, diffrax.Tsit5(), 0.0, t1, 0.05, y0,
            saveat=saveat, max_steps=64,
        ).ys  # fmt: skip

    t1s = jnp.array([0.0, 0.5])
    jacobian = jax.jit(jax.vmap(jax.jacrev(ys), in_axes=(None, 0)))
    found = jacobian(jnp.array(2.0), t1s)
    ts = jnp.stack([t1s / 2, t1s], axis=1)
    assert jnp.max(jnp.abs(found - jnp.exp(-ts) * (1 + ts))) < 1e-8


@pytest.mark.parametrize("door", _DOORS)
def test_at_steps_that_are_not_saved(door):
    # After odd steps the state is -1, where the root has no derivative.
    def loss(rate):
        sol = DOORS[door](
            diffrax.ODETerm(
                lambda t, y, rate: -2 * rate * jnp.sign(jnp.sin(jnp.pi * (t + 1e-9)))
            ),
            diffrax.Euler(), 0.0, 8.0, 1.0, jnp.array(1.0), rate,
            saveat=diffrax.SaveAt(steps=2, fn=lambda t, y, args: jnp.sqrt(y)),
            adjoint=ACA, max_steps=8,
        )  # fmt: skip
        return jnp.sum(jnp.where(jnp.isfinite(sol.ts), sol.ys, 0))

    # Every second state is 1 for any rate.
    assert loss(1.0) == 4
    assert jax.jit(jax.grad(loss))(1.0) == 0


@pytest.mark.parametrize("door", _DOORS)
def test_of_other_samples(door):
    # The root of a state that another sample extrapolates to is NaN.
    def loss(scale, rate, y0):
        sol = DOORS[door](
            diffrax.ODETerm(lambda t, y, args: -args[0] * args[1] * y),
            diffrax.Tsit5(), 0.0, 6.0, None, y0, (scale, rate),
            saveat=diffrax.SaveAt(
                ts=jnp.array([0.0, 3.0, 5.9]), fn=lambda t, y, args: jnp.sqrt(y)
            ),
            stepsize_controller=diffrax.PIDController(1e-3, 1e-3),
            adjoint=ACA, max_steps=128,
        )  # fmt: skip
        return jnp.sum(sol.ys)

    rates = jnp.array([0.01, 0.5, 3.0, 1.5])
    y0 = jnp.array([1.0, 2.0, 0.5, 1.0])
    total = lambda scale: jnp.sum(jax.vmap(loss, (None, 0, 0))(scale, rates, y0))
    gradient = jax.jit(jax.grad(loss))
    alone = sum(gradient(1.0, rate, y) for rate, y in zip(rates, y0, strict=True))
    found = jax.jit(jax.grad(total))(1.0)
    # Two programs round differently, and their steps adapt.
    assert jnp.abs(found - alone) < 1e-11 * jnp.abs(alone)
