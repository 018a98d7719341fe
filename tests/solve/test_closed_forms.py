"""Gradients of problems whose solution, or whose discrete solution, has a formula."""

import math

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import pytest

import nodegrad


TIGHT = diffrax.PIDController(1e-10, 1e-12)


def _solve(field, y0, args, t0=0.0, t1=1.0, controller=TIGHT, dt0=None, **kwargs):
    return nodegrad.odesolve(
        field,
        kwargs.pop("solver", diffrax.Dopri8()),
        t0,
        t1,
        dt0,
        y0,
        args,
        stepsize_controller=controller,
        **kwargs,
    )


def _grads(loss, *args):
    argnums = tuple(range(len(args)))
    return jax.jit(jax.grad(loss, argnums=argnums))(*map(jnp.asarray, args))


def test_exponential():
    def loss(z0, alpha, t0, t1):
        return _solve(lambda t, z, a: a * z, z0, alpha, t0, t1).ys[0] ** 2

    z0, alpha, t0, t1 = 1.3, -0.7, 0.2, 1.4
    length = t1 - t0
    energy = z0**2 * math.exp(2 * alpha * length)
    expected = (
        2 * z0 * math.exp(2 * alpha * length),
        2 * length * energy,
        -2 * alpha * energy,
        2 * alpha * energy,
    )
    assert jnp.allclose(
        jnp.stack(_grads(loss, z0, alpha, t0, t1)), jnp.array(expected), rtol=1e-8
    )


@pytest.mark.parametrize("checkpoints", [None, 3])
def test_discrete_exponential_to_rounding(checkpoints):
    # z_N = R(x)^N z0 with the stability polynomial R of RK4 and x = alpha h.
    num_steps, z0, alpha, t1 = 20, 1.3, -0.7, 1.4

    def loss(z0, alpha):
        sol = _solve(
            lambda t, z, a: a * z,
            z0,
            alpha,
            t1=t1,
            controller=diffrax.StepTo(jnp.linspace(0.0, t1, num_steps + 1)),
            solver=nodegrad.RK4(),
            adjoint=nodegrad.ACAAdjoint(checkpoints),
            max_steps=num_steps,
        )
        return sol.ys[0] ** 2

    h = t1 / num_steps
    x = alpha * h
    growth = 1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24
    slope = 1 + x + x**2 / 2 + x**3 / 6
    grad_z0, grad_alpha = _grads(loss, z0, alpha)
    assert jnp.allclose(grad_z0, 2 * z0 * growth ** (2 * num_steps), rtol=1e-13)
    expected = 2 * num_steps * h * z0**2 * growth ** (2 * num_steps - 1) * slope
    assert jnp.allclose(grad_alpha, expected, rtol=1e-13)


@pytest.mark.slow
def test_linear_system():
    matrix = jr.normal(jr.PRNGKey(0), (3, 3))
    y0, g, t1 = jnp.array([1.0, -0.5, 0.3]), jnp.array([0.2, 1.0, -0.7]), 0.8

    def loss(matrix, y0, t1):
        return g @ _solve(lambda t, y, a: a @ y, y0, matrix, t1=t1).ys[0]

    grad_matrix, grad_y0, grad_t1 = _grads(loss, matrix, y0, t1)
    flow = jsl.expm(matrix * t1)
    block = jnp.block([[matrix.T, jnp.outer(g, y0)], [jnp.zeros((3, 3)), matrix.T]])
    assert jnp.allclose(grad_y0, flow.T @ g, rtol=1e-8)
    assert jnp.allclose(grad_t1, g @ matrix @ flow @ y0, rtol=1e-8)
    assert jnp.allclose(grad_matrix, jsl.expm(block * t1)[:3, 3:], rtol=1e-7)


def test_logistic():
    rate, capacity, y0, t1 = 1.5, 2.0, 0.3, 1.2

    def loss(rate, capacity, y0):
        field = lambda t, y, args: args[0] * y * (1 - y / args[1])
        return _solve(field, y0, (rate, capacity), t1=t1).ys[0]

    decay = math.exp(-rate * t1)
    e = (capacity / y0 - 1) * decay
    d = 1 + e
    expected = (
        capacity * t1 * e / d**2,
        1 / d - capacity * decay / (y0 * d**2),
        capacity**2 * decay / (y0**2 * d**2),
    )
    grads = jnp.stack(_grads(loss, rate, capacity, y0))
    assert jnp.allclose(grads, jnp.array(expected), rtol=1e-8)
    second = jax.hessian(loss)(rate, capacity, y0)
    assert jnp.allclose(second, capacity * t1**2 * e * (e - 1) / d**3, rtol=1e-6)


