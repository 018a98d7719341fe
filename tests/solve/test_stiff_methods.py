"""Rosenbrock methods: orders, stiff problems, gradients and second derivatives."""

import functools
import itertools
import warnings

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

import nodegrad

from ..matrix import DOORS, value_and_grad
from ..problems import relative_error


RCA = diffrax.RecursiveCheckpointAdjoint()
ACA = nodegrad.ACAAdjoint()
# The order of the solution, of the embedded solution, and of dense output.
ORDERS = {nodegrad.Rosenbrock23(): (2, 3, 2), nodegrad.Rodas5P(): (5, 4, 4)}
by_name = pytest.mark.parametrize("solver", ORDERS, ids=lambda s: type(s).__name__)


# The coefficients.


def _usual_form(tableau):
    """`(alpha, gammas, b, embedded b)` of the form with products with the Jacobian."""
    gammas = np.linalg.inv(np.eye(len(tableau.m)) / tableau.gamma - tableau.g)
    b, error = tableau.m @ gammas, tableau.error @ gammas
    return tableau.a @ gammas, gammas, b, b - error


@functools.cache
def _trees(size):
    """All rooted trees with `size` nodes: the sorted tuples of their branches."""
    if size == 1:
        return ((),)
    found = set()
    for parts in _partitions(size - 1, size - 1):
        branches = itertools.product(*map(_trees, parts))
        found |= {tuple(sorted(branch)) for branch in branches}
    return tuple(found)


def _partitions(total, largest):
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in _partitions(total - first, first):
            yield (first, *rest)


def _size(tree):
    return 1 + sum(map(_size, tree))


def _density(tree):
    return _size(tree) * np.prod([_density(branch) for branch in tree])


def _weight(tree, alpha, beta):
    """The stages' factors: one branch is weighed by `beta`, several by `alpha`."""
    factors = [_weight(branch, alpha, beta) for branch in tree]
    if len(factors) == 1:
        return beta @ factors[0]
    return np.prod([alpha @ f for f in factors], axis=0) * np.ones(len(alpha))


def _violation(order, alpha, gammas, b):
    """The largest error of the order conditions of exactly this order."""
    errors = [
        b @ _weight(tree, alpha, alpha + gammas) - 1 / _density(tree)
        for tree in _trees(order)
    ]
    return max(map(abs, errors))


