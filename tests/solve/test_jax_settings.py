"""Solves under settings and transformations of JAX that its users debug and ship with.

Oracle: the same derivative without them.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import export

import nodegrad

from ..matrix import DOORS
from ..problems import relative_error


def _solve(door, y0, args, t1=1.0, **options):
    return DOORS[door](
        diffrax.ODETerm(lambda t, y, args: -args * y**2),
        diffrax.Bosh3(),
        0.0,
        t1,
        0.25,
        y0,
        args,
        stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
        adjoint=nodegrad.ACAAdjoint(),
        max_steps=32,
        **options,
    ).ys[0]


def _pushed(value):
    # Python numbers: only `jit` makes arrays of these.
    return jax.jvp(value, (0.7, 1.3, 1.0), (1.0, 2.0, 0.5))


def _pulled(value):
    return jax.grad(value, (0, 1, 2))(0.7, 1.3, 1.0)


@pytest.mark.rows(test=1, ci=4)
@pytest.mark.parametrize("derivative", [_pushed, _pulled])
@pytest.mark.parametrize("door", DOORS)
def test_without_jit_a_derivative_by_python_numbers_is_the_same(door, derivative):
    value = lambda *inputs: _solve(door, *inputs)
    expected = derivative(value)
    with jax.disable_jit():
        got = derivative(value)
    assert relative_error(got, expected) < 1e-14


@pytest.fixture
def debug_nans():
    with jax.debug_nans(True):
        yield


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("door", DOORS)
def test_debug_nans_finds_none_in_a_good_gradient(door, debug_nans):
    # Nothing is jitted: JAX looks at every array that an operation returns.
    gradient = jax.vmap(jax.grad(lambda y0: _solve(door, y0, 1.3)))
    y0 = jnp.array([0.7, 0.5])
    # The solution of y' = -a y^2 is y0 / (1 + a y0 t).
    assert np.allclose(gradient(y0), 1 / (1 + 1.3 * y0) ** 2, rtol=1e-2)


def test_debug_nans_finds_none_in_a_good_curvature(debug_nans):
    def losses(layer, y0):
        field = lambda t, y, args: jnp.tanh(layer(y))
        solver = diffrax.Heun()
        sol = nodegrad.odesolve(field, solver, 0.0, 1.0, 0.25, y0, batched=True)
        return jnp.sum(sol.ys[:, 0] ** 2, axis=1)

    layer = eqx.nn.Linear(2, 2, key=jr.PRNGKey(0))
    fn = nodegrad.value_grad_and_curvature(losses)
    value, *_ = fn(layer, jnp.ones((3, 2)))
    assert value > 0


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("door", DOORS)
def test_a_gradient_is_exported_for_any_batch_size(door):
    value = lambda y0: _solve(door, y0, 1.3, throw=False)
    gradient = jax.jit(jax.vmap(jax.grad(value)))
    (size,) = export.symbolic_shape("size")
    exported = export.export(gradient)(jax.ShapeDtypeStruct((size,), jnp.float64))
    y0 = jnp.array([0.7, 0.5, 0.2])
    assert relative_error(exported.call(y0), gradient(y0)) < 1e-15
