"""Linear stability against eigenvalues."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodegrad


def _random_points(number, radius, seed):
    rng = np.random.default_rng(seed)
    real, imaginary = rng.uniform(-radius, radius, (2, number))
    return real + 1j * imaginary


def _greatest_eigenvalues(trace, determinant):
    root = np.sqrt(trace**2 - 4 * determinant)
    return np.maximum(np.abs(trace + root), np.abs(trace - root)) / 2


@pytest.mark.parametrize("coupling", [0.5, 0.8, 0.99, 0.999])
@pytest.mark.parametrize("solver", [diffrax.Midpoint(), nodegrad.RK4()])
def test_predicate_of_the_coupling_matches_eigenvalues(solver, coupling):
    # More points where the regions of couplings close to one are.
    z = np.concatenate(
        [_random_points(10**5 // 2, r, seed=i) for i, r in enumerate((3, 0.05))]
    )
    # Of the map (y, z) -> (y', z') as published, entry by entry.
    p, q = (
        np.polynomial.Polynomial(nodegrad.stability_polynomial(solver))(x) - 1
        for x in (z, -z)
    )
    matrix = np.array([[coupling + 0 * z, 1 - coupling + p], [-coupling * q, 0 * z]])
    matrix[1, 1] = 1 - q * (1 - coupling + p)
    eigenvalues = np.abs(np.linalg.eigvals(np.moveaxis(matrix, -1, 0))).max(-1)
    clear = np.abs(eigenvalues - 1) > 1e-12
    predicted = nodegrad.is_stable(solver, z, coupling)
    assert np.sum((predicted != (eigenvalues < 1)) & clear) == 0
    assert np.sum(clear) > 0.999 * len(z)
    reversible = nodegrad.Reversible(solver, coupling, resync_every=None)
    np.testing.assert_array_equal(predicted, nodegrad.is_stable(reversible, z))


@pytest.mark.parametrize("damping", [0.8, 0.95, 0.99, 1.0])
def test_predicate_of_leapfrog_matches_eigenvalues(damping):
    z = _random_points(10**5, 1.2, seed=0)
    greatest = _greatest_eigenvalues(2 + 2 * damping * (z - 1), 1 - 2 * damping)
    clear = np.abs(greatest - 1) > 1e-12
    predicted = nodegrad.is_stable(nodegrad.ALF(damping=damping), z)
    assert np.sum((predicted != (greatest < 1)) & clear) == 0


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Bosh3(), diffrax.Euler()])
def test_predicate_of_a_plain_solver_matches_its_steps(solver):
    def multiplier(z):
        # A complex equation as a real one of twice the size.
        rotate = jnp.array([[z.real, -z.imag], [z.imag, z.real]])
        sol = nodegrad.odesolve(
            lambda t, y, args: rotate @ y, solver, 0.0, 1.0, 1.0, jnp.array([1.0, 0.0])
        )
        return jnp.hypot(*sol.ys[0])

    z = _random_points(2000, 4, seed=1)
    greatest = np.asarray(jax.jit(jax.vmap(multiplier))(jnp.asarray(z)))
    np.testing.assert_array_equal(nodegrad.is_stable(solver, z), greatest < 1)


@pytest.mark.parametrize("coupling", [0.8, 0.999])
@pytest.mark.parametrize("base", [diffrax.Euler(), diffrax.Bosh3(), diffrax.Tsit5()])
def test_a_coupled_step_has_the_coupling_for_determinant(base, coupling):
    solver = nodegrad.Reversible(base, coupling, resync_every=None)
    term = diffrax.ODETerm(lambda t, y, args: -0.7 * y)
    state = solver.init(term, 0.0, 0.3, jnp.array(1.0), None)

    def step(z_and_difference):
        z, difference = z_and_difference
        start = eqx.tree_at(lambda s: (s.z, s.difference), state, (z, difference))
        *_, end, _ = solver.step(term, 0.0, 0.3, z + difference, None, start, False)
        return jnp.stack([end.z, end.difference])

    matrix = jax.jacfwd(step)(jnp.zeros(2))
    assert abs(jnp.linalg.det(matrix) - coupling) < 1e-14


def test_known_bounds_on_the_real_axis():
    # Where stability ends, going left; from the trace by hand.
    for solver, coupling, bound in (
        (diffrax.Midpoint(), 0.8, -0.225),
        (nodegrad.RK4(), 0.9, -0.105),
        (diffrax.Euler(), 0.99, -0.01),
        (nodegrad.RK4(), None, -2.785),
    ):
        inside, outside = (
            nodegrad.is_stable(solver, bound * scale, coupling)
            for scale in (0.97, 1.03)
        )
        assert inside and not outside


def test_refuses_what_has_no_polynomial():
    with pytest.raises(TypeError, match="explicit Runge-Kutta"):
        nodegrad.stability_polynomial(diffrax.Kvaerno3())
    with pytest.raises(ValueError, match="has its own"):
        nodegrad.is_stable(
            nodegrad.Reversible(diffrax.Heun(), resync_every=None), 0.1, 0.9
        )


def test_misuse_is_refused():
    for solver in (nodegrad.ALF(), nodegrad.Reversible(diffrax.Heun())):
        with pytest.raises(ValueError, match="is for a plain solver"):
            nodegrad.is_stable(solver, -0.1, coupling_parameter=0.9)
    for wrong in (-0.5, 0.0, 1.5):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            nodegrad.is_stable(diffrax.Heun(), -0.1, coupling_parameter=wrong)