def test_trees_are_all_found():
    assert [len(_trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@by_name
def test_order_conditions_hold(solver):
    alpha, gammas, b, embedded = _usual_form(solver.tableau)
    order, embedded_order, _ = ORDERS[solver]
    for n in range(1, order + 1):
        assert _violation(n, alpha, gammas, b) < 1e-12
    assert _violation(order + 1, alpha, gammas, b) > 1e-4
    for n in range(1, embedded_order + 1):
        assert _violation(n, alpha, gammas, embedded) < 1e-12
    assert _violation(embedded_order + 1, alpha, gammas, embedded) > 1e-4


@by_name
def test_equations_with_time_are_those_without(solver):
    # With the time as a state the stages are the same ones.
    alpha, gammas, _, _ = _usual_form(solver.tableau)
    assert np.allclose(alpha.sum(1), solver.tableau.c, atol=1e-13)
    assert np.allclose(gammas.sum(1), solver.tableau.d, atol=1e-12)
    assert np.allclose(np.diag(gammas), solver.tableau.gamma, atol=1e-15)


@by_name
def test_methods_are_stable_for_all_decay(solver):
    alpha, gammas, b, _ = _usual_form(solver.tableau)
    eye, one = np.eye(len(b)), np.ones(len(b))
    r = lambda z: 1 + z * b @ np.linalg.solve(eye - z * (alpha + gammas), one)
    angles = np.linspace(0.5, 1, 50) * np.pi
    for radius in (0.1, 1.0, 10.0, 1e3):
        assert max(abs(r(radius * np.exp(1j * angles)[i])) for i in range(50)) < 1.001
    assert abs(r(-1e7)) < 1e-5


# One step and many.


def _field(t, y, a):
    return jnp.stack([a * y[1] + jnp.sin(3 * t), -jnp.sin(y[0]) * (1 + t * y[1] ** 2)])


def test_a_step_is_that_of_shampine_and_reichelt():
    t, h, y, a = 0.3, 0.2, jnp.array([1.0, 0.5]), 1.3
    f = lambda t, y: _field(t, y, a)
    d, e = 1 / (2 + jnp.sqrt(2.0)), 6 + jnp.sqrt(2.0)
    f_t = jax.jacfwd(f, 0)(t, y)
    solve = functools.partial(
        jnp.linalg.solve, jnp.eye(2) - h * d * jax.jacfwd(f, 1)(t, y)
    )
    f0 = f(t, y)
    k1 = solve(f0 + h * d * f_t)
    f1 = f(t + h / 2, y + h / 2 * k1)
    k2 = solve(f1 - k1) + k1
    y1 = y + h * k2
    k3 = solve(f(t + h, y1) - e * (k2 - f1) - 2 * (k1 - f0) + h * d * f_t)
    error = -h / 6 * (k1 - 2 * k2 + k3)
    solver, times = nodegrad.Rosenbrock23(), (jnp.array(t), jnp.array(t + h))
    ours, our_error, info, _, _ = solver.step(
        diffrax.ODETerm(_field), *times, y, a, None, False
    )
    assert relative_error((ours, our_error), (y1, error)) < 1e-12
    inside = solver.interpolation_cls(t0=times[0], t1=times[1], **info)
    s = 0.3
    expected = y + h * (s * (1 - s) * k1 + s * (s - 2 * d) * k2) / (1 - 2 * d)
    assert relative_error(inside.evaluate(t + s * h), expected) < 1e-12


def _slope(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


@by_name
def test_orders_of_solutions_errors_and_dense_output(solver):
    y0, a = jnp.array([1.0, 0.5]), 1.3
    ts = jnp.array([0.37, 0.7])

    @jax.jit
    def run(h):
        saveat = diffrax.SaveAt(ts=ts, t1=True)
        sol = nodegrad.odesolve(_field, solver, 0.0, 1.0, h, y0, a, saveat=saveat)
        term, times = diffrax.ODETerm(_field), (jnp.zeros(()), jnp.asarray(h))
        return sol.ys, solver.step(term, *times, y0, a, None, False)[1]

    exact = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(_field(t, y, a)),
        (0, 1),
        y0,
        method="DOP853",
        t_eval=[*ts, 1.0],
        rtol=1e-13,
        atol=1e-13,
    ).y.T
    sizes = np.array([0.1, 0.05, 0.025])
    ys, estimates = zip(*map(run, sizes), strict=True)
    order, embedded_order, dense_order = ORDERS[solver]
    errors = [np.linalg.norm(y[-1] - exact[-1]) for y in ys]
    assert abs(_slope(sizes, errors) - order) < 0.4
    inside = [np.linalg.norm(y[:-1] - exact[:-1]) for y in ys]
    assert _slope(sizes, inside) > dense_order - 0.3
    local = _slope(sizes, [np.linalg.norm(e) for e in estimates])
    assert abs(local - solver.error_order(None)) < 0.5


# Gradients.


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "door, solver, controller, saveat, backwards",
    [
        ("native", nodegrad.Rodas5P(), "clip", "all", False),
        ("diffrax", nodegrad.Rosenbrock23(), "pid", "dense", True),
        ("native", nodegrad.Rosenbrock23(), "step_to", "fn", True),
        ("diffrax", nodegrad.Rodas5P(), "constant", "t1", False),
    ],
)
def test_gradients_are_those_of_diffrax(door, solver, controller, saveat, backwards):
    setting = solver, controller, saveat, backwards
    expected = value_and_grad(diffrax.diffeqsolve, RCA, *setting)
    ours = value_and_grad(DOORS[door], ACA, *setting)
    assert relative_error(ours, expected) < 1e-9


def _van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * ((1 - y[0] ** 2) * y[1] - y[0])])


