"""Complex states: values, gradients and dense output, under strict dtype promotion.

Gradients follow the convention of JAX: `jax.grad` of a real function of `y0` is the
conjugate of the direction of steepest ascent.
"""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import pytest

import nodegrad

from ..matrix import DOORS
from ..problems import relative_error


METHODS = {
    "aca": (diffrax.Tsit5(), nodegrad.ACAAdjoint(), 1e-10),
    "aca of another solver": (
        diffrax.HalfSolver(diffrax.Heun()),
        nodegrad.ACAAdjoint(),
        1e-3,
    ),
    "reversible": (
        nodegrad.Reversible(diffrax.Tsit5(), resync_every=10),
        nodegrad.ReversibleAdjoint(),
        1e-9,
    ),
    "alf": (nodegrad.ALF(), nodegrad.ReversibleAdjoint(), 1e-3),
    "reversible Heun": (diffrax.ReversibleHeun(), nodegrad.ReversibleAdjoint(), 1e-3),
}
Y0 = jnp.array([1.0 + 0.5j, -0.3j])


def _rotation(t, y, w):
    del t
    return 1j * w.astype(complex) * y


def _two_levels(t, y, w):
    # A two-level system, driven at frequency `w`.
    drive = jnp.cos(w * t).astype(complex)
    return -1j * jnp.stack([y[0] + drive * y[1], drive * y[0] - y[1]])


def _loss(field, method, door, controller=None):
    solver, adjoint, _ = METHODS[method]

    def loss(y0, w):
        sol = DOORS[door](
            diffrax.ODETerm(field),
            solver,
            0.0,
            1.0,
            None if controller else 0.01,
            y0,
            w,
            stepsize_controller=controller or diffrax.ConstantStepSize(),
            adjoint=adjoint,
            max_steps=4096,
        )
        return jnp.real(jnp.sum(jnp.array([1.0 - 2.0j, 0.5j]) * sol.ys[0]))

    return loss


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.rows(test=2, ci=5)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_closed_form(method, door):
    exact = lambda y0, w: jnp.real(
        jnp.sum(jnp.array([1.0 - 2.0j, 0.5j]) * jnp.exp(1j * w.astype(complex)) * y0)
    )
    w = jnp.array(1.7)
    expected = jax.grad(exact, argnums=(0, 1))(Y0, w)
    ours = jax.jit(jax.grad(_loss(_rotation, method, door), argnums=(0, 1)))(Y0, w)
    assert ours[0].dtype == Y0.dtype and ours[1].dtype == w.dtype
    assert relative_error(ours, expected) < METHODS[method][2]


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["reversible", "aca", "alf"])
def test_gradients_of_a_driven_system_are_those_of_diffrax(method):
    # Adaptive steps, and the same solver with Diffrax's default adjoint.
    pid, w = diffrax.PIDController(1e-6, 1e-6), jnp.array(1.7)
    solver, _, _ = METHODS[method]

    def default(y0, w):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_two_levels),
            solver,
            0.0,
            1.0,
            None,
            y0,
            w,
            stepsize_controller=pid,
        )
        return jnp.real(jnp.sum(jnp.array([1.0 - 2.0j, 0.5j]) * sol.ys[0]))

    expected = jax.jit(jax.grad(default, argnums=(0, 1)))(Y0, w)
    for door in DOORS:
        loss = _loss(_two_levels, method, door, pid)
        assert (
            relative_error(jax.jit(jax.grad(loss, argnums=(0, 1)))(Y0, w), expected)
            < 1e-9
        )
        _, slope = jax.jit(
            lambda w, loss=loss: jax.jvp(ft.partial(loss, Y0), (w,), (w,))
        )(w)
        assert relative_error(slope, w * expected[1]) < 1e-9


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
def test_dense_output_has_a_derivative():
    sol = nodegrad.odesolve(
        _rotation,
        diffrax.Tsit5(),
        0.0,
        1.0,
        0.05,
        Y0,
        jnp.array(1.7),
        saveat=diffrax.SaveAt(dense=True),
    )
    t = jnp.array(0.52)
    y = jnp.exp(1.7j * t.astype(complex)) * Y0
    assert jnp.allclose(sol.evaluate(t), y, atol=1e-9)
    assert jnp.allclose(sol.derivative(t), 1.7j * y, atol=1e-6)
