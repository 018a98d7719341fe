"""Reversible solvers in controlled and in stochastic equations."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import nodegrad
from nodegrad._internal.batch import Axes, Batch

from ..matrix import DOORS
from ..problems import relative_error


RCA = diffrax.RecursiveCheckpointAdjoint()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "door, solver, control",
    [
        ("native", nodegrad.Reversible(diffrax.Heun()), "linear"),
        ("diffrax", nodegrad.Reversible(diffrax.Heun()), "cubic"),
        ("diffrax", diffrax.ReversibleHeun(), "linear"),
        ("native", nodegrad.ALF(), "cubic"),
    ],
    ids=str,
)
def test_gradient_reaches_the_path_of_a_controlled_equation(door, solver, control):
    ts = jnp.linspace(0.0, 1.0, 6)
    xs = jnp.stack([ts, jnp.sin(3 * ts)], axis=-1)
    field = lambda t, y, w: jnp.tanh(w @ y).reshape(3, 2)

    def loss(xs, w, y0, solve, adjoint):
        if control == "linear":
            path = diffrax.LinearInterpolation(ts, xs)
            controller = diffrax.ClipStepSizeController(
                diffrax.PIDController(1e-3, 1e-4), jump_ts=ts[1:-1]
            )
        else:
            coefficients = diffrax.backward_hermite_coefficients(ts, xs)
            path = diffrax.CubicInterpolation(ts, coefficients)
            controller = diffrax.ConstantStepSize()
        sol = solve(
            diffrax.ControlTerm(field, path),
            solver,
            0.0,
            1.0,
            0.07,
            y0,
            w,
            saveat=diffrax.SaveAt(ts=[0.2, 0.5, 1.0]),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
        )
        return jnp.sum(sol.ys**2)

    w = 0.5 * jr.normal(jr.PRNGKey(0), (6, 3))
    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=(3, 4))
    point = xs, w, jnp.array([0.5, -0.3, 0.8])
    expected = grad(*point, diffrax.diffeqsolve, RCA)
    ours = grad(*point, DOORS[door], nodegrad.ReversibleAdjoint())
    assert relative_error(ours, expected) < 1e-10


def _noises():
    """Diffusions `(shape of the noise, g(t, y, a))`."""
    additive = lambda t, y, a: a * jnp.array([[0.3, 0.1], [0.0, 0.2]])
    general = lambda t, y, a: a * jnp.stack([jnp.sin(y), 0.3 * jnp.cos(y)])
    diagonal = lambda t, y, a: lx.DiagonalLinearOperator(0.2 * a * jnp.sin(y) + 0.1)
    return dict(additive=additive, general=general, diagonal=diagonal)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "solver, noise",
    [
        (nodegrad.Reversible(diffrax.Heun()), "additive"),
        (nodegrad.Reversible(diffrax.Heun()), "general"),
        (nodegrad.Reversible(diffrax.Midpoint(), 0.99, resync_every=4), "general"),
        (diffrax.ReversibleHeun(), "general"),
        (nodegrad.Reversible(diffrax.Heun()), "diagonal"),
    ],
    ids=str,
)
def test_gradient_along_a_brownian_path_is_that_of_its_increments(noise, solver):
    n, key, diffusion = 20, jr.PRNGKey(3), _noises()[noise]
    drift = diffrax.ODETerm(lambda t, y, a: -a * y)
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(2,), key=key)
    unsafe = diffrax.UnsafeBrownianPath(shape=(2,), key=key)
    ts = jnp.linspace(0.0, 1.0, n + 1)

    def stored(path):
        # The same increments, as the slopes of a piecewise linear path.
        increments = jax.vmap(path.evaluate)(ts[:-1], ts[1:])
        values = jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(increments, axis=0)])
        return diffrax.LinearInterpolation(ts, values)

    def loss(y0, a, path, solve, adjoint):
        terms = diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))
        sol = solve(
            terms,
            solver,
            0.0,
            1.0,
            None,
            y0,
            a,
            stepsize_controller=diffrax.StepTo(ts),
            adjoint=adjoint,
        )
        return jnp.sum(sol.ys**2)

    y0, a = jnp.array([1.0, 0.5]), jnp.array(0.7)
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(3, 4))
    for path, door in ((tree, "diffrax"), (unsafe, "native")):
        expected = grad(y0, a, stored(path), diffrax.diffeqsolve, RCA)
        ours = grad(y0, a, path, DOORS[door], nodegrad.ReversibleAdjoint())
        assert relative_error(ours, expected) < 1e-10


@pytest.mark.filterwarnings("ignore:.*not known to converge")
@pytest.mark.parametrize("base", [diffrax.Euler(), diffrax.Tsit5()])
def test_refuses_base_solvers_of_another_calculus(base):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-2, shape=(), key=jr.PRNGKey(0))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(lambda t, y, args: 0.1 * y, path),
    )
    solver = nodegrad.Reversible(base)
    for solve in DOORS.values():
        with pytest.raises(ValueError, match="Stratonovich"):
            solve(terms, solver, 0.0, 1.0, 0.1, jnp.array(1.0))
    with pytest.raises(ValueError, match="without noise"):
        nodegrad.odesolve(terms, nodegrad.ALF(), 0.0, 1.0, 0.1, jnp.array(1.0))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "diffusion, solution, order",
    [
        # dy = a dw and dy = a y dw (Stratonovich), both with drift -y.
        (lambda t, y, args: jnp.array(0.5), None, 1.0),
        (
            lambda t, y, args: 0.5 * y,
            lambda w: jnp.exp(0.5 * w - 1.0),
            1.0,
        ),
    ],
    ids=["additive", "multiplicative"],
)
@pytest.mark.parametrize(
    "solver",
    [nodegrad.Reversible(diffrax.Heun()), diffrax.ReversibleHeun()],
    ids=["Reversible(Heun)", "ReversibleHeun"],
)
def test_strong_order(diffusion, solution, order, solver):
    drift = diffrax.ODETerm(lambda t, y, args: -y)

    def end(key, h):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=2**-11, shape=(), key=key)
        terms = diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))
        y1 = nodegrad.odesolve(terms, solver, 0.0, 1.0, h, jnp.array(1.0)).ys[0]
        return y1, path.evaluate(0.0, 1.0)

    keys = jr.split(jr.PRNGKey(0), 100)
    run = jax.jit(jax.vmap(end, in_axes=(0, None)))
    counts = (8, 16, 32, 64)
    # Without a closed form, many more steps on the same paths.
    finest, w = run(keys, 1 / 1024)
    exact = finest if solution is None else solution(w)
    errors = [float(jnp.mean(jnp.abs(run(keys, 1 / n)[0] - exact))) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope > order - 0.15


def test_rows_of_typed_keys_are_filled():
    # Each solve of a batch has the key of its noise. That of a solve which took no step
    # is replaced by another one's.
    keys = jax.random.split(jax.random.key(0), 3)
    invalid = jnp.array([True, False, False])
    filled = Batch((3,)).fill_shared_from_valid(invalid, keys, Axes((True,)))
    expected = jax.random.key_data(keys)[jnp.array([1, 1, 2])]
    np.testing.assert_array_equal(jax.random.key_data(filled), expected)
