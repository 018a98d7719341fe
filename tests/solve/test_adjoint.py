"""Gradients through both doors: Diffrax's default adjoint, and the frozen grid."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import nodegrad

from ..matrix import CONTROLLERS, DOORS, value_and_grad
from ..problems import (
    accepted_grid,
    evaluations_per_stage,
    relative_error,
    unrolled,
    van_der_pol,
)


def _check(solver, controller, saveat, tol, backwards=False):
    rca = diffrax.RecursiveCheckpointAdjoint()
    setting = solver, controller, saveat, backwards
    value, grads = value_and_grad(diffrax.diffeqsolve, rca, *setting)
    for solve, adjoint in (
        # Fewer slots than steps, and a slot for every step.
        (nodegrad.odesolve, nodegrad.ACAAdjoint(3)),
        (diffrax.diffeqsolve, nodegrad.ACAAdjoint("all")),
    ):
        our_value, our_grads = value_and_grad(solve, adjoint, *setting)
        assert jnp.allclose(our_value, value, rtol=1e-12)
        assert relative_error(our_grads, grads) < tol


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    ("controller", "saveat"),
    [
        *((name, "all") for name in CONTROLLERS),
        ("constant", "dense"),
        ("clip", "dense"),
    ],
)
def test_matches_diffrax_for_every_controller_and_output(controller, saveat):
    adaptive = controller.startswith("pid") or controller == "clip"
    _check(diffrax.Tsit5(), controller, saveat, 1e-9 if adaptive else 1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("controller", ["constant", "pid", "step_to"])
def test_matches_diffrax_backwards_in_time(controller):
    tol = 1e-9 if controller == "pid" else 1e-12
    _check(diffrax.Tsit5(), controller, "all", tol, backwards=True)


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Euler(),
        nodegrad.RK4(),
        diffrax.Dopri5(),
        diffrax.Dopri8(),
        diffrax.HalfSolver(diffrax.Heun()),
        diffrax.LeapfrogMidpoint(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_matches_diffrax_for_every_solver(solver):
    _check(solver, "constant", "all", 1e-12)


@pytest.mark.exhaustive
def test_matches_diffrax_for_an_implicit_solver():
    root_finder = diffrax.VeryChord(rtol=1e-10, atol=1e-10)
    # Stages are known to 1e-10, and one more iteration may be made or not.
    _check(diffrax.Kvaerno3(root_finder=root_finder), "pid", "ts", 1e-8)


@pytest.mark.exhaustive
def test_matches_diffrax_with_the_same_stage_code_and_adaptive_steps():
    # `HalfSolver` goes through Diffrax's own `step` in both.
    _check(diffrax.HalfSolver(diffrax.Heun()), "pid", "fn", 1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("saveat", [diffrax.SaveAt(t1=True), diffrax.SaveAt(ts=[0.52])])
def test_matches_diffrax_for_a_stochastic_equation(saveat):
    path = diffrax.VirtualBrownianTree(
        0.0, 1.0, tol=1e-3, shape=(2,), key=jr.PRNGKey(3)
    )
    drift = diffrax.ODETerm(lambda t, y, a: -a * y)

    def loss(y0, a, solve, adjoint):
        noise = lambda t, y, a: jnp.diag(a * jnp.sin(y) + 0.1)
        terms = diffrax.MultiTerm(drift, diffrax.ControlTerm(noise, path))
        sol = solve(
            terms, diffrax.Heun(), 0.0, 1.0, 0.05, y0, a, saveat=saveat, adjoint=adjoint
        )
        return jnp.sum(sol.ys**2)

    y0, a = jnp.array([1.0, 0.5]), jnp.array(0.7)
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    reference = grad(y0, a, diffrax.diffeqsolve, diffrax.RecursiveCheckpointAdjoint())
    for solve, checkpoints in zip(DOORS.values(), (None, 4), strict=True):
        ours = grad(y0, a, solve, nodegrad.ACAAdjoint(checkpoints))
        assert relative_error(ours, reference) < 1e-12


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Bosh3()])
def test_matches_the_unrolled_accepted_grid(solver):
    y0, mu = jnp.array([2.0, 0.0]), jnp.array(5.0)
    controller = diffrax.PIDController(1e-4, 1e-6)
    grid = accepted_grid(van_der_pol, solver, 0.0, 3.0, y0, mu, controller)
    frozen = lambda y0, mu: jnp.sum(unrolled(solver, van_der_pol, grid, y0, mu))
    expected = jax.grad(frozen, argnums=(0, 1))(y0, mu)

    def loss(y0, mu, solve, checkpoints):
        sol = solve(
            diffrax.ODETerm(van_der_pol),
            solver,
            0.0,
            3.0,
            None,
            y0,
            mu,
            stepsize_controller=controller,
            adjoint=nodegrad.ACAAdjoint(checkpoints),
        )
        return jnp.sum(sol.ys)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    for door, checkpoints in [
        ("native", None),
        ("native", 5),
        ("diffrax", 1),
        ("diffrax", "all"),
    ]:
        assert relative_error(grad(y0, mu, DOORS[door], checkpoints), expected) < 1e-12


def test_van_der_pol_reference_values_and_counted_evaluations():
    counts = []

    def counted(t, y, mu):
        jax.debug.callback(lambda: counts.append(1))
        return van_der_pol(t, y, mu)

    def loss(y0, mu, solve, field):
        sol = solve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            10.0,
            None,
            y0,
            mu,
            stepsize_controller=diffrax.PIDController(1e-6, 1e-6),
            adjoint=nodegrad.ACAAdjoint(),
        )
        return jnp.sum(sol.ys), sol.stats

    y0, mu = jnp.array([2.0, 0.0]), jnp.array(5.0)
    for solve in DOORS.values():
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (grad_y0, grad_mu), stats = jax.jit(grad, static_argnums=(2, 3))(
            y0, mu, solve, van_der_pol
        )
        # Computed by Diffrax 0.7.2 with `RecursiveCheckpointAdjoint`.
        assert jnp.allclose(grad_y0, jnp.array([-6.36009613, -0.42591959]), rtol=1e-8)
        assert jnp.allclose(grad_mu, -1.3041883713464, rtol=1e-11)
        assert stats["num_accepted_steps"] == 94
        assert stats["num_rejected_steps"] == 16

        counts.clear()
        jax.block_until_ready(loss(y0, mu, solve, counted))
        jax.effects_barrier()
        forward = len(counts)
        assert forward == 6 * (94 + 16) + 1
        counts.clear()
        jax.block_until_ready(grad(y0, mu, solve, counted))
        jax.effects_barrier()
        assert len(counts) - forward == evaluations_per_stage() * 6 * 94
        assert stats["num_vector_field_evaluations"] == forward


_MATRIX = jnp.diag(jnp.array([-1.0, -0.9, -0.8, -0.7]))


def test_rejected_steps_cost_nothing_backwards():
    counts = []

    def counted(t, y, mu):
        jax.debug.callback(lambda: counts.append(1))
        return van_der_pol(t, y, mu)

    def loss(y0, dt0):
        sol = nodegrad.odesolve(
            counted,
            diffrax.Tsit5(),
            0.0,
            1.0,
            dt0,
            y0,
            jnp.array(5.0),
            stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
            max_steps=64,
        )
        return jnp.sum(sol.ys), sol.stats

    y0 = jnp.array([2.0, 0.0])
    rejected = []
    for dt0 in (1e-3, 1e3):
        counts.clear()
        _, stats = jax.block_until_ready(loss(y0, dt0))
        jax.effects_barrier()
        forward = len(counts)
        counts.clear()
        jax.block_until_ready(jax.grad(loss, has_aux=True)(y0, dt0))
        jax.effects_barrier()
        backward = evaluations_per_stage() * 6 * stats["num_accepted_steps"]
        assert len(counts) - forward == backward
        rejected.append(int(stats["num_rejected_steps"]))
    assert rejected[1] > rejected[0]


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize(
    "field, pullback",
    # What the pullback of a step evaluates. Products of matrices are not done twice.
    [(lambda y: -y, 6 * evaluations_per_stage()), (lambda y: _MATRIX @ y, 6)],
    ids=["elementwise", "product"],
)
def test_fewer_slots_than_steps_cost_at_most_one_extra_sweep(field, pullback):
    counts = []

    def counted(t, y, args):
        jax.debug.callback(lambda: counts.append(1))
        return field(y)

    def loss(y0, checkpoints):
        sol = nodegrad.odesolve(
            counted,
            diffrax.Tsit5(),
            0.0,
            1.0,
            1 / 45,
            y0,
            adjoint=nodegrad.ACAAdjoint(checkpoints),
            max_steps=100,
        )
        return jnp.sum(sol.ys[0])

    for checkpoints, again in ((64, 0), (8, 45 - 6), (1, 44)):
        counts.clear()
        jax.block_until_ready(loss(jnp.ones(4), checkpoints))
        jax.effects_barrier()
        forward = len(counts)
        counts.clear()
        jax.block_until_ready(jax.grad(loss)(jnp.ones(4), checkpoints))
        jax.effects_barrier()
        assert len(counts) - forward == pullback * 45 + 6 * again


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "saveat", [diffrax.SaveAt(t1=True), diffrax.SaveAt(steps=True)]
)
def test_event_time_and_state_have_the_gradient_of_the_implicit_formula(saveat):
    root_finder = optx.Newton(1e-10, 1e-10)
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0], root_finder)

    def impact(height, gravity, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, g: jnp.stack([y[1], -g])),
            diffrax.Tsit5(),
            0.0,
            3.0,
            0.1,
            jnp.stack([height, jnp.array(0.0)]),
            gravity,
            event=event,
            saveat=saveat,
            stepsize_controller=diffrax.PIDController(1e-8, 1e-8),
            adjoint=adjoint,
            max_steps=64,
        )
        last = jnp.argmax(jnp.where(jnp.isfinite(sol.ts), sol.ts, 0.0))
        return sol.ts[last], sol.ys[last, 1]

    jacobian = jax.jit(jax.jacrev(impact, argnums=(0, 1)), static_argnums=2)
    height, gravity = jnp.array(3.0), jnp.array(8.0)
    time, speed = jacobian(height, gravity, nodegrad.ACAAdjoint())
    assert jnp.allclose(time[0], 1 / jnp.sqrt(2 * gravity * height), rtol=1e-8)
    assert jnp.allclose(time[1], -jnp.sqrt(2 * height / gravity) / (2 * gravity))
    # v = -sqrt(2 g x)
    assert jnp.allclose(speed[0], -jnp.sqrt(gravity / (2 * height)), rtol=1e-8)
    assert jnp.allclose(speed[1], -jnp.sqrt(height / (2 * gravity)), rtol=1e-8)


@pytest.mark.slow
def test_closed_over_arrays_are_differentiated():
    y0 = jnp.array([1.0, 2.0])

    def loss(matrix, scale, solve):
        sol = solve(
            diffrax.ODETerm(lambda t, y, args: matrix @ y),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            y0,
            saveat=diffrax.SaveAt(steps=2, fn=lambda t, y, args: scale * y),
            max_steps=10,
        )
        return jnp.sum(sol.ys[:5] ** 2)

    def reference(matrix, scale):
        solver, grid = diffrax.Tsit5(), jnp.linspace(0.0, 1.0, 11)
        field = lambda t, y, args: matrix @ y
        ys = [unrolled(solver, field, grid[: 2 * i + 1], y0, None) for i in range(1, 6)]
        return jnp.sum((scale * jnp.stack(ys)) ** 2)

    matrix, scale = jnp.array([[0.1, 1.0], [-1.0, 0.2]]), jnp.array(0.7)
    expected = jax.grad(reference, argnums=(0, 1))(matrix, scale)
    for solve in DOORS.values():
        ours = jax.grad(loss, argnums=(0, 1))(matrix, scale, solve)
        assert relative_error(ours, expected) < 1e-12


@pytest.mark.exhaustive
def test_chained_solver_state_carries_its_gradient():
    def loss(y0, adjoint):
        kwargs = dict(
            saveat=diffrax.SaveAt(t1=True, solver_state=True), adjoint=adjoint
        )
        term = diffrax.ODETerm(lambda t, y, args: jnp.sin(y))
        first = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, **kwargs)
        _, f1 = first.solver_state
        second = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 1.0, 2.0, 0.1, first.ys[-1], **kwargs
        )
        return jnp.sum(second.ys) + jnp.sum(f1**2)

    y0 = jnp.array([0.3, -0.2])
    ours = jax.grad(loss)(y0, nodegrad.ACAAdjoint())
    reference = jax.grad(loss)(y0, diffrax.RecursiveCheckpointAdjoint())
    assert relative_error(ours, reference) < 1e-12


@pytest.mark.parametrize(
    ("checkpoints", "error"), [(0, ValueError), (2.5, TypeError), ("some", TypeError)]
)
def test_nonsense_checkpoints_are_refused(checkpoints, error):
    with pytest.raises(error, match="checkpoints"):
        nodegrad.ACAAdjoint(checkpoints)


def test_gradient_without_a_bound_on_the_steps_is_refused():
    def loss(y0, solve):
        sol = solve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            y0,
            adjoint=nodegrad.ACAAdjoint(),
            max_steps=None,
        )
        return sol.ys[0]

    for solve in DOORS.values():
        assert jnp.allclose(loss(1.0, solve), jnp.exp(-1.0), rtol=1e-6)
        with pytest.raises(RuntimeError, match="max_steps"):
            jax.grad(loss)(1.0, solve)


def test_gradient_of_a_tolerance_is_refused():
    def loss(rtol, solve):
        sol = solve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            jnp.array(1.0),
            stepsize_controller=diffrax.PIDController(rtol, 1e-6),
            adjoint=nodegrad.ACAAdjoint(),
        )
        return sol.ys[0]

    for solve in DOORS.values():
        with pytest.raises(RuntimeError, match="stop_gradient"):
            jax.grad(loss)(1e-3, solve)


@pytest.mark.slow
def test_jumps_are_replayed_where_they_were():
    # More steps than slots, and a solver that starts anew at a jump.
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(1e-3, 1e-4), jump_ts=jnp.array([0.31, 0.62])
    )

    def loss(y0, a, solve, adjoint):
        field = lambda t, y, a: jnp.sin(a * y) + jnp.where(t < 0.31, 0.0, 2.0)
        sol = solve(
            diffrax.ODETerm(field),
            diffrax.ReversibleHeun(),
            0.0,
            1.0,
            None,
            y0,
            a,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
        )
        return jnp.sum(sol.ys**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    point = jnp.array([1.0, 0.3]), jnp.array(1.3)
    expected = grad(*point, diffrax.diffeqsolve, diffrax.RecursiveCheckpointAdjoint())
    for solve in DOORS.values():
        for checkpoints in (2, "all"):
            ours = grad(*point, solve, nodegrad.ACAAdjoint(checkpoints))
            assert relative_error(ours, expected) < 1e-12


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "door, solver, adjoint",
    [
        ("native", diffrax.Tsit5(), nodegrad.ACAAdjoint),
        ("diffrax", nodegrad.ALF(), nodegrad.ReversibleAdjoint),
        ("diffrax", diffrax.Tsit5(), nodegrad.ACAAdjoint),
        ("native", nodegrad.ALF(), nodegrad.ReversibleAdjoint),
    ],
)
def test_steps_that_were_not_recorded_are_not_made_up(door, solver, adjoint):
    def loss(y0, room, throw=True):
        sol = DOORS[door](
            diffrax.ODETerm(lambda t, y, args: -y * jnp.roll(y, 1)),
            solver,
            0.0,
            1.0,
            0.01,
            y0,
            stepsize_controller=diffrax.PIDController(1e-4, 1e-4, dtmax=0.05),
            adjoint=adjoint(max_recorded_steps=room),
            throw=throw,
        )
        return jnp.sum(sol.ys), sol.stats["num_accepted_steps"]

    y0 = jnp.array([1.0, 2.0])
    value, steps = loss(y0, None)
    steps = int(steps)
    short, _ = loss(y0, steps - 1)
    assert short == value
    for derivative in (jax.grad, jax.jacfwd):
        at = lambda *args, d=derivative: d(loss, has_aux=True)(y0, *args)[0]
        expected, enough = at(None), at(steps)
        assert jnp.all(enough == expected)
        assert jnp.all(jnp.isfinite(expected))
        with pytest.raises(Exception, match="max_recorded_steps"):
            jax.block_until_ready(at(steps - 1))
        assert jnp.all(jnp.isnan(at(steps - 1, False)))
    batch = jax.vmap(lambda y0: loss(y0, steps, False)[0])
    both = jax.grad(lambda y0s: jnp.sum(batch(y0s)))(jnp.stack([y0, 10 * y0]))
    assert relative_error(both[0], jax.grad(loss, has_aux=True)(y0, None)[0]) < 1e-12
    assert jnp.all(jnp.isnan(both[1]))


def test_fixed_steps_are_recorded_without_end():
    # Their times are known, so there is nothing to write down.
    def loss(y0):
        adjoint = nodegrad.ACAAdjoint(max_recorded_steps=1)
        field = lambda t, y, args: -y
        sol = nodegrad.odesolve(
            field, diffrax.Euler(), 0.0, 1.0, 0.1, y0, adjoint=adjoint
        )
        return sol.ys[0]

    assert jnp.abs(jax.grad(loss)(1.0) - 0.9**10) < 1e-15


@pytest.mark.parametrize("adjoint", [nodegrad.ACAAdjoint, nodegrad.ReversibleAdjoint])
def test_room_for_recorded_steps_is_a_positive_integer(adjoint):
    with pytest.raises(ValueError, match="got 0"):
        adjoint(max_recorded_steps=0)
    with pytest.raises(TypeError, match="got 1.5"):
        adjoint(max_recorded_steps=1.5)


def test_a_failed_last_attempt_replaces_no_stored_state():
    # With 8 slots the stride doubles after 8 and after 16 steps. The attempt that fails
    # then would be the first one to be stored with the new stride.
    size = 2.0**-5

    def final(y0, num_steps, checkpoints):
        def field(t, y, args):
            curved = jnp.sin(3 * y) * y + jnp.cos(5 * t)
            return jnp.where(t > num_steps * size - 1e-9, jnp.nan, curved)

        sol = nodegrad.odesolve(
            field,
            diffrax.Euler(),
            0.0,
            4.0,
            size,
            y0,
            adjoint=nodegrad.ACAAdjoint(checkpoints),
            max_steps=128,
            throw=False,
        )
        return sol.ys[-1], sol.stats["num_accepted_steps"]

    grad = jax.jit(jax.grad(final, has_aux=True), static_argnums=2)
    for num_steps in (7, 8, 9, 15, 16, 17, 32):
        expected, taken = grad(1.0, num_steps, "all")
        assert taken == num_steps
        assert jnp.abs(grad(1.0, num_steps, 8)[0] - expected) < 1e-14
