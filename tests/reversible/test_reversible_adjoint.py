"""Gradients without stored states: against recursions and against Diffrax."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad

from ..matrix import DOORS, value_and_grad
from ..problems import (
    evaluations_per_stage,
    explicit_step,
    Field,
    relative_error,
    van_der_pol,
)


RCA = diffrax.RecursiveCheckpointAdjoint()
COUPLED = nodegrad.Reversible(diffrax.Bosh3(), resync_every=None)
RESTARTED = nodegrad.Reversible(diffrax.Heun(), 0.9, resync_every=3)
LEAPFROG = nodegrad.ALF()


# Against the recursions, written down by hand.


def _swinging(t, y, args):
    a, b = args
    return jnp.stack([a * y[1], -jnp.sin(y[0])]) * (1 + b * jnp.sin(t))


def _coupled_recursion(base, coupling, resync_every, h, n):
    """The published two copies `(y, z)`, coupled anew every so often."""

    def increment(t, h, x, args):
        return explicit_step(base.tableau, _swinging, t, t + h, x, args) - x

    def run(y0, args):
        def step(y__z, i):
            y, z = y__z
            if resync_every is not None:
                z = jnp.where(i % resync_every == 0, y, z)
            t = i.astype(h.dtype) * h
            y1 = coupling * y + (1 - coupling) * z + increment(t, h, z, args)
            return (y1, z - increment(t + h, -h, y1, args)), None

        (y, _), _ = jax.lax.scan(step, (y0, y0), jnp.arange(n))
        return jnp.sum(jnp.sin(y))

    return run


def _leapfrog_recursion(damping, resync_every, h, n):
    def run(y0, args):
        def step(x__v, i):
            x, v = x__v
            t = i.astype(h.dtype) * h
            if resync_every is not None:
                v = jnp.where(i % resync_every == 0, _swinging(t, x, args), v)
            middle = x + 0.5 * h * v
            v1 = v + 2 * damping * (_swinging(t + 0.5 * h, middle, args) - v)
            return (middle + 0.5 * h * v1, v1), None

        init = y0, _swinging(0.0, y0, args)
        (y, _), _ = jax.lax.scan(step, init, jnp.arange(n))
        return jnp.sum(jnp.sin(y))

    return run


@pytest.mark.rows(test=3, ci=5)
@pytest.mark.parametrize(
    "door, solver",
    [
        ("diffrax", nodegrad.Reversible(diffrax.Midpoint(), resync_every=None)),
        ("native", nodegrad.Reversible(nodegrad.RK4(), resync_every=None)),
        ("native", nodegrad.Reversible(nodegrad.RK4(), 0.95, resync_every=10)),
        ("diffrax", nodegrad.Reversible(diffrax.Heun(), 0.95, resync_every=10)),
        ("native", nodegrad.ALF()),
        ("diffrax", nodegrad.ALF(0.99)),
        ("native", nodegrad.ALF(0.9, resync_every=7)),
    ],
    ids=str,
)
def test_gradient_is_that_of_the_recursion(door, solver):
    t1, n = 10.0, 1000
    h = jnp.array(t1 / n)
    if isinstance(solver, nodegrad.ALF):
        recursion = _leapfrog_recursion(solver.damping, solver.resync_every, h, n)
    else:
        coupling = solver.coupling_parameter
        recursion = _coupled_recursion(
            solver.solver, coupling, solver.resync_every, h, n
        )

    def loss(y0, args):
        sol = DOORS[door](
            diffrax.ODETerm(_swinging),
            solver,
            0.0,
            t1,
            h,
            y0,
            args,
            adjoint=nodegrad.ReversibleAdjoint(),
        )
        return jnp.sum(jnp.sin(sol.ys[0]))

    point = jnp.array([1.0, 0.0]), (jnp.array(0.9), jnp.array(0.3))
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*point)
    expected = jax.jit(jax.value_and_grad(recursion, argnums=(0, 1)))(*point)
    assert relative_error((value, grads), expected) < 1e-10


# Against Diffrax's default adjoint, on the same solver.


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize(
    "door, solver, controller, saveat, backwards",
    [
        ("native", COUPLED, "constant", "all", False),
        ("diffrax", COUPLED, "constant", "dense", False),
        ("native", COUPLED, "pid", "all", True),
        ("diffrax", COUPLED, "clip", "fn", False),
        ("diffrax", RESTARTED, "constant", "fn", True),
        ("native", RESTARTED, "clip", "all", False),
        ("diffrax", LEAPFROG, "pid", "all", False),
        ("native", LEAPFROG, "step_to", "fn", True),
        (
            "diffrax",
            nodegrad.ALF(resync_every=2),
            "pid, dt0 far too large",
            "t1",
            False,
        ),
        ("diffrax", diffrax.ReversibleHeun(), "constant", "all", False),
        ("native", diffrax.ReversibleHeun(), "clip", "t1", False),
        ("diffrax", diffrax.ReversibleHeun(), "step_to", "ts", True),
        ("native", diffrax.LeapfrogMidpoint(), "step_to", "all", False),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_matches_diffrax_on_the_same_solver(
    door, solver, controller, saveat, backwards
):
    setting = solver, controller, saveat, backwards
    expected = value_and_grad(diffrax.diffeqsolve, RCA, *setting)
    ours = value_and_grad(DOORS[door], nodegrad.ReversibleAdjoint(), *setting)
    assert relative_error(ours, expected) < 1e-10


@pytest.mark.exhaustive
def test_matches_diffrax_for_semi_implicit_euler():
    class Pendulum:
        @staticmethod
        def terms():
            force = lambda t, q, k: -k * jnp.sin(q) * (1 + 0.1 * t)
            return diffrax.ODETerm(force), diffrax.ODETerm(lambda t, p, k: p / k)

    def loss(y0, k, t1, solve, adjoint):
        sol = solve(
            Pendulum.terms(),
            diffrax.SemiImplicitEuler(),
            0.2,
            t1,
            0.05,
            y0,
            k,
            saveat=diffrax.SaveAt(ts=[0.33, 0.7], t1=True),
            adjoint=adjoint,
        )
        return sum(jnp.sum(jnp.sin(y)) for y in sol.ys)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=(3, 4))
    point = (jnp.array([0.3]), jnp.array([1.0])), jnp.array(1.3), jnp.array(2.0)
    expected = grad(*point, diffrax.diffeqsolve, RCA)
    for solve in DOORS.values():
        ours = grad(*point, solve, nodegrad.ReversibleAdjoint())
        assert relative_error(ours, expected) < 1e-12


@pytest.mark.exhaustive
@pytest.mark.parametrize("made_jump", [None, True])
@pytest.mark.parametrize(
    "solver",
    [RESTARTED, nodegrad.ALF(resync_every=10), diffrax.ReversibleHeun()],
    ids=repr,
)
def test_continues_where_another_solve_ended(solver, made_jump):
    # The second solve starts between two restarts, and perhaps at a jump.
    def loss(a, y0, adjoint):
        def solve(t0, t1, y0, saveat, **kwargs):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, a: jnp.sin(a * t) - jnp.tanh(a * y)),
                solver,
                t0,
                t1,
                0.1,
                y0,
                a,
                saveat=saveat,
                adjoint=adjoint,
                max_steps=64,
                **kwargs,
            )

        first = solve(0.0, 0.7, y0, diffrax.SaveAt(t1=True, solver_state=True))
        state = dict(solver_state=first.solver_state, made_jump=made_jump)
        last = solve(0.7, 2.6, first.ys[-1], diffrax.SaveAt(t1=True), **state)
        return jnp.sum(last.ys**2)

    point = jnp.array(1.3), jnp.array([1.0, 0.3])
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    # (Diffrax's own adjoint takes a jump at the start for one at every step.)
    adjoint = nodegrad.ACAAdjoint() if made_jump else RCA
    expected = grad(*point, adjoint)
    assert relative_error(grad(*point, nodegrad.ReversibleAdjoint()), expected) < 1e-12


@pytest.mark.rows(test=1, ci=3)
@pytest.mark.parametrize("solver", [COUPLED, RESTARTED, LEAPFROG], ids=repr)
def test_gradients_of_times_are_those_of_differences(solver):
    # The last step is shorter than the others, and a save is inside of one.
    def loss(times):
        t0, ts, t1 = times
        sol = nodegrad.odesolve(
            _swinging,
            solver,
            t0,
            t1,
            0.13,
            jnp.array([1.0, 0.5]),
            (0.9, 0.3),
            saveat=diffrax.SaveAt(ts=ts[None], t1=True),
            adjoint=nodegrad.ReversibleAdjoint(),
        )
        return jnp.sum(jnp.sin(sol.ys))

    times, eps = jnp.array([0.2, 0.94, 1.9]), 1e-5
    grad = jax.jit(jax.grad(loss))(times)
    loss = jax.jit(loss)
    for i, direction in enumerate(eps * jnp.eye(3)):
        difference = loss(times + direction) - loss(times - direction)
        assert abs(difference / (2 * eps) - grad[i]) < 1e-6 * max(1.0, abs(grad[i]))


def test_one_compilation_serves_changing_times():
    traces = []

    @jax.jit
    def grad(t1):
        traces.append(1)

        def loss(y0):
            return nodegrad.odesolve(
                _swinging,
                RESTARTED,
                0.0,
                t1,
                0.1,
                y0,
                (0.9, 0.3),
                adjoint=nodegrad.ReversibleAdjoint(),
            ).ys[0, 0]

        return jax.grad(loss)(jnp.array([1.0, 0.5]))

    few, many = grad(jnp.array(0.5)), grad(jnp.array(2.0))
    assert len(traces) == 1
    assert not jnp.allclose(few, many)


@pytest.mark.rows(test=1, ci=3)
@pytest.mark.parametrize("solver", [COUPLED, RESTARTED, LEAPFROG], ids=repr)
def test_nothing_happens_between_equal_times(solver):
    def loss(y0, t1):
        sol = nodegrad.odesolve(
            _swinging,
            solver,
            0.5,
            t1,
            0.1,
            y0,
            (jnp.array(1.0), jnp.array(0.3)),
            adjoint=nodegrad.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys**2)

    y0 = jnp.array([1.0, 2.0])
    gradient = jax.grad(loss)(y0, 0.5)
    assert jnp.array_equal(gradient, 2 * y0)


@pytest.mark.exhaustive
def test_arrays_in_terms_and_closures_are_differentiated():
    field = Field(3, 8, jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(1), (3,))

    def loss(field, scale, solve, adjoint):
        # `field` is inside the term, `scale` is closed over.
        term = diffrax.ODETerm(lambda t, y, args: scale * field(t, y, args))
        sol = solve(term, COUPLED, 0.0, 1.0, 0.1, y0, adjoint=adjoint)
        return jnp.sum(sol.ys**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    expected = grad(field, jnp.array(0.7), diffrax.diffeqsolve, RCA)
    ours = grad(field, jnp.array(0.7), nodegrad.odesolve, nodegrad.ReversibleAdjoint())
    assert relative_error(ours, expected) < 1e-12

    def module_loss(field, solve, adjoint):
        sol = solve(diffrax.ODETerm(field), COUPLED, 0.0, 1.0, 0.1, y0, adjoint=adjoint)
        return jnp.sum(sol.ys**2)

    grad = jax.jit(jax.grad(module_loss), static_argnums=(1, 2))
    expected = grad(field, diffrax.diffeqsolve, RCA)
    ours = grad(field, diffrax.diffeqsolve, nodegrad.ReversibleAdjoint())
    assert relative_error(ours, expected) < 1e-12


@pytest.mark.slow
def test_single_precision_is_right_to_single_precision():
    field = Field(8, 32, jr.PRNGKey(0), jnp.float32)
    y0 = jr.normal(jr.PRNGKey(1), (8,), jnp.float32)

    def loss(field, y0, adjoint):
        h, zero = jnp.float32(2e-3), jnp.float32(0)
        sol = nodegrad.odesolve(
            field, COUPLED, zero, jnp.float32(2), h, y0, adjoint=adjoint
        )
        return jnp.sum(sol.ys**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    stored = grad(field, y0, nodegrad.ACAAdjoint())
    undone = grad(field, y0, nodegrad.ReversibleAdjoint())
    assert relative_error(undone, stored) < 5e-5


# Batches and second derivatives.


def _pendulum_loss(solve, solver, controller=None, **kwargs):
    def loss(point):
        sol = solve(
            diffrax.ODETerm(van_der_pol),
            solver,
            0.0,
            1.0,
            0.05,
            point[:2],
            point[2],
            stepsize_controller=controller or diffrax.ConstantStepSize(),
            max_steps=256,
            **kwargs,
        )
        return jnp.sum(sol.ys)

    return loss


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "door, solver",
    [("native", COUPLED), ("diffrax", RESTARTED), ("native", LEAPFROG)],
    ids=str,
)
def test_second_derivatives_are_exact(door, solver):
    point, v = jnp.array([2.0, 0.0, 0.5]), jnp.array([0.3, 0.2, 0.1])
    adjoint = nodegrad.ReversibleAdjoint()
    loss = _pendulum_loss(DOORS[door], solver, adjoint=adjoint)
    truth = _pendulum_loss(diffrax.diffeqsolve, solver, adjoint=diffrax.DirectAdjoint())
    expected = jax.jit(jax.jacfwd(jax.jacfwd(truth)))(point)
    assert relative_error(jax.jit(jax.hessian(loss))(point), expected) < 1e-10
    hvp = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (v,))[1])(point)
    assert relative_error(hvp, expected @ v) < 1e-10


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize(
    "solver, size",
    [
        (COUPLED, 1),
        (COUPLED, 32),
        (COUPLED, 1000),
        (RESTARTED, 1000),
        (LEAPFROG, 32),
        (diffrax.ReversibleHeun(), 32),
    ],
    ids=repr,
)
def test_batches_match_single_solves(solver, size):
    y0 = 0.5 * jr.normal(jr.PRNGKey(0), (size, 2)) + jnp.array([[2.0, 0.0]])
    mu = jnp.array(0.5)
    # With equal steps, which are the same for all lanes, and with steps of their own.
    pid = diffrax.PIDController(1e-4, 1e-5)
    controller = diffrax.ConstantStepSize() if size == 1000 else pid

    def solve(y0, mu, **kwargs):
        return nodegrad.odesolve(
            lambda t, y, mu: jnp.stack([y[1], -mu * jnp.sin(y[0])]),
            solver,
            0.0,
            1.0,
            0.05,
            y0,
            mu,
            stepsize_controller=controller,
            adjoint=nodegrad.ReversibleAdjoint(),
            max_steps=256,
            **kwargs,
        ).ys

    one = jax.grad(lambda y0, mu: jnp.sum(solve(y0, mu) ** 2), argnums=(0, 1))
    vmapped = jax.jit(jax.vmap(one, in_axes=(0, None)))(y0, mu)
    few = slice(0, min(size, 32))
    in_turn = jax.jit(lambda y0: jax.lax.map(lambda y: one(y, mu), y0))(y0[few])
    assert relative_error([g[few] for g in vmapped], in_turn) < 1e-10
    together = jax.jit(
        jax.grad(
            lambda y0, mu: jnp.sum(solve(y0, mu, batched=True) ** 2), argnums=(0, 1)
        )
    )(y0, mu)
    assert relative_error(together, (vmapped[0], jnp.sum(vmapped[1]))) < 1e-10


# What it costs.


@pytest.mark.rows(test=1, ci=4)
@pytest.mark.parametrize(
    "solver, first, forward, backward",
    [
        (
            nodegrad.Reversible(diffrax.Tsit5(), resync_every=None),
            *(0, 12, 12 * evaluations_per_stage()),
        ),
        (
            nodegrad.Reversible(diffrax.Midpoint(), resync_every=None),
            *(0, 4, 4 * evaluations_per_stage()),
        ),
        (nodegrad.ALF(), 1, 1, 1),
        (diffrax.ReversibleHeun(), 1, 1, 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_evaluations_are_those_stated(solver, first, forward, backward):
    counts, n = [], 20

    def counted(t, y, args):
        jax.debug.callback(lambda: counts.append(1))
        return -y * jnp.sin(y)

    for solve in DOORS.values():

        def loss(y0, solve=solve):
            sol = solve(
                diffrax.ODETerm(counted),
                solver,
                0.0,
                1.0,
                1 / n,
                y0,
                adjoint=nodegrad.ReversibleAdjoint(),
            )
            return sol.ys[0]

        counts.clear()
        jax.block_until_ready(loss(jnp.array(1.0)))
        jax.effects_barrier()
        # Diffrax's loop also evaluates some shapes.
        before = len(counts)
        assert before == n * forward + first
        counts.clear()
        jax.block_until_ready(jax.grad(loss)(jnp.array(1.0)))
        jax.effects_barrier()
        assert len(counts) - before == n * backward


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize(
    "door, solver",
    [
        ("native", COUPLED),
        ("diffrax", COUPLED),
        ("diffrax", LEAPFROG),
        ("native", diffrax.ReversibleHeun()),
    ],
    ids=str,
)
def test_memory_does_not_grow_with_the_number_of_steps(door, solver):
    def temporary(max_steps, adjoint):
        def loss(y0):
            sol = DOORS[door](
                diffrax.ODETerm(lambda t, y, args: -y * jnp.roll(y, 1)),
                solver,
                0.0,
                1.0,
                1 / max_steps,
                y0,
                adjoint=adjoint,
                max_steps=max_steps,
            )
            return jnp.sum(sol.ys)

        lowered = jax.jit(jax.value_and_grad(loss)).lower(jnp.ones(1000))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary(n, nodegrad.ReversibleAdjoint()) for n in (100, 10_000))
    assert many <= 1.05 * few
    # The measure sees memory that does grow.
    few, many = (temporary(n, nodegrad.ACAAdjoint()) for n in (100, 10_000))
    assert many > 2 * few


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize(
    "door, solver", [("native", COUPLED), ("diffrax", LEAPFROG)], ids=str
)
def test_adaptive_steps_take_a_few_bytes_each(door, solver):
    def temporary(max_steps):
        def loss(y0):
            sol = DOORS[door](
                diffrax.ODETerm(lambda t, y, args: -y * jnp.roll(y, 1)),
                solver,
                0.0,
                1.0,
                None,
                y0,
                adjoint=nodegrad.ReversibleAdjoint(),
                stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
                max_steps=max_steps,
            )
            return jnp.sum(sol.ys)

        lowered = jax.jit(jax.value_and_grad(loss)).lower(jnp.ones(100))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(100_000) - temporary(10_000) <= 16 * 90_000


# What it refuses, and what it reports.


def test_refuses_a_solver_that_cannot_be_undone():
    for solve in DOORS.values():
        with pytest.raises(TypeError, match=r"nodegrad.Reversible\(Tsit5\(\)\)"):
            solve(
                diffrax.ODETerm(lambda t, y, args: -y),
                diffrax.Tsit5(),
                0.0,
                1.0,
                0.1,
                jnp.array(1.0),
                adjoint=nodegrad.ReversibleAdjoint(),
            )


def _forgetful_loss(y0, throw, **kwargs):
    # Decays so far that nothing of the start is left to be found again.
    sol = nodegrad.odesolve(
        lambda t, y, args: -4 * y,
        nodegrad.Reversible(diffrax.Bosh3(), 0.9, resync_every=None),
        0.0,
        10.0,
        0.005,
        y0,
        adjoint=nodegrad.ReversibleAdjoint(),
        throw=throw,
        **kwargs,
    )
    return jnp.sum(sol.ys)


def test_a_way_back_that_goes_astray_is_an_error_or_a_nan():
    y0 = jnp.array([1.0])
    with pytest.raises(RuntimeError, match="resync_every"):
        jax.block_until_ready(
            jax.jit(jax.grad(_forgetful_loss), static_argnums=1)(y0, True)
        )
    assert jnp.all(jnp.isnan(jax.grad(_forgetful_loss)(y0, False)))


@pytest.mark.exhaustive
def test_reconstruction_error_is_reported_on_request():
    field, y0 = Field(8, 32, jr.PRNGKey(0)), jr.normal(jr.PRNGKey(1), (3, 8))

    def solve(field, y0, coupling, door, check, **kwargs):
        return door(
            diffrax.ODETerm(field),
            nodegrad.Reversible(diffrax.Midpoint(), coupling, resync_every=None),
            0.0,
            5.0,
            5e-3,
            y0,
            adjoint=nodegrad.ReversibleAdjoint(check=check),
            **kwargs,
        )

    for door in DOORS.values():
        small, large = (
            solve(field, y0[0], c, door, True).stats["reconstruction_error"]
            for c in (0.999, 0.97)
        )
        assert 0 < small < 1e-13
        assert 1e-6 < large < 1e-1
        assert "reconstruction_error" not in solve(field, y0[0], 0.9, door, False).stats
    stats = solve(field, y0, 0.97, nodegrad.odesolve, True, batched=True).stats
    assert stats["reconstruction_error"].shape == (3,)
    assert jnp.all(stats["reconstruction_error"] > 1e-6)

    def loss(field, check):
        return jnp.sum(solve(field, y0[0], 0.999, nodegrad.odesolve, check).ys ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    assert relative_error(grad(field, True), grad(field, False)) < 1e-13


@pytest.mark.slow
def test_restarts_far_apart_are_not_taken_for_errors():
    # At a restart the copies are far apart, which is as it should be.
    def loss(y0, adjoint):
        sol = nodegrad.odesolve(
            _swinging,
            nodegrad.Reversible(diffrax.Euler(), resync_every=10),
            0.0,
            10.0,
            0.1,
            y0,
            (0.9, 0.3),
            adjoint=adjoint,
        )
        return jnp.sum(sol.ys)

    y0 = jnp.array([1.0, 0.0])
    expected = jax.grad(loss)(y0, nodegrad.ACAAdjoint())
    ours = jax.grad(loss)(y0, nodegrad.ReversibleAdjoint())
    assert relative_error(ours, expected) < 1e-12


def test_starting_from_rest_is_not_taken_for_an_error():
    def loss(y0):
        h, one = jnp.float32(1e-3), jnp.float32(1)
        sol = nodegrad.odesolve(
            lambda t, y, args: jnp.cos(3 * t + y),
            COUPLED,
            jnp.float32(0),
            one,
            h,
            y0,
            adjoint=nodegrad.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys)

    assert jnp.all(jnp.isfinite(jax.grad(loss)(jnp.zeros(3, jnp.float32))))


def _falls_apart(rate, throw):
    # `y' = rate (y - cos t) - sin t`: its copies come apart where that decays.
    sol = nodegrad.odesolve(
        lambda t, y, rate: rate * (y - jnp.cos(t)) - jnp.sin(t),
        nodegrad.Reversible(diffrax.Midpoint(), resync_every=None),
        0.0,
        20.0,
        0.02,
        jnp.ones_like(rate),
        rate,
        adjoint=nodegrad.ReversibleAdjoint(),
        max_steps=1000,
        throw=throw,
    )
    return sol.ys[-1]


def test_gradient_of_a_lost_solve_raises_or_is_that_of_its_part():
    # A loss that is linear in the value: JAX drops the exception of the solve itself.
    with pytest.raises(RuntimeError, match="resync_every"):
        jax.block_until_ready(jax.jit(jax.grad(lambda r: _falls_apart(r, True)))(-1.0))
    rates = jnp.array([0.1, -1.0])
    grads = jax.jit(jax.vmap(jax.grad(lambda r: _falls_apart(r, False))))(rates)
    alone = jax.grad(lambda r: _falls_apart(r, False))(0.1)
    assert jnp.allclose(grads[0], alone, rtol=1e-12)
    assert jnp.all(jnp.isfinite(grads))


def test_times_may_be_less_precise_than_states():
    time = jnp.float32

    def loss(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.cos(y)),
            COUPLED,
            time(0),
            time(1),
            time(0.125),
            y0,
            adjoint=nodegrad.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys)

    with jax.numpy_dtype_promotion("standard"):
        assert jnp.all(jnp.isfinite(jax.grad(loss)(jnp.array([1.0, 2.0]))))


def test_a_small_component_is_not_lost_behind_a_large_one():
    def loss(a):
        sol = nodegrad.odesolve(
            lambda t, y, a: (0 * y[0], -a * y[1] ** 3),
            nodegrad.Reversible(diffrax.Midpoint(), 0.945, resync_every=None),
            0.0,
            1.0,
            1 / 800,
            (jnp.array(1e8), jnp.array(1.0)),
            a,
            adjoint=nodegrad.ReversibleAdjoint(),
            throw=False,
        )
        return sol.ys[1][0]

    assert jnp.isnan(jax.grad(loss)(1.0))
