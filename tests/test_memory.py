"""Compiled memory, which is what the machine will need."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad

from .problems import Field, relative_error


def _temporary_bytes(fn, *args):
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _loss(solve, adjoint, max_steps):
    def loss(y0, dt0):
        sol = solve(
            diffrax.ODETerm(lambda t, y, args: -y * jnp.roll(y, 1)),
            diffrax.Tsit5(),
            0.0,
            1.0,
            dt0,
            y0,
            stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
            adjoint=adjoint,
            max_steps=max_steps,
        )
        return jnp.sum(sol.ys)

    return jax.value_and_grad(loss)


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [1024, 4096, 65536])
def test_default_needs_no_more_memory_than_that_of_diffrax(max_steps):
    y0, dt0 = jnp.ones(1000), jnp.array(0.1)
    theirs = _temporary_bytes(
        _loss(diffrax.diffeqsolve, diffrax.RecursiveCheckpointAdjoint(), max_steps),
        y0,
        dt0,
    )
    for solve in (nodegrad.odesolve, diffrax.diffeqsolve):
        ours = _temporary_bytes(_loss(solve, nodegrad.ACAAdjoint(), max_steps), y0, dt0)
        assert ours <= theirs


def test_memory_follows_the_checkpoints_and_not_the_rejections():
    # The number of rejections is a run-time matter: one program serves both.
    value_and_grad = jax.jit(_loss(nodegrad.odesolve, nodegrad.ACAAdjoint(32), 1024))
    y0 = jnp.ones(1000)
    compiled = value_and_grad.lower(y0, jnp.array(1e-2)).compile()
    before = compiled.memory_analysis().temp_size_in_bytes
    _, few = compiled(y0, jnp.array(1e-2))
    _, many = compiled(y0, jnp.array(1e3))
    assert relative_error(few, many) < 1e-3
    per_state = 8 * 1000
    wide = _temporary_bytes(
        _loss(nodegrad.odesolve, nodegrad.ACAAdjoint(64), 1024), y0, jnp.array(1e-2)
    )
    # 64 + 16 rows against 32 + 32.
    assert abs((wide - before) / per_state - 16) < 3


@pytest.mark.slow
def test_batched_needs_a_sixth_of_the_memory_of_vmap():
    field = Field(128, 128, jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(1), (128, 128))

    def loss(field, y0, batched):
        solve = lambda y0, batched: nodegrad.odesolve(
            field, diffrax.Tsit5(), 0.0, 1.0, 0.02, y0, batched=batched, max_steps=50
        )
        ys = (
            solve(y0, True).ys
            if batched
            else jax.vmap(lambda y: solve(y, False).ys)(y0)
        )
        return jnp.sum(ys**2)

    compiled = {}
    for batched in (True, False):
        grad = jax.jit(lambda f, y, b=batched: jax.value_and_grad(loss)(f, y, b))
        compiled[batched] = grad.lower(field, y0).compile()
    memory = {b: c.memory_analysis().temp_size_in_bytes for b, c in compiled.items()}
    assert 6 * memory[True] <= memory[False]
    (_, ours), (_, theirs) = compiled[True](field, y0), compiled[False](field, y0)
    assert relative_error(ours, theirs) < 1e-12
