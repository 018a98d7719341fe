"""The low-rank Gauss-Newton step against dense linear algebra."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import nodegrad

from ..problems import relative_error


def _tree(key, *lead):
    keys = jr.split(key, 2)
    return {"w": jr.normal(keys[0], (*lead, 3, 2)), "b": jr.normal(keys[1], (*lead, 4))}


@pytest.mark.parametrize("ranks", [3, 25])
def test_step_matches_the_dense_inverse(ranks):
    grads, columns = _tree(jr.PRNGKey(0)), _tree(jr.PRNGKey(1), ranks)
    optim = nodegrad.scale_by_gauss_newton(0.3)
    updates, _ = jax.jit(optim.update)(grads, optim.init(grads), columns=columns)
    p = jax.vmap(lambda c: ravel_pytree(c)[0])(columns)
    g, unravel = ravel_pytree(grads)
    expected = jnp.linalg.solve(p.T @ p + 0.3 * jnp.eye(10), g)
    assert relative_error(updates, unravel(expected)) < 1e-10


def test_one_step_solves_a_linear_quadratic_problem():
    # y' = A y + u: linear in u, so least squares in it.
    a = jnp.array([[-0.3, 1.0], [-1.0, -0.2]])
    y0 = jnp.array([1.0, 0.5])

    def residual(u):
        sol = nodegrad.odesolve(
            lambda t, y, u: a @ y + u, diffrax.Tsit5(), 0.0, 2.0, 0.1, y0, u,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.5, 2.0, 4)), max_steps=32,
        )  # fmt: skip
        return (sol.ys - jnp.array([[0.2, -0.1]])).reshape(-1)

    loss = lambda u: jnp.mean(residual(u) ** 2) / 2
    u = jnp.array([3.0, -4.0])
    columns = jax.jit(jax.jacrev(residual))(u) / jnp.sqrt(8.0)
    optim = optax.chain(nodegrad.scale_by_gauss_newton(1e-12), optax.scale(-1.0))
    grad = jax.jit(jax.grad(loss))
    updates, _ = optim.update(grad(u), optim.init(u), columns=columns)
    assert jnp.max(jnp.abs(grad(u + updates))) < 1e-8


def test_fit_of_three_parameters_takes_a_few_steps():
    def solve(params):
        a, b, c = jnp.exp(params)
        field = lambda t, y, args: jnp.stack(
            [a * y[0] - b * y[0] * y[1], -c * y[1] + b * y[0] * y[1]]
        )
        return nodegrad.odesolve(
            field, diffrax.Tsit5(), 0.0, 6.0, 0.1, jnp.array([1.0, 0.6]),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 6.0, 13)), max_steps=64,
        ).ys  # fmt: skip

    truth = jnp.log(jnp.array([1.1, 0.8, 0.7]))
    data = jax.jit(solve)(truth)
    residual = lambda params: (solve(params) - data).reshape(-1)
    jacobian = jax.jit(lambda p: (residual(p), jax.jacrev(residual)(p)))
    optim = optax.chain(nodegrad.scale_by_gauss_newton(1e-6), optax.scale(-1.0))
    params = truth + jnp.array([0.15, -0.2, 0.1])
    state = optim.init(params)
    for _ in range(8):
        r, j = jacobian(params)
        updates, state = optim.update(j.T @ r, state, columns=j)
        params = optax.apply_updates(params, updates)
    assert relative_error(params, truth) < 1e-8


def test_types_are_kept_and_misuse_is_refused():
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    grads, columns = cast(_tree(jr.PRNGKey(0))), cast(_tree(jr.PRNGKey(1), 2))
    optim = nodegrad.scale_by_gauss_newton()
    updates, _ = optim.update(grads, optim.init(grads), columns=columns)
    assert updates["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="needs the columns of the curvature or"):
        optim.update(grads, optim.init(grads))
    with pytest.raises(ValueError, match="one leading axis"):
        optim.update(grads, optim.init(grads), columns=grads)
    with pytest.raises(ValueError, match="must be positive"):
        nodegrad.scale_by_gauss_newton(0.0)


# With residuals: momentum, acceleration and adaptive damping.


def _model(key, samples, size):
    """Residuals that are not linear, and a point near which they are zero."""
    a, b, x, shift = (
        jr.normal(k, shape)
        for k, shape in zip(
            jr.split(key, 4), [(samples, size)] * 2 + [(size,)] * 2, strict=True
        )
    )
    function = lambda x: jnp.tanh(a @ x) + 0.1 * (b @ x) ** 2
    data = function(x / 3 + shift / 20)
    return lambda x: function(x) - data, x / 3


def _stacked_solution(jacobian, r, damping, drift):
    """The minimum of `|J s - r|**2 + damping |s - drift|**2`, by a QR decomposition."""
    size = jacobian.shape[1]
    matrix = np.concatenate([jacobian, np.sqrt(damping) * np.eye(size)])
    return np.linalg.lstsq(
        matrix, np.concatenate([r, np.sqrt(damping) * drift]), rcond=None
    )[0]


@pytest.mark.parametrize(("samples", "size"), [(4, 9), (9, 4)])
def test_momentum_and_acceleration_solve_the_stated_least_squares(samples, size):
    residual_fn, x = _model(jr.PRNGKey(3), samples, size)
    damping, momentum = 0.7, 0.8
    optim = nodegrad.scale_by_gauss_newton(
        damping, momentum=momentum, acceleration=True
    )
    update = jax.jit(lambda x, s: optim.update(x, s, x, residual_fn=residual_fn))
    state, drift = optim.init(x), np.zeros(size)
    transforms = lambda f: f, jax.jacfwd, jax.hessian
    derivatives = jax.jit(lambda x: [of(residual_fn)(x) for of in transforms])
    for _ in range(3):
        step, state = update(x, state)
        r, jacobian, second_derivatives = derivatives(x)
        first = _stacked_solution(jacobian, r, damping, momentum * drift)
        # All second derivatives, where the step takes one.
        curved = np.einsum("kij,i,j->k", second_derivatives, first, first)
        second = _stacked_solution(jacobian, curved, damping, np.zeros(size))
        assert 2 * np.linalg.norm(second) <= 0.75 * np.linalg.norm(first)
        drift = first + second / 2
        assert relative_error(step, jnp.asarray(drift)) < 1e-11
        x = x - 0.3 * step


def test_a_long_acceleration_is_left_out():
    # The curvature of the residual exceeds its slope a thousand times.
    residual_fn = lambda x: x + 1e3 * x**2
    x = jnp.array([1e-3])
    steps = [
        nodegrad.scale_by_gauss_newton(1e-3, acceleration=a) for a in (False, True)
    ]
    plain, accelerated = (
        o.update(x, o.init(x), x, residual_fn=residual_fn)[0] for o in steps
    )
    assert plain == accelerated != 0


@pytest.mark.parametrize(("acceleration", "order"), [(False, 2), (True, 3)])
def test_acceleration_raises_the_order_of_the_error_of_a_step(acceleration, order):
    # The solution is at zero, at a distance that is halved.
    matrix = jnp.array([[1.0, 0.3], [-0.2, 0.8]])
    residual_fn = lambda x: jnp.sin(matrix @ x) + 0.2 * x**2
    optim = nodegrad.scale_by_gauss_newton(1e-14, acceleration=acceleration)

    @jax.jit
    def error(distance):
        x = distance * jnp.array([1.0, -0.7])
        step, _ = optim.update(x, optim.init(x), x, residual_fn=residual_fn)
        return jnp.linalg.norm(x - step)

    errors = jnp.stack([error(d) for d in (0.08, 0.04, 0.02)])
    assert jnp.all(jnp.abs(jnp.log2(errors[:-1] / errors[1:]) - order) < 0.25)


@pytest.mark.parametrize("ranks", [3, 25])
def test_momentum_of_columns_is_that_of_residuals(ranks):
    columns = _tree(jr.PRNGKey(1), ranks)
    p = jax.vmap(lambda c: ravel_pytree(c)[0])(columns)
    r = jr.normal(jr.PRNGKey(2), (ranks,))
    params = _tree(jr.PRNGKey(0))
    optim = nodegrad.scale_by_gauss_newton(0.3, momentum=0.9)
    residual_fn = lambda x: p @ (ravel_pytree(x)[0] - ravel_pytree(params)[0]) + r
    gradient = ravel_pytree(params)[1](p.T @ r)
    first = second = optim.init(params)
    with_columns = jax.jit(lambda s: optim.update(gradient, s, columns=columns))
    with_residuals = jax.jit(
        lambda s: optim.update(params, s, params, residual_fn=residual_fn)
    )
    for _ in range(3):
        by_columns, first = with_columns(first)
        by_residuals, second = with_residuals(second)
        assert relative_error(by_columns, by_residuals) < 1e-11


def test_small_damping_in_float32_needs_residuals():
    # 3 samples and 50 parameters: the step of least norm, known from a pseudoinverse.
    jacobian = np.asarray(jr.normal(jr.PRNGKey(0), (3, 50)), np.float32)
    r = np.array([1.0, -2.0, 0.5], np.float32)
    expected = np.linalg.pinv(jacobian.astype(float)) @ r
    x = jnp.zeros(50, jnp.float32)
    optim = nodegrad.scale_by_gauss_newton(1e-6)
    residual_fn = lambda x: jnp.asarray(jacobian) @ x + jnp.asarray(r)
    step, _ = optim.update(x, optim.init(x), x, residual_fn=residual_fn)
    assert step.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(step, float) - expected)
    assert error < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("acceleration", [False, True])
def test_adaptive_damping_fits_a_hard_problem_and_never_raises_the_loss(acceleration):
    # Rosenbrock's valley as residuals, from the usual start.
    residual_fn = lambda x: {"a": 10 * (x["q"] - x["p"] ** 2), "b": 1 - x["p"]}
    optim = optax.chain(
        nodegrad.scale_by_gauss_newton(1e-3, acceleration=acceleration, adaptive=True),
        optax.scale(-1.0),
    )
    loss = lambda x: sum(r**2 for r in residual_fn(x).values()) / 2

    @jax.jit
    def step(x, state):
        updates, state = optim.update(x, state, x, residual_fn=residual_fn)
        return optax.apply_updates(x, updates), state

    x = {"p": jnp.array(-1.2), "q": jnp.array(1.0)}
    state, losses, accepted = optim.init(x), [loss(x)], []
    for _ in range(60):
        x, state = step(x, state)
        losses.append(loss(x))
        accepted.append(bool(state[0].accepted))
    assert relative_error(x, {"p": jnp.array(1.0), "q": jnp.array(1.0)}) < 1e-12
    assert np.all(np.diff(losses) <= 0)
    # Some steps raised the loss: otherwise this tests little.
    assert not all(accepted[:20])


def test_adaptive_damping_does_not_depend_on_units():
    # The problem Misra1a of NIST, from its first start, in float32: parameters of
    # seven orders of magnitude apart. Without scales the larger one does not move.
    y = jnp.array([10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76,
                   55.05, 61.01, 66.40, 75.47, 81.78], jnp.float32)  # fmt: skip
    t = jnp.array([77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3,
                   536.8, 593.1, 689.1, 760.0], jnp.float32)  # fmt: skip
    residual_fn = lambda x: y - x[0] * (1 - jnp.exp(-x[1] * t))
    optim = nodegrad.scale_by_gauss_newton(adaptive=True)
    update = jax.jit(lambda x, s: optim.update(x, s, x, residual_fn=residual_fn))
    x = jnp.array([500.0, 1e-4], jnp.float32)
    state = optim.init(x)
    for _ in range(40):
        step, state = update(x, state)
        x = x - step
    certified = jnp.array([2.3894212918e02, 5.5015643181e-04], jnp.float32)
    assert jnp.allclose(x, certified, rtol=1e-4)
    # A step that is not finite leaves the scales alone.
    _, after = update(jnp.array([jnp.nan, 1.0], jnp.float32), state)
    assert jnp.array_equal(after.scales, state.scales)


def test_a_failed_evaluation_is_a_step_that_is_not_taken():
    residual_fn = lambda x: jnp.where(x < 0, jnp.nan, jnp.sqrt(jnp.abs(x)) - 0.01)
    optim = nodegrad.scale_by_gauss_newton(1e-6, adaptive=True, momentum=0.5)
    update = jax.jit(lambda x, s: optim.update(x, s, x, residual_fn=residual_fn))
    x = jnp.array([1.0])
    state = optim.init(x)
    step, state = update(x, state)
    assert not state.accepted and step == 0 and state.previous == 0
    damping = state.damping
    step, state = update(x, state)
    assert state.damping > damping
    for _ in range(60):
        step, state = update(x, state)
        x = x - step
    assert jnp.abs(x[0] - 1e-4) < 1e-10
    # Where the residuals are not finite themselves, nothing moves.
    x = jnp.array([-1.0])
    step, state = update(x, optim.init(x))
    assert step == 0 and jnp.isfinite(state.damping)


def _network_of_few_data():
    """A network in a solve: 8 residuals, 129 parameters, in a tree."""
    shapes = {"w": (32, 2), "b": (32,), "v": (1, 32), "c": (1,)}
    keys = jr.split(jr.PRNGKey(0), len(shapes))
    params = {
        name: jr.normal(key, shape) / jnp.sqrt(jnp.array(shape[-1], float))
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }

    def field(t, y, p):
        acceleration = p["v"] @ jnp.tanh(p["w"] @ y + p["b"]) + p["c"]
        return jnp.stack([y[1], acceleration[0]])

    ts = jnp.linspace(0.4, 3.2, 8)

    def residual_fn(params):
        sol = nodegrad.odesolve(
            field, diffrax.Tsit5(), 0.0, 3.2, 0.1, jnp.array([1.0, 0.0]), params,
            saveat=diffrax.SaveAt(ts=ts), max_steps=64,
        )  # fmt: skip
        return sol.ys[:, 0] - jnp.cos(ts)

    return residual_fn, params


@pytest.mark.slow
def test_many_parameters_fit_few_data_through_a_solve():
    residual_fn, params = _network_of_few_data()
    optim = optax.chain(
        nodegrad.scale_by_gauss_newton(1e-3, adaptive=True, acceleration=True),
        optax.scale(-1.0),
    )

    @jax.jit
    def step(x, state):
        updates, state = optim.update(x, state, x, residual_fn=residual_fn)
        return optax.apply_updates(x, updates), state

    state = optim.init(params)
    for _ in range(25):
        params, state = step(params, state)
    assert jnp.max(jnp.abs(residual_fn(params))) < 1e-9


def test_misuse_of_residuals_is_refused():
    x = jnp.ones(2)
    optim = nodegrad.scale_by_gauss_newton()
    residual_fn = lambda x: x
    with pytest.raises(ValueError, match="not both"):
        optim.update(x, optim.init(x), x, columns=x[None], residual_fn=residual_fn)
    with pytest.raises(ValueError, match="pass them to `update`"):
        optim.update(x, optim.init(x), residual_fn=residual_fn)
    for name in ("acceleration", "adaptive"):
        needs = nodegrad.scale_by_gauss_newton(**{name: True})
        with pytest.raises(ValueError, match="needs the residuals"):
            needs.update(x, needs.init(x), x, columns=x[None])
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match="must be in"):
            nodegrad.scale_by_gauss_newton(momentum=momentum)
    with pytest.raises(TypeError, match="takes real floating point arrays"):
        optim.init(x.astype(complex))
    with pytest.raises(TypeError, match="takes real floating point arrays"):
        optim.update(x, optim.init(x), x, residual_fn=lambda x: x.astype(complex))
