"""Compiled memory, which is what the machine will need."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad

from ..problems import Field, relative_error


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


@pytest.mark.slow
def test_a_large_max_steps_costs_little():
    y0, dt0 = jnp.ones(1), jnp.array(1e-3)
    for solve in (nodegrad.odesolve, diffrax.diffeqsolve):
        loss = _loss(solve, nodegrad.ACAAdjoint(), 40_000_000)
        assert _temporary_bytes(loss, y0, dt0) < 2e6


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


@pytest.mark.parametrize(
    "kind", [pytest.param("auto", marks=pytest.mark.slow), 10, "EES25"]
)
def test_resyncs_allocate_the_rows_that_are_stated(kind):
    # 17 rows in the forward pass, and 16 more in the backward pass.
    if kind == "EES25":
        make, states = (lambda every: nodegrad.EES25(resync_every=every)), 1
    else:
        make = lambda every: nodegrad.Reversible(diffrax.Heun(), resync_every=every)
        states = 2

    def needed(every):
        def loss(rate):
            field = lambda t, y, rate: -rate * jnp.sin(y)
            sol = nodegrad.odesolve(
                field, make(every), 0.0, 1.0, 1e-3, jnp.ones(5000), rate,
                adjoint=nodegrad.ReversibleAdjoint(), max_steps=4096,
            )  # fmt: skip
            return jnp.sum(sol.ys)

        return _temporary_bytes(jax.grad(loss), 0.5) / (8 * 5000)

    extra = needed(10 if kind == "EES25" else kind) - needed(None)
    assert 33 * states <= extra <= 33 * states + 4


@pytest.mark.exhaustive
def test_a_batch_needs_an_eighth_of_the_memory_of_diffrax():
    field = Field(128, 128, jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(1), (128, 128))

    def loss(solve, field, y0, **kwargs):
        term = diffrax.ODETerm(field)
        sol = solve(term, diffrax.Tsit5(), 0.0, 1.0, 0.02, y0, max_steps=51, **kwargs)
        return jnp.sum(sol.ys**2)

    def vmapped(solve, **kwargs):
        one = lambda field, y0: loss(solve, field, y0, **kwargs)
        return lambda field, y0: jnp.sum(jax.vmap(one, (None, 0))(field, y0))

    losses = {
        "batched": lambda f, y: loss(nodegrad.odesolve, f, y, batched=True),
        "native": vmapped(nodegrad.odesolve),
        "door": vmapped(diffrax.diffeqsolve, adjoint=nodegrad.ACAAdjoint()),
        "theirs": vmapped(diffrax.diffeqsolve),
    }
    compiled, gradients = {}, {}
    for name, fn in losses.items():
        compiled[name] = jax.jit(jax.value_and_grad(fn)).lower(field, y0).compile()
        _, gradients[name] = compiled[name](field, y0)
    memory = {n: c.memory_analysis().temp_size_in_bytes for n, c in compiled.items()}
    for name in ("batched", "native", "door"):
        assert 8 * memory[name] <= memory["theirs"]
        assert abs(memory[name] / memory["native"] - 1) < 0.05
        assert relative_error(gradients[name], gradients["theirs"]) < 1e-12
