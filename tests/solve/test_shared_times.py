"""Solves that take the same steps share the times of these steps.

With constant or prescribed steps what a vector field computes from time alone is
computed once for all samples of a batch, forwards and backwards.
"""

import re

import diffrax
import jax
import jax.numpy as jnp
import pytest

import nodegrad

from ..problems import relative_error


DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
CONTROLLERS = {
    "constant": (diffrax.ConstantStepSize(), 0.05),
    "prescribed": (diffrax.StepTo(jnp.linspace(0.0, 1.5, 31) ** 2 / 1.5), None),
}


def _solve(door, controller, field, y0, args, t1=1.5, solver=None, **kwargs):
    controller, dt0 = CONTROLLERS[controller]
    return DOORS[door](
        diffrax.ODETerm(field),
        diffrax.Tsit5() if solver is None else solver,
        0.0,
        t1,
        dt0,
        y0,
        args,
        stepsize_controller=controller,
        **kwargs,
    )


def _error_of_batch(loss, w, xs):
    """The gradients of a batch that shares `w`, against those of each sample alone."""
    sums = lambda w, xs: jnp.sum(jax.vmap(loss, (None, 0))(w, xs))
    grads = jax.jit(jax.grad(sums, argnums=(0, 1)))(w, xs)
    grad_of_one = jax.jit(jax.grad(loss, argnums=(0, 1)))
    each = [grad_of_one(w, x) for x in xs]
    expected = sum(g[0] for g in each), jnp.stack([g[1] for g in each])
    return relative_error(grads, expected)


def _gated(t, y, w):
    # No other part of a program has an inverse error function.
    return jnp.tanh(y * jax.lax.erf_inv(0.5 * t * w))


@pytest.mark.parametrize(
    "door, checkpoints, controller",
    [
        ("native", 4, "constant"),
        pytest.param("native", "undone", "constant", marks=pytest.mark.slow),
        pytest.param("diffrax", None, "constant", marks=pytest.mark.slow),
        pytest.param("diffrax", 4, "prescribed", marks=pytest.mark.slow),
        pytest.param("native", None, "prescribed", marks=pytest.mark.slow),
    ],
)
def test_what_depends_on_time_alone_is_computed_once(door, checkpoints, controller):
    if checkpoints == "undone":
        adjoint = nodegrad.ReversibleAdjoint()
        # With restarts every sample is solved again from times of its own.
        solver = nodegrad.Reversible(diffrax.Bosh3(), resync_every=None)
    else:
        adjoint, solver = nodegrad.ACAAdjoint(checkpoints), diffrax.Tsit5()
    options = dict(adjoint=adjoint, solver=solver, max_steps=64)
    y0s = jnp.linspace(0.5, 1.0, 6).reshape(2, 3)
    w = jnp.array([0.3, 0.5, 0.7])

    def loss(w, y0s):
        solve = lambda y0: _solve(door, controller, _gated, y0, w, **options)
        return jnp.sum(jax.vmap(solve)(y0s).ys)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    lowered = grad.lower(w, y0s)
    shapes = re.findall(r"erf_inv.* -> (tensor<.*?>)", lowered.as_text())
    assert shapes and set(shapes) == {"tensor<3xf64>"}
    each = [grad(w, y0s[i : i + 1]) for i in range(2)]
    expected = each[0][0] + each[1][0], jnp.concatenate([each[0][1], each[1][1]])
    assert relative_error(lowered.compile()(w, y0s), expected) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["constant", "prescribed"])
def test_a_sample_that_fails_ends_where_it_fails_alone(controller):
    # The second sample is infinite at t = 1.
    y0s, w = jnp.array([[0.3], [1.0], [0.2]]), jnp.array(1.0)

    def solve(w, y0):
        return _solve(
            "native",
            controller,
            lambda t, y, w: w * y**2 * (1 + 0.1 * jnp.sin(t)),
            y0,
            w,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.5, 7), t1=True, dense=True),
            throw=False,
            max_steps=64,
        )

    def summary(sol):
        ys = jnp.where(jnp.isfinite(sol.ys), sol.ys, 0)
        steps = jnp.where(jnp.isfinite(sol.interpolation.ts), sol.interpolation.ts, 0)
        stats = {k: x for k, x in sol.stats.items() if k != "max_steps"}
        return sol.ts, ys, steps, stats, sol.result == nodegrad.RESULTS.successful

    one = jax.jit(lambda y0: summary(solve(w, y0)))
    together = jax.jit(jax.vmap(one))(y0s)
    alone = [one(y0) for y0 in y0s]
    alone = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert together[-1].tolist() == [True, False, True]
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert jnp.allclose(x, y, rtol=1e-14, atol=0)

    # The derivative of the part that was solved, by every sample of the batch.
    total = lambda w, y0: jnp.sum(summary(solve(w, y0))[1])
    assert _error_of_batch(total, w, y0s) < 1e-12


def _fragile(t, y, w):
    # Not a number for y = 1 after t = 1, where no sample gets to.
    return w * y**2 + 0.01 * jnp.sqrt(10 * (y - 1) ** 2 + 1 - t)


def test_a_sample_that_fails_is_not_evaluated_where_it_never_was():
    # The second sample starts at y = 1 and is infinite before t = 1.
    y0s, w = jnp.array([[0.3], [1.0], [0.2]]), jnp.array(1.0)

    def total(w, y0):
        return jnp.sum(
            _solve("native", "constant", _fragile, y0, w, throw=False, max_steps=64).ys
        )

    def sums(w, y0s):
        losses = jax.vmap(total, (None, 0))(w, y0s)
        return losses[0] + losses[2]

    grads = jax.jit(jax.grad(sums, argnums=(0, 1)))(w, y0s)
    grad_of_one = jax.jit(jax.grad(total, argnums=(0, 1)))
    first, last = grad_of_one(w, y0s[0]), grad_of_one(w, y0s[2])
    expected = first[0] + last[0], jnp.stack([first[1], 0 * first[1], last[1]])
    assert relative_error(grads, expected) < 1e-12


def test_a_loop_ends_when_all_samples_have_failed():
    count = 0

    def counted(t, y, args):
        def add(_):
            nonlocal count
            count += 1

        jax.debug.callback(add, t)
        return y**2

    solve = lambda y0: nodegrad.odesolve(
        counted, diffrax.Euler(), 0.0, 1000.0, 0.1, y0, max_steps=2**14, throw=False
    )
    sol = jax.block_until_ready(jax.vmap(solve)(jnp.array([[2.0], [3.0]])))
    jax.effects_barrier()
    assert jnp.all(sol.result == nodegrad.RESULTS.vector_field_not_finite)
    assert jnp.all(sol.stats["num_steps"] < 40)
    assert count < 100


@pytest.mark.slow
def test_samples_with_times_of_their_own_have_steps_of_their_own():
    w, y0 = jnp.array([0.3, 0.5, 0.7]), jnp.array([0.5, 1.0, 0.2])
    t1s = jnp.array([0.4, 1.1, 1.5])

    def loss(w, t1):
        sol = _solve("native", "constant", _gated, y0, w, t1, max_steps=64)
        return jnp.sum(sol.ys**2)

    assert _error_of_batch(loss, w, t1s) < 1e-13
