"""Products with Hessians and Gauss-Newton matrices, against dense ones.

The oracles differentiate a plain scan over the accepted grid.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import nodegrad

from ..problems import accepted_grid, relative_error, unrolled, van_der_pol


DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
SOLVES = {
    "ACA": (diffrax.Bosh3(), nodegrad.ACAAdjoint()),
    "few checkpoints": (diffrax.Bosh3(), nodegrad.ACAAdjoint(4)),
    "reversible": (
        nodegrad.Reversible(diffrax.Bosh3(), resync_every=10),
        nodegrad.ReversibleAdjoint(),
    ),
}
PID = diffrax.PIDController(1e-6, 1e-6)
# (y0, mu) of a van der Pol oscillator, and two directions.
POINT = jnp.array([2.0, 0.0, 1.5])
U, V = jnp.array([-0.4, 0.1, 0.7]), jnp.array([0.3, 0.2, 0.1])


def _solution(solve, point, solver, adjoint, controller=PID):
    return solve(
        diffrax.ODETerm(van_der_pol),
        solver,
        0.0,
        1.0,
        None,
        point[:2],
        point[2],
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=128,
    ).ys[-1]


def _outputs(point, door=nodegrad.odesolve, solve="ACA"):
    return _solution(door, point, *SOLVES[solve])


def _loss_of(y):
    return jnp.sum(y**4) + jnp.sin(y[0]) * y[1]


def _loss(point):
    return _loss_of(_outputs(point))


def _frozen_outputs():
    solver, _ = SOLVES["ACA"]
    args = van_der_pol, solver, 0.0, 1.0, POINT[:2], POINT[2], PID
    grid = accepted_grid(*args)
    return lambda p: unrolled(solver, van_der_pol, grid, p[:2], p[2])


def _gauss_newton(outputs, loss, point):
    jacobian = jax.jacfwd(outputs)(point)
    return jacobian.T @ jax.hessian(loss)(outputs(point)) @ jacobian


@pytest.mark.parametrize("door", DOORS)
def test_hvp_is_the_hessian_of_the_accepted_grid_times_the_vector(door):
    frozen = _frozen_outputs()
    expected = jax.hessian(lambda p: _loss_of(frozen(p)))(POINT) @ V
    loss = lambda p: _loss_of(_outputs(p, DOORS[door]))
    product = jax.jit(lambda p: nodegrad.hvp(loss, p, V))(POINT)
    assert relative_error(product, expected) < 1e-11


@pytest.mark.parametrize("door", DOORS)
def test_ggn_vp_is_the_gauss_newton_matrix_of_the_accepted_grid(door):
    frozen = _frozen_outputs()
    expected = _gauss_newton(frozen, _loss_of, POINT) @ V
    outputs = lambda p: _outputs(p, DOORS[door])
    product = jax.jit(lambda p: nodegrad.ggn_vp(outputs, _loss_of, p, V))(POINT)
    assert relative_error(product, expected) < 1e-11
    hessian = jax.hessian(lambda p: _loss_of(frozen(p)))(POINT)
    assert relative_error(expected, hessian @ V) > 1e-2


@pytest.mark.exhaustive
@pytest.mark.parametrize("solve", ["few checkpoints", "reversible"])
def test_products_through_other_memories_match_direct_adjoint(solve):
    solver, _ = SOLVES[solve]
    direct = lambda p: _solution(
        diffrax.diffeqsolve, p, solver, diffrax.DirectAdjoint()
    )
    ours = lambda p: _outputs(p, solve=solve)
    hessian = jax.hessian(lambda p: _loss_of(direct(p)))(POINT)
    product = nodegrad.hvp(lambda p: _loss_of(ours(p)), POINT, V)
    assert relative_error(product, hessian @ V) < 1e-9
    product = nodegrad.ggn_vp(ours, _loss_of, POINT, V)
    matrix = _gauss_newton(direct, _loss_of, POINT)
    assert relative_error(product, matrix @ V) < 1e-9


def test_products_are_symmetric():
    product = jax.jit(lambda v: nodegrad.hvp(_loss, POINT, v))
    assert jnp.allclose(U @ product(V), V @ product(U), rtol=1e-10, atol=0)
    product = jax.jit(lambda v: nodegrad.ggn_vp(_outputs, _loss_of, POINT, v))
    assert jnp.allclose(U @ product(V), V @ product(U), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_taylor_remainders_have_slopes_two_and_three():
    solver, adjoint = SOLVES["ACA"]
    grid = accepted_grid(van_der_pol, solver, 0.0, 1.0, POINT[:2], POINT[2], PID)
    frozen = diffrax.StepTo(grid)
    solve = diffrax.diffeqsolve  # the door that is not used above
    loss = jax.jit(lambda p: _loss_of(_solution(solve, p, solver, adjoint, frozen)))
    value, slope = loss(POINT), jax.grad(loss)(POINT) @ V
    curvature = nodegrad.hvp(loss, POINT, V) @ V
    steps = 10.0 ** -np.array([1.5, 2.0, 2.5])
    exact = np.array([loss(POINT + h * V) for h in steps])
    first = value + steps * slope
    second = first + steps**2 / 2 * curvature
    for approximation, order in ((first, 2), (second, 3)):
        slopes = np.diff(np.log(abs(exact - approximation))) / np.diff(np.log(steps))
        assert np.all(abs(slopes - order) < 0.1 * (order - 1))


@pytest.mark.exhaustive
def test_third_derivatives_by_nesting_forward_mode():
    frozen = _frozen_outputs()
    third = jax.jacfwd(jax.hessian(lambda p: _loss_of(frozen(p))))(POINT)
    expected = jnp.einsum("ijk,j,k->i", third, V, U)
    product = lambda p: nodegrad.hvp(_loss, p, V)
    _, found = jax.jit(lambda p: jax.jvp(product, (p,), (U,)))(POINT)
    assert relative_error(found, expected) < 1e-10


class _Model(eqx.Module):
    """A model with leaves that are no parameters."""

    network: eqx.nn.MLP
    initial: jax.Array
    repeats: jax.Array
    name: str

    def __init__(self, key):
        key1, key2 = jr.split(key)
        self.network = eqx.nn.MLP(2, 2, 4, 1, jnp.tanh, key=key1)
        self.initial = jr.normal(key2, (3, 2))
        self.repeats = jnp.array(2)
        self.name = "two chained solves"

    def __call__(self, batched=True):
        def solve(y0, t1):
            return nodegrad.odesolve(
                lambda t, y, _: self.network(y),
                diffrax.Bosh3(),
                0.0,
                t1,
                None,
                y0,
                stepsize_controller=diffrax.PIDController(1e-3, 1e-4),
                saveat=diffrax.SaveAt(ts=[t1 / 2, t1]),
                max_steps=16,
                batched=batched,
            ).ys[..., -1, :]

        if not batched:
            unbatched = solve
            solve = lambda y0, t1: jax.vmap(lambda y: unbatched(y, t1))(y0)
        return {
            "ys": solve(solve(self.initial, 0.4), 0.7),
            "repeats": self.repeats,
            "name": self.name,
        }


def _model_loss(out):
    assert out["name"] == "two chained solves"
    return jnp.sum(out["ys"] ** 2) * out["repeats"]


@pytest.mark.exhaustive
def test_products_of_a_model_with_several_batched_solves():
    model = _Model(jr.PRNGKey(0))
    inexact, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(inexact)
    v = jr.normal(jr.PRNGKey(1), flat.shape)
    direction = unravel(v)

    def outputs(flat):
        return eqx.combine(unravel(flat), static)(batched=False)

    loss = lambda flat: _model_loss(outputs(flat))
    gradient = jax.grad(loss)
    expected = jax.jit(lambda x: jax.jvp(gradient, (x,), (v,))[1])(flat)
    product = eqx.filter_jit(nodegrad.hvp)(lambda m: _model_loss(m()), model, direction)
    assert jax.tree.structure(product) == jax.tree.structure(inexact)
    assert relative_error(ravel_pytree(product)[0], expected) < 1e-11

    jacobian = jax.jit(jax.jacrev(lambda x: outputs(x)["ys"].ravel()))(flat)
    product = eqx.filter_jit(nodegrad.ggn_vp)(
        lambda m: m(), _model_loss, model, direction
    )
    # The second derivative of the loss is 2 * 2.
    assert relative_error(ravel_pytree(product)[0], 4 * jacobian.T @ jacobian @ v) < (
        1e-11
    )
    # A whole model will do for a direction; what is no parameter is ignored.
    again = nodegrad.ggn_vp(
        lambda m: m(), _model_loss, model, eqx.combine(direction, static)
    )
    assert relative_error(again, product) < 1e-12


@pytest.mark.exhaustive
def test_operators_serve_the_solvers_of_lineax():
    hessian = nodegrad.hessian_operator(_loss, POINT)
    assert lx.is_symmetric(hessian)
    assert not lx.is_positive_semidefinite(hessian)
    assert relative_error(hessian.mv(V), nodegrad.hvp(_loss, POINT, V)) < 1e-12
    assert relative_error(hessian.as_matrix(), jax.hessian(_loss)(POINT)) < 1e-12

    squares = lambda y: jnp.sum(y**2)
    ggn = nodegrad.ggn_operator(_outputs, squares, POINT)
    assert lx.is_positive_semidefinite(ggn)
    damped = ggn + lx.DiagonalLinearOperator(jnp.full(3, 0.1))
    damped = lx.TaggedLinearOperator(damped, lx.positive_semidefinite_tag)
    step = lx.linear_solve(damped, V, lx.CG(1e-12, 1e-12)).value
    jacobian = jax.jacrev(_outputs)(POINT)
    matrix = 2 * jacobian.T @ jacobian + 0.1 * jnp.eye(3)
    assert relative_error(step, jnp.linalg.solve(matrix, V)) < 1e-9


@pytest.mark.rows(test=1, ci=3)
@pytest.mark.parametrize(
    "adjoint",
    [
        diffrax.RecursiveCheckpointAdjoint(),
        diffrax.BacksolveAdjoint(),
        diffrax.ForwardMode(),
    ],
)
def test_adjoints_for_first_derivatives_only_are_refused(adjoint):
    outputs = lambda p: _solution(diffrax.diffeqsolve, p, diffrax.Tsit5(), adjoint)
    loss = lambda p: _loss_of(outputs(p))
    with pytest.raises(TypeError, match=r"adjoint=nodegrad.ACAAdjoint\(\)"):
        nodegrad.hvp(loss, POINT, V)
    with pytest.raises(TypeError, match=r"adjoint=nodegrad.ACAAdjoint\(\)"):
        nodegrad.ggn_vp(outputs, _loss_of, POINT, V)
    with pytest.raises(TypeError, match=r"adjoint=nodegrad.ACAAdjoint\(\)"):
        nodegrad.hessian_operator(loss, POINT)
    with pytest.raises(TypeError, match=r"adjoint=nodegrad.ACAAdjoint\(\)"):
        jax.jit(lambda p: nodegrad.hvp(loss, p, V))(POINT)


@pytest.mark.exhaustive
def test_product_through_a_stochastic_runge_kutta_method():
    noise = diffrax.VirtualBrownianTree(
        0.0, 1.0, 1e-3, (2,), jr.PRNGKey(0), diffrax.SpaceTimeLevyArea
    )
    scale = lambda t, y, p: 0.3 * p[2] * jnp.eye(2)

    def loss(solve, adjoint, p):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, p: jnp.sin(p[2] * y[::-1])),
            diffrax.ControlTerm(scale, noise),
        )
        sol = solve(
            terms, diffrax.ShARK(), 0.0, 1.0, 0.25, p[:2], p,
            adjoint=adjoint, max_steps=8,
        )  # fmt: skip
        return _loss_of(sol.ys[0])

    ours = lambda p: loss(nodegrad.odesolve, nodegrad.ACAAdjoint(), p)
    direct = lambda p: loss(diffrax.diffeqsolve, diffrax.DirectAdjoint(), p)
    product = jax.jit(lambda p: nodegrad.hvp(ours, p, V))(POINT)
    expected = jax.jit(lambda p: jax.jvp(jax.grad(direct), (p,), (V,))[1])(POINT)
    assert relative_error(product, expected) < 1e-11


@pytest.mark.slow
def test_direct_adjoint_is_welcome():
    solver, _ = SOLVES["ACA"]
    direct = lambda p: _solution(
        diffrax.diffeqsolve, p, solver, diffrax.DirectAdjoint()
    )
    product = nodegrad.ggn_vp(direct, _loss_of, POINT, V)
    expected = nodegrad.ggn_vp(_outputs, _loss_of, POINT, V)
    assert relative_error(product, expected) < 1e-10


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="expected float64\\[3\\], received float64"):
        nodegrad.hvp(_loss, POINT, V[:2])
    with pytest.raises(ValueError, match="received float32"):
        nodegrad.hvp(_loss, POINT, V.astype(jnp.float32))
    with pytest.raises(ValueError, match="structure of the floating point arrays"):
        nodegrad.ggn_vp(_outputs, _loss_of, POINT, (V, V))
    with pytest.raises(ValueError, match="Python numbers are constants"):
        nodegrad.hvp(lambda p: p**2, 1.0, 1.0)
    with pytest.raises(ValueError, match="must return floating point arrays"):
        nodegrad.ggn_vp(lambda p: jnp.array(1), lambda out: out, POINT, V)
    with pytest.raises(TypeError, match="must be real"):
        nodegrad.hvp(lambda p: jnp.abs(p) ** 2, jnp.array(1j), jnp.array(1j))
    with pytest.raises(TypeError, match="scalar"):
        nodegrad.hvp(_outputs, POINT, V)
    with pytest.raises(RuntimeError, match="reverse mode again"):
        jax.grad(lambda p: jnp.sum(nodegrad.hvp(_loss, p, V)))(POINT)
