"""EES(2,5) and EES(2,7): orders, defects, and gradients without stored states."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import nodegrad
from nodegrad._internal.batch import Axes, Batch
from nodegrad._steps.increment import Increment
from nodegrad._steps.tableau import two_registers

from ..matrix import DOORS, value_and_grad
from ..problems import explicit_step, relative_error


# The symmetric order, and the power of the step size in the defect of a step.
METHODS = {nodegrad.EES25(): 5, nodegrad.EES27(): 7}
RCA = diffrax.RecursiveCheckpointAdjoint()
by_name = pytest.mark.parametrize("solver", METHODS, ids=lambda s: type(s).__name__)


def _field(t, y, a):
    return jnp.stack(
        [a * y[1] + jnp.sin(t) * y[0], -jnp.sin(y[0]) * (1 + 0.3 * y[1] ** 2)]
    )


def _slope(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


@by_name
def test_tableau_is_that_of_a_method_of_order_two(solver):
    t = solver.tableau
    rows = [np.zeros(0), *t.a_lower]
    assert np.allclose([sum(a) for a in rows[1:]], t.c, atol=1e-15)
    c = np.array([0.0, *t.c])
    assert abs(sum(t.b_sol) - 1) < 1e-15 and abs(t.b_sol @ c - 0.5) < 1e-15
    # The error estimate is zero for constant fields only.
    assert abs(sum(t.b_error)) < 1e-15 and abs(t.b_error @ c) > 0.1


@by_name
def test_stability_function_is_almost_that_of_a_symmetric_method(solver):
    # R(z) R(-z) = 1 for a symmetric method.
    r = np.polynomial.Polynomial(nodegrad.stability_polynomial(solver))
    reflected = np.polynomial.Polynomial(r.coef * (-1.0) ** np.arange(len(r.coef)))
    product = (r * reflected).coef
    order = METHODS[solver]
    assert np.allclose(product[: order + 1], [1] + order * [0], atol=1e-14)
    assert abs(product[order + 1]) > 1e-4
    assert nodegrad.is_stable(solver, -3.0)


@by_name
def test_a_step_back_leaves_a_small_defect(solver):
    sizes, defects = np.array([0.4, 0.3, 0.2, 0.15]), []
    y0, a, t0 = jnp.array([1.0, 0.5]), 1.3, jnp.array(0.3)
    for h in sizes:
        y1 = explicit_step(solver.tableau, _field, t0, t0 + h, y0, a)
        back = explicit_step(solver.tableau, _field, t0 + h, t0, y1, a)
        defects.append(float(jnp.linalg.norm(back - y0)))
        found, info, _, _ = solver.backward_step(
            diffrax.ODETerm(_field), t0, t0 + h, y1, a, (t0,), None, False
        )
        assert relative_error(found, back) < 1e-13
        assert relative_error(info["y1"], y1) < 1e-3
    assert abs(_slope(sizes, defects) - METHODS[solver] - 1) < 0.35


def _solve(solver, h, y0, a, adjoint, solve=nodegrad.odesolve, saveat=None):
    return solve(
        diffrax.ODETerm(_field),
        solver,
        0.0,
        2.0,
        h,
        y0,
        a,
        adjoint=adjoint,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        max_steps=256,
    )


Y0, A = jnp.array([1.0, 0.5]), jnp.array(1.3)


def test_form_with_two_registers_is_the_published_one():
    # Of EES(2,5; 1/10) and of EES(2,7), whose entries are in the field of sqrt(2).
    r = np.sqrt(2)
    published = {
        nodegrad.EES25: ([0, -7 / 15, -35 / 32], [1 / 3, 15 / 16, 2 / 5]),
        nodegrad.EES27: (
            [0, (4 * r - 7) / 3, -(4 + 5 * r) / 12, 3 * (8 * r - 31) / 49],
            [(2 - r) / 3, (4 + r) / 8, 3 * (3 - r) / 7, (9 - 4 * r) / 14],
        ),
    }
    for cls, coefficients in published.items():
        found = two_registers(cls.tableau)
        assert found is not None
        assert np.allclose(found, coefficients, rtol=1e-14, atol=1e-15)
    for solver in (nodegrad.RK4, diffrax.Bosh3, diffrax.Tsit5):
        assert two_registers(solver.tableau) is None


@pytest.mark.parametrize("returns", ["none", "first", "all"])
@pytest.mark.parametrize("solver", [*METHODS, diffrax.Midpoint(), diffrax.Heun()])
def test_two_registers_give_the_increment_and_pullback_of_the_tableau(solver, returns):
    t0, t1, control, y0 = jnp.array(0.3), jnp.array(0.8), jnp.array(0.5), Y0
    product = lambda t, y, control: control * _field(t, y, A)
    increment = Increment(solver.tableau, product, returns)
    consts, staged = increment.closure_convert(t0, t1, control, y0)
    args, batch = (t0, t1, control, y0), Batch()
    axes, wrt = [Axes(()) for _ in consts], [True for _ in consts]
    found = {}
    # On a GPU these stages would not be a loop.
    staged.scanned = True
    for registers in (staged.registers, None):
        staged.registers = registers
        out, pull = staged.pullback(batch, consts, axes, wrt, args, (True,) * 4)
        cts = jax.tree.map(
            lambda x: jnp.sin(1 + jnp.arange(x.size)).reshape(x.shape), out
        )
        found[registers is None] = out, pull(cts)
    ours, tableau = jax.tree.leaves(found[False]), jax.tree.leaves(found[True])
    assert len(ours) == len(tableau) >= 5
    for x, y in zip(ours, tableau, strict=True):
        assert jnp.allclose(x, y, rtol=1e-14, atol=1e-15)


@by_name
def test_solution_and_dense_output_have_order_two(solver):
    saveat = diffrax.SaveAt(ts=[0.77, 1.414], t1=True)
    aca = nodegrad.ACAAdjoint()
    final = jax.jit(lambda h: _solve(solver, h, Y0, A, aca, saveat=saveat).ys)
    exact = _solve(nodegrad.RK4(), 1e-3 * 8, Y0, A, aca, saveat=None).ys
    sizes = np.array([0.08, 0.04, 0.02, 0.01])
    ys = [final(h) for h in sizes]
    errors = [float(jnp.linalg.norm(y[-1:] - exact)) for y in ys]
    assert abs(_slope(sizes, errors) - 2) < 0.15
    inside = [float(jnp.linalg.norm(y[:2] - ys[-1][:2])) for y in ys[:-1]]
    assert _slope(sizes[:-1], inside) > 1.8


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("door", DOORS)
@by_name
def test_gradient_error_has_the_stated_order(solver, door):
    def grad(adjoint):
        def loss(y0, a, h):
            sol = _solve(solver, h, y0, a, adjoint, DOORS[door])
            return jnp.sum(sol.ys**2), sol.stats.get("reconstruction_error")

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    exact, almost = grad(RCA), grad(nodegrad.ReversibleAdjoint(check=True))
    if door == "native":
        exact = grad(nodegrad.ACAAdjoint())
    sizes, errors, measured = np.array([0.2, 0.1, 0.05]), [], []
    for h in sizes:
        ours, error = almost(Y0, A, h)
        errors.append(relative_error(ours, exact(Y0, A, h)[0]))
        measured.append(float(error))
    assert abs(_slope(sizes, errors) - METHODS[solver]) < 0.2
    # The check measures an error of the same size.
    assert all(0.05 * m < e < 20 * m for e, m in zip(errors, measured, strict=True))


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "door, controller, saveat, backwards",
    [
        ("native", "clip", "all", True),
        ("diffrax", "pid", "dense", False),
        ("diffrax", "step_to", "fn", True),
    ],
)
def test_gradients_in_all_settings(door, controller, saveat, backwards):
    setting = controller, saveat, backwards
    solver = nodegrad.EES27()
    expected = value_and_grad(diffrax.diffeqsolve, RCA, solver, *setting)
    aca = value_and_grad(DOORS[door], nodegrad.ACAAdjoint(), solver, *setting)
    assert relative_error(aca, expected) < 1e-10
    ours = value_and_grad(DOORS[door], nodegrad.ReversibleAdjoint(), solver, *setting)
    assert relative_error(ours, expected) < 1e-3


def _geometric(path_cls):
    if path_cls is diffrax.UnsafeBrownianPath:
        path = path_cls((2,), jr.PRNGKey(0))
    else:
        path = path_cls(0.0, 1.0, 1e-4, (2,), jr.PRNGKey(0))
    drift = diffrax.ODETerm(lambda t, y, a: -a * y)
    noise = lambda t, y, a: lx.DiagonalLinearOperator(0.5 * a * y)
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(noise, path)), path


@pytest.mark.rows(test=0, ci=1)
@by_name
def test_stochastic_equations_are_those_of_stratonovich(solver):
    terms, path = _geometric(diffrax.VirtualBrownianTree)
    final = jax.jit(lambda h: diffrax.diffeqsolve(terms, solver, 0, 1, h, Y0, A).ys[0])
    exact = Y0 * jnp.exp(-A + 0.5 * A * path.evaluate(0.0, 1.0))
    sizes = np.array([0.1, 0.025, 0.00625])
    errors = [float(jnp.linalg.norm(final(h) - exact)) for h in sizes]
    # Diagonal noise commutes, so the order is one.
    assert _slope(sizes, errors) > 0.8 and errors[-1] < 0.01


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("path", ["VirtualBrownianTree", "UnsafeBrownianPath"])
@pytest.mark.parametrize("door", DOORS)
def test_gradients_along_noise(door, path):
    terms, _ = _geometric(getattr(diffrax, path))

    def loss(y0, a, adjoint):
        solver = nodegrad.EES25()
        sol = DOORS[door](terms, solver, 0, 1, 0.02, y0, a, adjoint=adjoint)
        return jnp.sum(sol.ys**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    expected = grad(Y0, A, nodegrad.ACAAdjoint())
    ours = grad(Y0, A, nodegrad.ReversibleAdjoint())
    assert 1e-14 < relative_error(ours, expected) < 1e-5


def test_decaying_problems_need_stored_states_for_the_gradient_only():
    def loss(a, solver, adjoint):
        relax = lambda t, y, a: -a * (y - jnp.cos(t))
        return nodegrad.odesolve(
            relax, solver, 0.0, 10.0, 0.05, 0.0, a, adjoint=adjoint, throw=False
        ).ys[0]

    grad = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    adjoint = nodegrad.ReversibleAdjoint()
    expected = grad(3.0, nodegrad.EES25(), nodegrad.ACAAdjoint())
    assert jnp.isfinite(expected)
    assert jnp.isnan(grad(3.0, nodegrad.EES25(), adjoint))
    # (The solve starts from rest: a relative error of the first state does not exist.)
    stored = nodegrad.EES25(resync_every=10)
    assert abs(grad(3.0, stored, adjoint) / expected - 1) < 1e-4
    with pytest.raises(ValueError, match="`resync_every` must be a positive"):
        nodegrad.EES25(resync_every=0)


def test_nothing_is_stored():
    def temporary(n):
        def loss(y0):
            sol = _solve_many(y0, n)
            return jnp.sum(sol.ys**2)

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((2, 500))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def _solve_many(y0, n):
        return nodegrad.odesolve(
            _field,
            nodegrad.EES25(),
            0.0,
            1.0,
            1 / n,
            y0,
            A,
            adjoint=nodegrad.ReversibleAdjoint(),
            max_steps=n,
        )

    assert temporary(1000) < temporary(10) + 1000