@pytest.mark.rows(test=0, ci=1)
@by_name
def test_second_derivatives_are_those_of_the_recursion(solver):
    n, h = 3, 0.1

    def recursion(x):
        y, mu = x[:2], 1e2 * x[2]
        for i in range(n):
            t0, t1 = jnp.asarray(i * h), jnp.asarray((i + 1) * h)
            term = diffrax.ODETerm(_van_der_pol)
            y, *_ = solver.step(term, t0, t1, y, mu, None, False)
        return jnp.sum(jnp.sin(y))

    def loss(x):
        sol = nodegrad.odesolve(
            _van_der_pol, solver, 0.0, n * h, h, x[:2], 1e2 * x[2], max_steps=8
        )
        return jnp.sum(jnp.sin(sol.ys[-1]))

    x = jnp.array([1.8, -0.3, 1.0])
    ours = jax.jit(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x)))(x)
    expected = jax.jit(lambda x: (jax.grad(recursion)(x), jax.hessian(recursion)(x)))(x)
    assert relative_error(ours, expected) < 1e-10


# (The scales of the entries: the second one is a trace.)
_SCALE = np.array([1.0, 1e-5, 1.0])


def _robertson(t, y, k):
    slow, back, fast = k[0] * y[0], k[1] * y[1] * y[2], k[2] * y[1] ** 2
    return jnp.stack([back - slow, slow - back - fast, fast])


def _sensitivities(field, y0, k, t1, atol):
    """The solution at `t1` and its derivative by `k`, integrated together by SciPy."""
    n = len(y0)

    @jax.jit
    def augmented(t, z):
        y, s = z[:n], z[n:].reshape(n, -1)
        f = lambda y, k: field(t, y, k)
        ds = jax.jacfwd(f, 0)(y, k) @ s + jax.jacfwd(f, 1)(y, k)
        return jnp.concatenate([f(y, k), ds.ravel()])

    jacobian = jax.jit(jax.jacfwd(augmented, 1))
    sol = scipy.integrate.solve_ivp(
        lambda t, z: np.asarray(augmented(t, z)),
        (0, t1),
        np.concatenate([y0, np.zeros(n * len(k))]),
        method="Radau",
        jac=lambda t, z: np.asarray(jacobian(t, z)),
        rtol=1e-11,
        atol=np.concatenate([atol, np.outer(atol, 1 / np.asarray(k)).ravel()]),
    )
    return sol.y[:n, -1], sol.y[n:, -1].reshape(n, -1)


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("door", DOORS)
def test_sensitivities_of_robertsons_reactions(door):
    k, y0 = jnp.array([0.04, 1e4, 3e7]), jnp.array([1.0, 0.0, 0.0])
    controller = diffrax.PIDController(1e-10, 1e-10 * jnp.asarray(_SCALE))

    def solve(k):
        sol = DOORS[door](
            diffrax.ODETerm(_robertson),
            nodegrad.Rodas5P(),
            0.0,
            40.0,
            1e-5,
            y0,
            k,
            stepsize_controller=controller,
            adjoint=ACA,
        )
        return sol.ys[-1], sol.ys[-1]

    ours, y = jax.jit(jax.jacrev(solve, has_aux=True))(k)
    # By SciPy's Radau with a tolerance of 1e-11, for the solution and its derivatives
    # together.
    expected_y = np.array([0.715827069, 9.18553476e-06, 0.284163746])
    expected = np.array(
        [
            [-4.24755877, 1.37308080e-05, -2.28835509e-09],
            [4.59119625e-05, -2.35719211e-10, -1.13805951e-13],
            [4.24751286, -1.37305723e-05, 2.28846889e-09],
        ]
    )
    assert np.max(np.abs(y - expected_y) / _SCALE) < 1e-8
    errors = np.abs(ours - expected) * np.asarray(k) / _SCALE[:, None]
    assert np.max(errors) < 1e-8


