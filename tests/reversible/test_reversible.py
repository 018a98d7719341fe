"""The reversible solvers themselves: accuracy, round trips, and coming apart."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import nodegrad
from nodegrad._reversible.reversals import make_invertible_step

from ..problems import explicit_step, Field, van_der_pol


RK_SOLVERS = [
    diffrax.Euler(),
    diffrax.Midpoint(),
    diffrax.Bosh3(),
    nodegrad.RK4(),
    diffrax.Tsit5(),
    diffrax.Dopri5(),
]
name_of = lambda solver: type(solver).__name__


def _round_trip(solver, field, y0, h, n):
    """The start of `n` steps, found from their end; and the kept state there."""
    term = diffrax.ODETerm(field)
    times = jnp.arange(n + 1, dtype=y0.dtype) * h
    invertible_step = make_invertible_step(solver, term, None)
    parts = invertible_step.parts()
    evaluate = lambda part, _, *args: parts[part](*args)

    def forward(carry, interval):
        y, state = carry
        y, _, _, state, _ = solver.step(term, *interval, y, None, state, False)
        return (y, state), None

    def backward(carry, interval):
        t0, t1, before = interval
        return invertible_step.backward(evaluate, t0, t1, before, *carry), None

    @jax.jit
    def there_and_back(y0):
        init = y0, solver.init(term, times[0], times[1], y0, None)
        (y1, state), _ = jax.lax.scan(forward, init, (times[:-1], times[1:]))
        before = jnp.concatenate([times[:1], times[:-2]])
        steps = times[:-1], times[1:], before
        end = y1, invertible_step.replay_state(state)
        start, _ = jax.lax.scan(backward, end, steps, reverse=True)
        return start

    return there_and_back(y0)


def _network(dtype=jnp.float64):
    field = Field(8, 32, jr.PRNGKey(0), dtype)
    return field, jr.normal(jr.PRNGKey(1), (8,), dtype)


@pytest.mark.parametrize("base", [diffrax.Midpoint(), nodegrad.RK4()], ids=name_of)
@pytest.mark.parametrize("coupling, tol", [(0.999, 1e-13), (0.99, 1e-11)])
def test_coupled_round_trip(base, coupling, tol):
    field, y0 = _network()
    solver = nodegrad.Reversible(base, coupling, resync_every=None)
    y, _ = _round_trip(solver, field, y0, 5e-3, 1000)
    assert float(jnp.max(jnp.abs(y - y0))) <= tol


def test_difference_form_loses_far_fewer_digits_than_the_published_form():
    field, y0 = _network(jnp.float32)
    coupling, n = 0.99, 1000
    h = jnp.float32(5e-3)
    y, _ = _round_trip(
        nodegrad.Reversible(diffrax.Midpoint(), coupling, resync_every=None),
        field,
        y0,
        h,
        n,
    )
    ours = float(jnp.max(jnp.abs(y - y0)))
    psi = lambda h, x: h * field(0, x + 0.5 * h * field(0, x, None), None)

    def forward(_, y__z):
        y, z = y__z
        y = coupling * y + (1 - coupling) * z + psi(h, z)
        return y, z - psi(-h, y)

    def backward(_, y__z):
        y, z = y__z
        z = z + psi(-h, y)
        return (y - z - psi(h, z)) / coupling + z, z

    loop = lambda body, init: jax.lax.fori_loop(0, n, body, init)
    y, _ = jax.jit(lambda y0: loop(backward, loop(forward, (y0, y0))))(y0)
    published = float(jnp.max(jnp.abs(y - y0)))
    assert ours <= 1e-3
    assert published >= 20 * ours


@pytest.mark.parametrize(
    "solver",
    [
        nodegrad.ALF(),
        nodegrad.ALF(damping=0.99),
        diffrax.ReversibleHeun(),
        diffrax.LeapfrogMidpoint(),
    ],
    ids=str,
)
def test_round_trip_of_the_other_solvers(solver):
    field, y0 = _network()
    y, _ = _round_trip(solver, field, y0, 5e-3, 200)
    assert float(jnp.max(jnp.abs(y - y0))) <= 1e-13


def _slope(errors, sizes):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def _forced_pendulum(t, y, args):
    del args
    return jnp.stack([y[1], -jnp.sin(y[0])]) * (1 + 0.3 * jnp.sin(t))


def _riccati(t, y, args):
    del args
    return t - y**2


# The second, where the first is too kind to a method for its order to show.
_PENDULUM = _forced_pendulum, 3.0, jnp.array([1.0, 0.0])
_RICCATI = _riccati, 2.0, jnp.array(0.5)


def _order(solver, problem, counts):
    """The order seen between steps of `t1 / n`, for `n` in `counts`."""
    field, t1, y0 = problem
    exact = nodegrad.odesolve(
        field,
        diffrax.Dopri8(),
        0.0,
        t1,
        None,
        y0,
        stepsize_controller=diffrax.PIDController(rtol=1e-13, atol=1e-13),
    ).ys[0]

    @jax.jit
    def error(h):
        sol = nodegrad.odesolve(field, solver, 0.0, t1, h, y0)
        return jnp.linalg.norm(sol.ys[0] - exact)

    sizes = [t1 / n for n in counts]
    return _slope([error(h) for h in sizes], sizes)


@pytest.mark.parametrize(
    "base, problem, counts",
    [
        (diffrax.Euler(), _PENDULUM, (20, 40, 80)),
        (diffrax.Midpoint(), _PENDULUM, (20, 40, 80)),
        (diffrax.Bosh3(), _PENDULUM, (20, 40, 80)),
        (nodegrad.RK4(), _PENDULUM, (20, 40, 80)),
        (diffrax.Dopri5(), _RICCATI, (40, 80, 160)),
        (diffrax.Tsit5(), _RICCATI, (40, 80, 160)),
    ],
    ids=lambda x: name_of(x) if isinstance(x, diffrax.AbstractSolver) else "",
)
def test_coupled_solution_has_the_order_of_the_base_solver(base, problem, counts):
    solver = nodegrad.Reversible(base, resync_every=None)
    assert abs(_order(solver, problem, counts) - base.order(None)) < 0.15


@pytest.mark.parametrize("base", [nodegrad.RK4(), diffrax.Tsit5()], ids=name_of)
def test_dense_output_is_of_fourth_order(base):
    field, t1, y0 = _RICCATI
    ts = jnp.linspace(0.013, 1.987, 50)
    tight = diffrax.PIDController(rtol=1e-12, atol=1e-12)

    def solve(solver, h, **kwargs):
        saveat = diffrax.SaveAt(ts=ts)
        return nodegrad.odesolve(
            field, solver, 0.0, t1, h, y0, saveat=saveat, **kwargs
        ).ys

    # With steps too small for the error of interpolation to count.
    exact = solve(
        diffrax.Dopri8(),
        None,
        stepsize_controller=diffrax.ClipStepSizeController(tight, step_ts=ts),
    )
    error = jax.jit(
        lambda h: jnp.max(
            jnp.abs(solve(nodegrad.Reversible(base, resync_every=None), h) - exact)
        )
    )
    sizes = [2 / 20, 2 / 40, 2 / 80]
    assert _slope([error(h) for h in sizes], sizes) >= 3.8


@pytest.mark.parametrize("damping, order", [(1.0, 2), (0.9, 1)])
def test_order_of_leapfrog(damping, order):
    slope = _order(nodegrad.ALF(damping=damping), _PENDULUM, (100, 200, 400))
    assert abs(slope - order) < 0.15


# Problems that decay.


def _follow_cosine(rate):
    return lambda t, y, args: rate * (y - jnp.cos(t)) - jnp.sin(t)


def _solve_decaying(solver, rate, t1=20.0, **kwargs):
    return nodegrad.odesolve(
        _follow_cosine(rate),
        solver,
        0.0,
        t1,
        0.02,
        jnp.array(1.0),
        saveat=diffrax.SaveAt(steps=True),
        max_steps=1000,
        throw=False,
        **kwargs,
    )


def _error(sol):
    return float(
        jnp.nanmax(jnp.abs(jnp.where(jnp.isinf(sol.ts), 0, sol.ys - jnp.cos(sol.ts))))
    )


@pytest.mark.parametrize("rate", [-1.0, -5.0])
@pytest.mark.parametrize("base", [diffrax.Midpoint(), nodegrad.RK4()], ids=name_of)
def test_restarts_keep_a_decaying_problem_stable(base, rate):
    plain = _solve_decaying(base, rate)
    resynced = _solve_decaying(nodegrad.Reversible(base, resync_every=10), rate)
    assert resynced.result == nodegrad.RESULTS.successful
    assert _error(resynced) < 2 * _error(plain)
    coupled = _solve_decaying(nodegrad.Reversible(base, resync_every=None), rate)
    assert coupled.result == nodegrad.RESULTS.coupling_lost
    # It is noticed long before anything is garbage.
    assert _error(coupled) < 1e-2
    assert float(coupled.stats["time_reached"]) < 20


def test_restarted_leapfrog_is_stable_and_of_second_order():
    errors = []
    for n in (400, 800):
        sol = nodegrad.odesolve(
            _follow_cosine(-5.0),
            nodegrad.ALF(resync_every=10),
            0.0,
            8.0,
            8.0 / n,
            jnp.array(1.0),
        )
        errors.append(abs(float(sol.ys[0] - jnp.cos(8.0))))
    assert errors[0] < 1e-3
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.15
    apart = _solve_decaying(nodegrad.ALF(), -5.0, t1=8.0)
    assert apart.result == nodegrad.RESULTS.coupling_lost
    assert _error(apart) < 1.0


def _lorenz(t, y, args):
    del t, args
    return jnp.stack(
        [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]
    )


_SPIRAL = lambda t, y, args: van_der_pol(t, y, 5.0), jnp.array([2.0, 0.0])
_CHAOS = _lorenz, jnp.array([1.0, 1.0, 20.0])
_DECAY = lambda t, y, args: -4 * y, jnp.ones(1)


@pytest.mark.rows(test=0, ci=4)
@pytest.mark.parametrize(
    "problem, n, coupling",
    [
        (_DECAY, 2000, 0.9),
        (_DECAY, 2000, 0.999),
        (_CHAOS, 200, 0.9),
        (_CHAOS, 2000, 0.9),
        (_CHAOS, 2000, 0.999),
        (_SPIRAL, 200, 0.99),
        (_SPIRAL, 2000, 0.9),
        (_SPIRAL, 2000, 0.99),
    ],
    ids=[
        *("decay-0.9", "decay-0.999"),
        *("Lorenz-200-0.9", "Lorenz-0.9", "Lorenz-0.999"),
        *("van der Pol-200-0.99", "van der Pol-0.9", "van der Pol-0.99"),
    ],
)
def test_never_returns_garbage_without_saying_so(problem, n, coupling):
    # Forwards and backwards: the gradient is right, or an error, or a NaN.
    (field, y0), t1 = problem, 5.0

    def grad(solver, adjoint):
        def loss(y0):
            sol = nodegrad.odesolve(
                field, solver, 0.0, t1, t1 / n, y0, adjoint=adjoint, throw=False
            )
            return jnp.sum(sol.ys[-1]), sol.result != nodegrad.RESULTS.successful

        (value, failed), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(y0)
        return value, bool(failed), gradient

    scale = float(jnp.max(jnp.abs(y0)))
    truth, plain_failed, _ = grad(diffrax.Bosh3(), nodegrad.ACAAdjoint())
    for resync_every in (None, 10):
        solver = nodegrad.Reversible(diffrax.Bosh3(), coupling, resync_every)
        value, failed, gradient = grad(solver, nodegrad.ReversibleAdjoint())
        if failed:
            # With resyncs only where the plain solver fares no better.
            assert resync_every is None or plain_failed or n == 200
            continue
        if n == 2000:
            assert abs(value - truth) < 0.02 * scale
        if not bool(jnp.all(jnp.isnan(gradient))):
            _, _, exact = grad(solver, nodegrad.ACAAdjoint())
            assert float(jnp.max(jnp.abs(gradient - exact))) < 1e-3 * float(
                jnp.max(jnp.abs(exact)) + 1e-6
            )
        else:
            # With resyncs, only where the steps are too large for the problem.
            assert resync_every is None or coupling == 0.9 or n == 200


def _controlled(t, y, args):
    return jnp.stack([-5 * y, 5 * jnp.cos(t) - jnp.sin(t) + 0 * y], axis=-1)


@pytest.mark.parametrize(
    "terms, y0, h",
    [
        # One component is a millionth of the other.
        (
            lambda t, y, args: jnp.stack([0 * y[0], -20 * (y[1] - jnp.cos(t))]),
            jnp.array([1e6, 0.5]),
            0.002,
        ),
        # Far smaller at the end than at the start.
        (lambda t, y, args: -3 * y + 3e-3 * jnp.cos(t), jnp.ones(1), 0.01),
        # Several terms; a path; noise.
        (
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: -5 * y),
                diffrax.ODETerm(lambda t, y, args: 5 * jnp.cos(t) + 0 * y),
            ),
            jnp.ones(1),
            0.01,
        ),
        (
            diffrax.ControlTerm(
                _controlled,
                diffrax.LinearInterpolation(
                    jnp.linspace(0.0, 3.0, 31),
                    jnp.linspace(0.0, 3.0, 31)[:, None] * jnp.ones((1, 2)),
                ),
            ),
            jnp.ones(1),
            0.01,
        ),
        (
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: -5 * y),
                diffrax.ControlTerm(
                    lambda t, y, args: jnp.array([0.1]),
                    diffrax.VirtualBrownianTree(
                        0.0, 3.0, tol=1e-3, shape=(), key=jr.PRNGKey(0)
                    ),
                ),
            ),
            jnp.ones(1),
            0.01,
        ),
    ],
    ids=["badly scaled", "decayed", "two terms", "path", "noise"],
)
def test_garbage_is_reported_wherever_it_hides(terms, y0, h):
    sol = nodegrad.odesolve(
        terms,
        nodegrad.Reversible(diffrax.Heun(), resync_every=None),
        0.0,
        3.0,
        h,
        y0,
        throw=False,
    )
    assert sol.result == nodegrad.RESULTS.coupling_lost


@pytest.mark.parametrize("unit", [1e20, 1e-22])
def test_garbage_is_reported_in_any_unit(unit):
    number = jnp.float32
    sol = nodegrad.odesolve(
        lambda t, y, a: -5 * (y - a * jnp.cos(t)),
        nodegrad.Reversible(diffrax.Midpoint(), resync_every=None),
        number(0),
        number(8),
        number(0.02),
        number(unit) * jnp.ones(2, number),
        number(unit),
        throw=False,
    )
    assert sol.result == nodegrad.RESULTS.coupling_lost
    assert float(jnp.max(jnp.abs(sol.ys))) < 2 * unit


@pytest.mark.parametrize(
    "field, y0",
    [
        (lambda t, y, args: jnp.stack([y[1], -y[0]]), jnp.array([1.0, 0.0])),
        (lambda t, y, args: 0.5 * y, jnp.array([1.0])),
        (lambda t, y, args: jnp.stack([jnp.cos(t), 0 * t]), jnp.zeros(2)),
    ],
    ids=["rotation", "growth", "quadrature from rest"],
)
@pytest.mark.parametrize("base", RK_SOLVERS[:4], ids=name_of)
def test_a_sound_solution_is_not_reported(field, y0, base):
    sol = nodegrad.odesolve(
        field,
        nodegrad.Reversible(base, resync_every=None),
        0.0,
        10.0,
        0.05,
        y0,
        throw=False,
    )
    assert sol.result == nodegrad.RESULTS.successful
    scale = max(1.0, float(jnp.max(jnp.abs(sol.ys))))
    assert float(sol.stats["coupling_distance"]) < 0.1 * scale


def _stiffening(t, u, args):
    met = t * u[0] * u[1]
    return jnp.stack([1.5 * u[0] - met, met - 3 * u[1]])


def _end(field, solver, u0, t1, tol):
    return nodegrad.odesolve(
        field,
        solver,
        0.0,
        t1,
        None,
        u0,
        stepsize_controller=diffrax.PIDController(tol, tol),
        max_steps=20_000,
        throw=False,
    )


@pytest.mark.rows(test=2, ci=4)
@pytest.mark.parametrize("tol", [1e-9, 1e-6])
@pytest.mark.parametrize(
    "base, kwargs, allowed",
    [
        (diffrax.Tsit5(), {}, 10),
        (diffrax.Tsit5(), dict(resync_every=None), 10),
        (diffrax.Bosh3(), dict(resync_every=None), 10),
        (diffrax.Dopri5(), dict(resync_every=10), 30),
        # It adds a tenth of the difference of the copies to the solution at every step.
        (diffrax.Tsit5(), dict(coupling_parameter=0.9, resync_every=None), 100),
    ],
    ids=str,
)
def test_adaptive_solves_are_right_or_lost(base, kwargs, allowed, tol):
    # Errors in tolerances, at the end of a solve on which the coupling is unstable.
    u0, t1 = jnp.ones(2), 10.0
    truth = _end(_stiffening, diffrax.Dopri8(), u0, t1, 1e-12).ys
    error = lambda sol: float(jnp.max(jnp.abs(sol.ys - truth) / (1 + truth))) / tol
    plain = _end(_stiffening, base, u0, t1, tol)
    sol = _end(_stiffening, nodegrad.Reversible(base, **kwargs), u0, t1, tol)
    if sol.result == nodegrad.RESULTS.successful:
        assert error(sol) < error(plain) + allowed
        assert sol.stats["num_steps"] < 10 * plain.stats["num_steps"]
    else:
        assert kwargs == dict(resync_every=None)
        assert sol.result == nodegrad.RESULTS.coupling_lost


def _backward_sine(max_steps, y0):
    """The sine problem of torchdiffeq, backwards in time, in single precision."""
    number = jnp.float32
    return nodegrad.odesolve(
        lambda t, y, args: 2 * y / t + t**4 * jnp.sin(2 * t) - t**2 + 4 * t**3,
        nodegrad.Reversible(diffrax.Tsit5(), resync_every=None),
        number(8.0),
        number(1.0),
        None,
        y0,
        stepsize_controller=diffrax.PIDController(1e-6, 1e-6),
        max_steps=max_steps,
        throw=False,
    )


def test_adaptive_single_precision_does_not_end_with_copies_apart():
    sol = _backward_sine(4096, jnp.float32(1000.0))
    if sol.result == nodegrad.RESULTS.successful:
        # y = (1000 / 64 - g(8) + g(t)) t^2, with g' = t^2 sin(2t) - 1 + 4t.
        g = lambda t: (
            2 * t**2 - t + 0.5 * t * np.sin(2 * t) + (0.25 - 0.5 * t**2) * np.cos(2 * t)
        )
        assert abs(float(sol.ys[0]) - (1000 / 64 - g(8.0) + g(1.0))) < 1e-2
    else:
        assert sol.result == nodegrad.RESULTS.coupling_lost


def test_a_solve_that_ends_at_max_steps_names_the_cause():
    # Van der Pol's equation needs hundreds of steps with any solver. The decay needs
    # less than a hundred where no coupling limits the steps.
    def van_der_pol(t, y, args):
        return jnp.stack([y[1], 3 * (1 - y[0] ** 2) * y[1] - y[0]])

    def result(field, y0, **options):
        return nodegrad.odesolve(
            field,
            nodegrad.Reversible(diffrax.Tsit5(), **options),
            0.0,
            20.0,
            None,
            y0,
            stepsize_controller=diffrax.PIDController(1e-7, 1e-7),
            max_steps=50,
            throw=False,
        ).result

    few = nodegrad.RESULTS.max_steps_reached
    assert result(van_der_pol, jnp.array([2.0, 0.0])) == few
    lost = result(lambda t, y, args: -y, jnp.array(1.0), resync_every=None)
    assert lost == nodegrad.RESULTS.coupling_lost


@pytest.mark.slow
def test_a_decayed_state_ends_at_max_steps_because_of_the_coupling():
    # The state has decayed to an eighth of its largest value, or less. Its difference
    # is ten tolerances, but hardly ten units of rounding of the largest state. Rounding
    # decides how a single solve ends, so there are 25: most are lost, and half of these
    # would blame `max_steps` if rounding were that of the largest state.
    y0s = jnp.linspace(700.0, 1300.0, 25).astype(jnp.float32)
    sol = jax.jit(jax.vmap(lambda y0: _backward_sine(3000, y0)))(y0s)
    assert not jnp.any(sol.result == nodegrad.RESULTS.max_steps_reached)
    assert jnp.sum(sol.result == nodegrad.RESULTS.coupling_lost) > 12


def test_message_says_when_how_far_and_what_to_do():
    with pytest.raises(RuntimeError) as error:
        nodegrad.odesolve(
            _follow_cosine(-5.0),
            nodegrad.Reversible(nodegrad.RK4(), resync_every=None),
            0.0,
            20.0,
            0.02,
            jnp.array(1.0),
        )
    for words in ("resync_every", "reached t = ", "come apart", "apart by"):
        assert words in str(error.value)


def test_diffrax_reports_a_lost_coupling():
    for adjoint, result in (
        (nodegrad.ReversibleAdjoint(), nodegrad.RESULTS.coupling_lost),
        (nodegrad.ACAAdjoint(), nodegrad.RESULTS.coupling_lost),
        (diffrax.DirectAdjoint(), diffrax.RESULTS.nonlinear_divergence),
    ):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_follow_cosine(-5.0)),
            nodegrad.Reversible(nodegrad.RK4(), resync_every=None),
            0.0,
            20.0,
            0.02,
            jnp.array(1.0),
            adjoint=adjoint,
            throw=False,
        )
        assert sol.result == result


def test_refuses_what_it_cannot_couple():
    with pytest.raises(TypeError, match="explicit Runge-Kutta"):
        nodegrad.Reversible(diffrax.Kvaerno3())
    with pytest.raises(TypeError, match="explicit Runge-Kutta"):
        nodegrad.Reversible(diffrax.HalfSolver(diffrax.Heun()))
    for coupling in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="coupling_parameter"):
            nodegrad.Reversible(diffrax.Heun(), coupling, resync_every=None)
    with pytest.raises(
        TypeError,
        match="`resync_every` must be a positive Python integer or 'auto' or None",
    ):
        nodegrad.Reversible(diffrax.Heun(), resync_every=2.0)
    with pytest.raises(ValueError, match="`resync_every` must be a positive"):
        nodegrad.ALF(resync_every=0)
    with pytest.raises(ValueError, match="damping"):
        nodegrad.ALF(damping=0.5)


@pytest.mark.slow
def test_error_estimate_is_that_of_the_base_solver():
    field, y0 = _network()
    term, h = diffrax.ODETerm(field), 0.1
    # The estimates are far larger than the rounding errors allowed.
    for base, least in (
        (diffrax.Tsit5(), 1e-9),
        (diffrax.Heun(), 1e-3),
        (diffrax.Midpoint(), 1e-3),
    ):
        solver = nodegrad.Reversible(base, resync_every=None)
        state = solver.init(term, 0.0, h, y0, None)
        _, error, _, state, _ = solver.step(term, 0.0, h, y0, None, state, False)
        # The difference is zero before the step, so all of it has grown in the step.
        error = jnp.sign(error) * (jnp.abs(error) - jnp.abs(state.difference))
        state = base.init(term, 0.0, h, y0, None)
        _, expected, *_ = base.step(term, 0.0, h, y0, None, state, False)
        assert float(jnp.max(jnp.abs(error - expected))) < 1e-16
        assert float(jnp.max(jnp.abs(expected))) > least


def test_first_step_is_that_of_the_base_solver():
    # With both copies equal y' = z + Psi(z).
    field, y0 = _network()
    sol = nodegrad.odesolve(
        field,
        nodegrad.Reversible(diffrax.Bosh3(), resync_every=None),
        0.0,
        0.1,
        0.1,
        y0,
    )
    expected = explicit_step(diffrax.Bosh3.tableau, field, 0.0, 0.1, y0, None)
    assert float(jnp.max(jnp.abs(sol.ys[0] - expected))) < 1e-15
