"""The low-rank Gauss-Newton step against dense linear algebra."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
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
    with pytest.raises(ValueError, match="needs the columns"):
        optim.update(grads, optim.init(grads))
    with pytest.raises(ValueError, match="one leading axis"):
        optim.update(grads, optim.init(grads), columns=grads)
    with pytest.raises(ValueError, match="must be positive"):
        nodegrad.scale_by_gauss_newton(0.0)