def test_non_autonomous():
    theta, y0, t0, t1 = 0.8, 1.1, 0.4, 2.0

    def loss(theta, y0, t0, t1):
        field = lambda t, y, theta: theta * y * jnp.cos(t)
        return _solve(field, y0, theta, t0, t1).ys[0]

    span = math.sin(t1) - math.sin(t0)
    y1 = y0 * math.exp(theta * span)
    expected = (
        span * y1,
        y1 / y0,
        -theta * math.cos(t0) * y1,
        theta * math.cos(t1) * y1,
    )
    grads = jnp.stack(_grads(loss, theta, y0, t0, t1))
    assert jnp.allclose(grads, jnp.array(expected), rtol=1e-7)


def test_cubic_decay():
    theta, y0, t1 = 0.9, 1.4, 1.0

    def loss(theta, y0):
        return _solve(lambda t, y, theta: -0.5 * theta * y**3, y0, theta).ys[0]

    base = 1 + theta * y0**2 * t1
    expected = (-0.5 * y0**3 * t1 * base**-1.5, base**-1.5)
    assert jnp.allclose(
        jnp.stack(_grads(loss, theta, y0)), jnp.array(expected), rtol=1e-8
    )


def test_pure_quadrature():
    def loss(theta):
        field = lambda t, y, theta: theta * jnp.exp(-t) + 0.0 * y
        return _solve(field, 0.0, theta, t1=2.0).ys[0]

    assert jnp.allclose(jax.grad(loss)(0.3), 1 - math.exp(-2.0), rtol=1e-9)


def test_gradient_of_the_save_times_is_the_vector_field():
    ts = jnp.array([0.0, 0.11, 0.12, 0.5, 1.0])

    def loss(ts):
        sol = _solve(
            lambda t, z, a: a * z, 1.0, -0.7, saveat=diffrax.SaveAt(ts=ts), max_steps=64
        )
        return jnp.sum(sol.ys)

    # The interpolant of Dopri8 is of lower order than the method.
    assert jnp.allclose(jax.grad(loss)(ts), -0.7 * jnp.exp(-0.7 * ts), rtol=1e-4)


def test_strongly_damped_problem_keeps_an_exact_gradient():
    # lambda T = 50: integrating the state backwards loses 21 digits.
    rate = 50.0

    def loss(y0, rate):
        field = lambda t, y, rate: -rate * (y - jnp.cos(t))
        return _solve(field, y0, rate, solver=diffrax.Tsit5()).ys[0]

    grad_y0, grad_rate = _grads(loss, 0.7, rate)
    # y = p(t) + (y0 - p(0)) exp(-rate t)
    p = lambda r, t: (r**2 * jnp.cos(t) + r * jnp.sin(t)) / (1 + r**2)
    exact = lambda y0, r: p(r, 1.0) + (y0 - p(r, 0.0)) * jnp.exp(-r)
    expected = jax.grad(exact, argnums=(0, 1))(0.7, rate)
    assert abs(grad_y0 - expected[0]) < 1e-11
    assert jnp.allclose(grad_rate, expected[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_ts", "jump_ts"])
def test_gradient_through_the_position_of_a_jump(name):
    # y' = -y + H(t - theta), S the integral of y: all of dS/dtheta comes through the
    # boundary between two steps.
    def total(theta, solve):
        field = lambda t, y, th: jnp.stack([-y[0] + jnp.where(t > th, 1.0, 0.0), y[0]])
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(1e-9, 1e-9), **{name: jnp.stack([theta])}
        )
        sol = solve(
            diffrax.ODETerm(field),
            # Not first-same-as-last, which would need to be told of the jump.
            diffrax.Heun() if name == "step_ts" else diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            jnp.array([1.0, 0.0]),
            theta,
            stepsize_controller=controller,
            adjoint=nodegrad.ACAAdjoint(),
            max_steps=65536 if name == "step_ts" else 4096,
        )
        return sol.ys[0, 1]

    for solve in (nodegrad.odesolve, diffrax.diffeqsolve):
        grad = jax.jit(jax.grad(total), static_argnums=1)(jnp.array(0.5), solve)
        rtol = 1e-3 if name == "step_ts" else 1e-6
        assert jnp.allclose(grad, math.exp(-0.5) - 1, rtol=rtol)