@pytest.mark.rows(test=0, ci=1)
@by_name
def test_gradient_of_a_stiff_oscillator(solver):
    # The van der Pol oscillator with mu = 1000, before its first jump.
    tol = 1e-9 if isinstance(solver, nodegrad.Rodas5P) else 1e-4
    y0, t1 = jnp.array([2.0, 0.0]), 0.75

    def solve(mu):
        sol = nodegrad.odesolve(
            _van_der_pol,
            solver,
            0.0,
            t1,
            1e-5,
            y0,
            mu[0],
            stepsize_controller=diffrax.PIDController(tol, tol),
            max_steps=4096,
        )
        return sol.ys[-1], sol.stats["num_accepted_steps"]

    mu = jnp.array([1e3])
    ours, steps = jax.jit(jax.jacrev(solve, has_aux=True))(mu)
    field = lambda t, y, mu: _van_der_pol(t, y, mu[0])
    _, expected = _sensitivities(field, y0, mu, t1, np.full(2, 1e-12))
    # The product of the fastest decay and the time is about 2000: an explicit method
    # needs more than 600 steps for stability alone.
    assert steps < (500 if tol == 1e-9 else 100)
    assert np.max(np.abs(ours - expected) / np.abs(expected)) < 100 * tol


def _hires(t, y, k):
    k1, k2, k3, k4, k5, k6, bind, split, fade, supply = k
    bound = bind * y[5] * y[7] - (k2 + split + fade) * y[6]
    return jnp.stack(
        [
            -k1 * y[0] + k2 * y[1] + k6 * y[2] + supply,
            k1 * y[0] - (k2 + k3) * y[1],
            -(k6 + k1) * y[2] + k2 * y[3] + k5 * y[4],
            k3 * y[1] + k1 * y[2] - (k4 + k2) * y[3],
            -(k1 + k5) * y[4] + k2 * y[5] + k2 * y[6],
            -bind * y[5] * y[7] + k4 * y[3] + k1 * y[4] - k2 * y[5] + split * y[6],
            bound,
            -bound,
        ]
    )


def _oregonator(t, y, k):
    s, q, w = k
    return jnp.stack(
        [
            s * (y[1] + y[0] * (1 - q * y[0] - y[1])),
            (y[2] - (1 + y[0]) * y[1]) / s,
            w * (y[0] - y[2]),
        ]
    )


# The solutions are those of the IVP test set (Mazzia, Magherini, 2008). The derivatives
# by the logarithms of the parameters are by SciPy's Radau at a tolerance of 1e-10.
_HIRES = [1.71, 0.43, 8.32, 0.69, 0.035, 8.32, 280.0, 0.69, 0.69, 0.0007]
_SENSITIVITIES = {
    "HIRES": (
        _hires,
        [1.0, 0, 0, 0, 0, 0, 0, 0.0057],
        _HIRES,
        321.8122,
        0,
        0.7371312573325668e-3,
        [
            -8.980762507587e-04,
            4.258571136902e-04,
            -3.776478121277e-05,
            -2.668705751188e-04,
            8.295168600916e-05,
            5.168588038605e-05,
            -1.299954470823e-04,
            4.954929723252e-05,
            -3.293150738627e-03,
            1.272284563845e-03,
        ],
    ),
    "Oregonator": (
        _oregonator,
        [1.0, 2.0, 3.0],
        [77.27, 8.375e-6, 0.161],
        360.0,
        2,
        0.1320554942846706e3,
        [5774.969672265594, -944.116821776302, -1712.986719973016],
    ),
}


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("name", _SENSITIVITIES)
def test_sensitivities_of_chemical_reactions(name):
    field, y0, k, t1, component, value, expected = _SENSITIVITIES[name]

    def solve(log_k):
        sol = nodegrad.odesolve(
            field,
            nodegrad.Rodas5P(),
            0.0,
            t1,
            1e-4,
            jnp.array(y0),
            jnp.exp(log_k),
            stepsize_controller=diffrax.PIDController(1e-10, 1e-12),
            adjoint=nodegrad.ACAAdjoint(max_recorded_steps=16384),
            max_steps=16384,
        )
        return sol.ys[-1, component]

    ours, gradient = jax.jit(jax.value_and_grad(solve))(jnp.log(jnp.array(k)))
    np.testing.assert_allclose(ours, value, rtol=1e-7)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6 * scale)


