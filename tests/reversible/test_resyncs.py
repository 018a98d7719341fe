"""Where `Reversible` resyncs, and the bounded memory for the states before resyncs."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodegrad
from nodegrad._reversible.restarts import Restarts


COUPLING = 0.9


def _relaxation(t, y, rates):
    return -rates * (y - jnp.cos(t * jnp.arange(1.0, 4.0)))


RATES, START = jnp.array([0.3, 2.0, 7.0]), jnp.array([1.0, 2.0, 0.0])


def _loss(rates, start, adjoint, door=nodegrad.odesolve, constant=False):
    sol = door(
        diffrax.ODETerm(_relaxation),
        nodegrad.Reversible(diffrax.Bosh3()),
        0.0,
        6.0,
        0.02 if constant else None,
        start,
        rates,
        stepsize_controller=diffrax.ConstantStepSize()
        if constant
        else diffrax.PIDController(rtol=1e-6, atol=1e-6),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 6.0, 5)),
        adjoint=adjoint,
        max_steps=1000,
    )
    return jnp.sum(sol.ys**3), sol.stats.get("num_resyncs", jnp.array(0))


OURS = nodegrad.ReversibleAdjoint()
THEIRS = diffrax.RecursiveCheckpointAdjoint()
DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
doors = pytest.mark.parametrize("door", DOORS)


def _close(ours, theirs, rtol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b)))


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("constant", [False, True], ids=["adaptive", "constant"])
@doors
def test_gradients_are_those_of_the_solve_with_its_resyncs(door, constant):
    # Diffrax's adjoint differentiates the same steps, resyncs included.
    def gradient(door, adjoint):
        fn = lambda x: _loss(*x, adjoint, door, constant)
        return jax.jit(jax.value_and_grad(fn, has_aux=True))((RATES, START))

    (ours, resyncs), gradients = gradient(DOORS[door], OURS)
    (theirs, _), expected = gradient(diffrax.diffeqsolve, THEIRS)
    assert resyncs > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    _close(gradients, expected, 1e-11)


@pytest.mark.exhaustive
@doors
def test_gradients_of_a_batch_are_those_of_its_samples(door):
    starts = jnp.stack([START, -START, 3 * START + 1])
    rates = jnp.stack([RATES, 0.2 * RATES, 0 * RATES])

    def gradient(door, adjoint):
        fn = lambda rates, start: _loss(rates, start, adjoint, door)[0]
        return jax.jit(jax.vmap(jax.grad(fn, (0, 1))))(rates, starts)

    ours = gradient(DOORS[door], OURS)
    _close(ours, gradient(diffrax.diffeqsolve, THEIRS), 1e-11)


@pytest.mark.exhaustive
@doors
def test_second_derivatives_are_those_of_the_solve_with_its_resyncs(door):
    def product(adjoint):
        fn = lambda rates: _loss(rates, START, adjoint, DOORS[door])[0]
        return jax.jit(lambda x, v: jax.jvp(jax.grad(fn), (x,), (v,)))(RATES, RATES)

    _close(product(OURS), product(nodegrad.ACAAdjoint()), 1e-11)


@pytest.mark.exhaustive
def test_tangents_are_those_of_the_solve_with_its_resyncs():
    tangent = lambda adjoint, door: jax.jvp(
        lambda x: _loss(x, START, adjoint, door)[0], (RATES,), (RATES,)
    )
    theirs = tangent(diffrax.DirectAdjoint(), diffrax.diffeqsolve)
    _close(tangent(OURS, nodegrad.odesolve), theirs, 1e-11)


def _recursion(rate, steps, every):
    """The coupled method of Euler, in NumPy, for a complex `rate`."""
    field = lambda t, y: -rate * (y - np.cos(t)) + 0.1 * y**2
    h = 3.0 / steps
    y = z = 1.0 + 0j
    for i in range(steps):
        t = i * h
        z = y if i % every == 0 else z
        y = COUPLING * y + (1 - COUPLING) * z + h * field(t, z)
        z = z + h * field(t + h, y)
    return y


# Up to 16 restarts have rows, up to 256 are found again at once, more in several
# passes.
STEPS = np.array([1, 16, 17, 33, 256, 257, 300, 700, 1000])


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("every", [1, 2, 7])
def test_any_number_of_resyncs_fits_into_the_rows(every):
    # The samples take different numbers of steps, and their restarts are thinned out
    # and found again at different steps. A complex step differentiates the recursion.
    solver = nodegrad.Reversible(diffrax.Euler(), COUPLING, resync_every=every)

    def end(rate, size):
        sol = nodegrad.odesolve(
            lambda t, y, rate: -rate * (y - jnp.cos(t)) + 0.1 * y**2,
            solver,
            0.0,
            3.0,
            size,
            jnp.array(1.0),
            rate,
            adjoint=OURS,
            max_steps=1000,
        )
        return sol.ys[0]

    # A little more than a part of the interval, so that rounding makes no step more.
    sizes = jnp.asarray(3.0 / STEPS * (1 + 1e-14))
    gradients = jax.jit(jax.vmap(jax.grad(end), (None, 0)))(0.7, sizes)
    expected = [_recursion(0.7 + 1e-30j, n, every).imag / 1e-30 for n in STEPS]
    np.testing.assert_allclose(gradients, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_steps", [5, 1000, 10**6])
def test_rows_have_a_bound(max_steps):
    regular = Restarts(10, False, False, max_steps, 0)
    chosen = Restarts(None, True, False, max_steps, 0)
    assert regular.rows <= min(32, max_steps)
    assert chosen.rows <= 32
    assert Restarts(None, False, False, max_steps, 0).rows == 0
    # A row for each of the three, and a fourth: every step writes a row, as slices of
    # XLA have no condition. A step that is no restart must not overwrite the last one.
    assert Restarts(None, False, True, max_steps, 3).rows <= 4


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_max_steps():
    def memory(max_steps):
        def end(y0):
            solver = nodegrad.Reversible(diffrax.Euler(), resync_every=10)
            field = lambda t, y, args: -y
            return jnp.sum(
                nodegrad.odesolve(
                    field, solver, 0.0, 1.0, 0.1, y0, adjoint=OURS, max_steps=max_steps
                ).ys
            )

        y0 = jax.ShapeDtypeStruct((1000,), jnp.float64)
        compiled = jax.jit(jax.grad(end)).lower(y0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 32 rows of two states, in the record and in the backward pass, and some states.
    assert memory(1000) == memory(100_000) < 150 * 8000


def _stiffening(t, u, args):
    return jnp.stack([1.5 * u[0] - u[0] * u[1] * t, -3 * u[1] + t * u[0] * u[1]])


def test_solves_that_the_coupling_would_lose_are_those_of_the_base_method():
    def end(solver, tol=1e-7):
        return nodegrad.odesolve(
            _stiffening,
            solver,
            0.0,
            10.0,
            None,
            jnp.array([1.0, 1.0]),
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=20_000,
            throw=False,
        )

    base = diffrax.Tsit5()
    plain, ours = end(base), end(nodegrad.Reversible(base))
    assert ours.result == nodegrad.RESULTS.successful
    assert ours.stats["num_steps"] < 1.7 * plain.stats["num_steps"]
    assert 0 < ours.stats["num_resyncs"] < 256
    exact = end(diffrax.Dopri8(), 1e-12).ys
    error = lambda sol: jnp.max(jnp.abs(sol.ys - exact))
    assert error(ours) < 10 * error(plain)


@pytest.mark.exhaustive
def test_a_solve_that_continues_another_one_resyncs_where_that_would():
    term, solver = diffrax.ODETerm(_relaxation), nodegrad.Reversible(diffrax.Bosh3())
    save = diffrax.SaveAt(t1=True, solver_state=True)

    def part(t0, t1, y0, state, rates):
        return diffrax.diffeqsolve(
            term,
            solver,
            t0,
            t1,
            0.02,
            y0,
            rates,
            saveat=save,
            solver_state=state,
            adjoint=OURS,
        )

    def in_parts(rates):
        first = part(0.0, 3.0, START, None, rates)
        second = part(3.0, 6.0, first.ys[-1], first.solver_state, rates)
        return jnp.sum(second.ys), second.stats["num_resyncs"]

    def at_once(rates):
        sol = part(0.0, 6.0, START, None, rates)
        return jnp.sum(sol.ys), sol.stats["num_resyncs"]

    (a, resyncs), ours = jax.value_and_grad(in_parts, has_aux=True)(RATES)
    (b, expected_resyncs), expected = jax.value_and_grad(at_once, has_aux=True)(RATES)
    assert resyncs == expected_resyncs > 0
    np.testing.assert_allclose(a, b, rtol=1e-10)
    np.testing.assert_allclose(ours, expected, rtol=1e-8)


@pytest.mark.parametrize("every", [1, "auto"])
def test_a_difference_that_is_discarded_is_no_failure(every):
    # With the rate 20 and steps of 0.05, one step drives the copies far apart. The next
    # one begins with equal copies, so that every step is one of the base method.
    def solve(solver):
        field = lambda t, y, args: -20 * (y - jnp.cos(t))
        return nodegrad.odesolve(
            field, solver, 0.0, 5.0, 0.05, jnp.array(3.0), throw=False
        )

    plain = solve(diffrax.Heun())
    ours = solve(nodegrad.Reversible(diffrax.Heun(), resync_every=every))
    assert ours.result == nodegrad.RESULTS.successful
    np.testing.assert_allclose(ours.ys, plain.ys, rtol=1e-12)


def test_every_step_resyncs_where_every_step_is_unstable():
    # The next step would more than double any distance. A step that begins without one
    # cannot tell, but an earlier step has.
    sol = nodegrad.odesolve(
        lambda t, y, args: -20 * (y - jnp.cos(t)),
        nodegrad.Reversible(diffrax.Heun()),
        0.0,
        5.0,
        0.05,
        jnp.array(3.0),
    )
    # No rate is known before the second step.
    assert sol.stats["num_resyncs"] >= sol.stats["num_steps"] - 2


@doors
@pytest.mark.parametrize("every", [1, "auto"])
def test_a_difference_that_spoils_the_solution_is_a_failure(door, every):
    # y' = y^3 from 3 in steps of 1. In the first step the difference is so large that
    # the sum of it and the second copy has no digit of the solution left.
    sol = DOORS[door](
        diffrax.ODETerm(lambda t, y, args: y**3),
        nodegrad.Reversible(diffrax.Heun(), resync_every=every),
        0.0,
        5.0,
        1.0,
        jnp.array(3.0),
        stepsize_controller=diffrax.ConstantStepSize(),
        throw=False,
    )
    assert sol.result != diffrax.RESULTS.successful


@pytest.mark.slow
def test_a_noisy_state_that_passes_through_zero_is_no_failure():
    # The difference after a step is five, and the state 1e-4 now and then.
    noise = diffrax.VirtualBrownianTree(0.0, 10.0, 1e-3, (), jax.random.key(0))
    drift = diffrax.ODETerm(lambda t, y, args: -20 * (y - jnp.cos(t)))
    diffusion = diffrax.ControlTerm(lambda t, y, args: jnp.sqrt(20.0), noise)
    solve = lambda solver: nodegrad.odesolve(
        diffrax.MultiTerm(drift, diffusion), solver, 0.0, 10.0, 0.1, 0.0, throw=False
    )
    ours = solve(nodegrad.Reversible(diffrax.Heun(), resync_every=1))
    assert ours.result == nodegrad.RESULTS.successful
    np.testing.assert_allclose(ours.ys, solve(diffrax.Heun()).ys, rtol=1e-9)