# What is accepted.


def test_states_of_several_arrays():
    def field(t, y, a):
        x, z = y["x"], y["z"]
        return {"x": -a * x + jnp.sum(z), "z": -100 * z}

    y0 = {"x": jnp.ones((2, 3)), "z": jnp.ones(2)}

    def loss(a, solver):
        sol = nodegrad.odesolve(
            field, solver, 0.0, 1.0, 0.01, y0, a, saveat=diffrax.SaveAt(t1=True)
        )
        return jnp.sum(sol.ys["x"])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    # x' = -a x + 2 exp(-100 t)
    exact = lambda a: (
        6 * (jnp.exp(-a) + 2 * (jnp.exp(-a) - jnp.exp(-100.0)) / (100 - a))
    )
    assert abs(grad(1.3, nodegrad.Rodas5P()) / jax.grad(exact)(1.3) - 1) < 1e-5


@pytest.mark.rows(test=1, ci=2)
@by_name
def test_states_of_float32_stay_so(solver):
    # Also where float64 is on, as here.
    f32 = jnp.float32

    def last(rate, dtype):
        times = (jnp.asarray(t, dtype) for t in (0.0, 1.0, 0.02))
        field = lambda t, y, rate: -rate * (y - jnp.cos(t))
        sol = nodegrad.odesolve(
            field, solver, *times, jnp.zeros(2, dtype), rate.astype(dtype)
        )
        return sol.ys[0, 0]

    value_and_grad = jax.jit(jax.value_and_grad(last), static_argnums=1)
    rate = jnp.array(30.0)
    found, expected = value_and_grad(rate, f32), value_and_grad(rate, jnp.float64)
    assert found[0].dtype == f32
    assert relative_error(found[0].astype(float), expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-4


@pytest.mark.slow
def test_samples_take_their_own_steps():
    rates = jnp.array([1.0, 1e2, 1e5])

    def loss(scale, rates):
        relax = lambda t, y, rate: -scale * rate * (y - jnp.cos(t))
        solve = lambda rate: nodegrad.odesolve(
            relax,
            nodegrad.Rodas5P(),
            0.0,
            1.0,
            None,
            jnp.zeros(1),
            rate,
            stepsize_controller=diffrax.PIDController(1e-6, 1e-8),
        ).ys[-1, 0]
        return jnp.sum(jax.vmap(solve)(rates))

    together = jax.jit(jax.grad(loss))(1.0, rates)
    alone = sum(jax.jit(jax.grad(loss))(1.0, rates[i : i + 1]) for i in range(3))
    assert abs(together / alone - 1) < 1e-8


@by_name
def test_noise_and_complex_states_are_refused(solver):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), jr.PRNGKey(0))
    noise = diffrax.ControlTerm(lambda t, y, args: y, path)
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    name = type(solver).__name__
    for solve in DOORS.values():
        terms = diffrax.MultiTerm(drift, noise)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=name):
            # Diffrax warns of solvers that are not for stochastic equations.
            warnings.simplefilter("ignore")
            solve(terms, solver, 0.0, 1.0, 0.1, jnp.array(1.0))
    with pytest.raises(ValueError, match=f"{name}.*real state"):
        nodegrad.odesolve(drift, solver, 0.0, 1.0, 0.1, jnp.array(1j))
