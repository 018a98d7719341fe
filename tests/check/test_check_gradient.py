"""The verdicts of `check_gradient` on gradients that are known to be right or wrong."""

import json

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import nodegrad
from nodegrad._check.finite_differences import _estimate, _is_smooth, step_sizes

from ..problems import relative_error


PID = diffrax.PIDController(1e-6, 1e-6)
CONSTANT = diffrax.ConstantStepSize()


def check(loss, params, *args, solve=nodegrad.odesolve, **kwargs):
    kwargs = dict(adjoints=(), repeats=0) | kwargs
    return nodegrad.check_gradient(loss, params, *args, solve=solve, **kwargs)


def make_loss(field, y0, solver=None, t1=1.0, dt0=None, controller=PID, **kwargs):
    """The sum of the final state; `y0` is an array, or a function of the parameters."""
    solver = diffrax.Tsit5() if solver is None else solver

    def loss(p, solve):
        start = y0(p) if callable(y0) else y0
        terms = diffrax.ODETerm(field)
        problem = terms, solver, 0.0, t1, dt0, start, p
        return jnp.sum(solve(*problem, stepsize_controller=controller, **kwargs).ys)

    return loss


def pendulum(t, y, p):
    return p * jnp.stack([y[1], -jnp.sin(y[0])])


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


# A tenth too large.
sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (1.1 * ct * jnp.cos(x),))

Y0 = jnp.array([1.0, 0.2])


# Gradients that are right.


@pytest.mark.exhaustive
def test_a_right_gradient_is_called_right_in_all_its_parts():
    # Times depend on the parameters too, and steps are clipped to some of them.
    def loss(p, solve):
        clipped = diffrax.ClipStepSizeController(
            diffrax.PIDController(1e-7, 1e-7),
            step_ts=p["step"][None],
            jump_ts=p["jump"][None],
        )
        sol = solve(
            diffrax.ODETerm(lambda t, y, a: jnp.where(t < p["jump"], -y, a * y)),
            diffrax.Tsit5(),
            p["t0"],
            p["t1"],
            p["dt0"],
            Y0,
            p["a"],
            stepsize_controller=clipped,
        )
        return jnp.sum(sol.ys**2)

    values = dict(a=0.5, dt0=0.05, jump=1.2, step=0.7, t0=0.1, t1=1.9)
    params = {name: jnp.array(x) for name, x in values.items()}
    found = check(loss, params, num_directions=6)
    assert found.verdict == "right" and found.ok
    # y decays up to the jump, and then grows with the rate a.
    expected = lambda p: jnp.sum(
        (Y0 * jnp.exp(p["t0"] - p["jump"] + p["a"] * (p["t1"] - p["jump"]))) ** 2
    )
    assert abs(found.value / expected(params) - 1) < 1e-4
    names = "a", "jump", "t0", "t1"
    exact = jax.grad(expected)(params)
    for name in names:
        assert jnp.allclose(found.gradient[name], exact[name], rtol=1e-3)
    checks = found.checks
    assert checks["adjoint"].error < 1e-9
    assert checks["solve"].error < 1e-3
    assert checks["finite_differences"].error < 1e-7
    # Each direction moves one of the parameters.
    assert sorted(d["leaves"] for d in checks["finite_differences"].details) == [
        (f"['{name}']",) for name in sorted(params)
    ]
    assert checks["reconstruction"].verdict == "skipped"
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == "right"
    assert str(found).startswith("right: ")


@pytest.mark.exhaustive
@pytest.mark.parametrize("door", ["native", "diffrax", "batched"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_batch_of_networks_with_other_leaves(door, dtype):
    # `jax.vmap` inside of the loss: every sample has its own accepted steps.
    model = eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=jr.PRNGKey(0))
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    model = jax.tree.map(cast, model)
    ys = jr.normal(jr.PRNGKey(1), (3, 2), dtype) * jnp.array(
        [[0.1], [1.0], [4.0]], dtype
    )
    ts = jnp.linspace(0, 2, 4, dtype=dtype)

    def loss(model, ys, ts, scale, solve):
        def run(y, **kwargs):
            return solve(
                diffrax.ODETerm(lambda t, y, model: 6 * model(y)),
                diffrax.Tsit5(),
                ts[0],
                ts[-1],
                None,
                y,
                model,
                saveat=diffrax.SaveAt(ts=ts),
                stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
                **kwargs,
            ).ys

        out = run(ys, batched=True) if door == "batched" else jax.vmap(run)(ys)
        return jnp.mean(out**2) * scale

    solve = diffrax.diffeqsolve if door == "diffrax" else nodegrad.odesolve
    found = check(loss, model, ys, ts, 2.0, solve=solve, num_directions=2)
    assert found.verdict == "right"
    assert found.num_solves == 3
    assert found.accepted_steps[0] < found.accepted_steps[1]
    is_double = dtype == jnp.float64
    # Rounding changes the sizes of steps, and in float32 so the gradient by some 1e-4.
    assert found.checks["adjoint"].error < (1e-8 if is_double else 3e-4)
    assert found.checks["finite_differences"].error < (1e-7 if is_double else 1e-2)


@pytest.mark.exhaustive
def test_a_stochastic_equation_with_a_reversible_solver():
    key = jr.PRNGKey(3)
    path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(), key=key)

    def loss(a, solve):
        noise = diffrax.ControlTerm(lambda t, y, a: 0.1 + 0.2 * a * jnp.sin(y), path)
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, a: -a * y), noise)
        sol = solve(
            terms,
            diffrax.ReversibleHeun(),
            0.0,
            1.0,
            0.02,
            Y0,
            a,
            adjoint=nodegrad.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys**2)

    found = check(loss, jnp.array(0.7), solve=diffrax.diffeqsolve)
    assert found.verdict == "right"
    assert found.checks["solve"].verdict == "information"
    assert found.checks["finite_differences"].error < 1e-8
    assert found.checks["reconstruction"].error < 1e-12


@pytest.mark.exhaustive
def test_every_adjoint_is_measured_and_one_is_recommended():
    solver = nodegrad.Reversible(diffrax.Bosh3(), resync_every=10)
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    loss = make_loss(pendulum, Y0, solver, adjoint=adjoint, max_steps=64)
    found = check(
        loss,
        jnp.array(1.3),
        solve=diffrax.diffeqsolve,
        adjoints=(
            nodegrad.ACAAdjoint(),
            nodegrad.ReversibleAdjoint(),
            diffrax.BacksolveAdjoint(),
            diffrax.ImplicitAdjoint(),
        ),
        repeats=3,
    )
    assert found.verdict == "right"
    rows = {row.name: row for row in found.adjoints}
    mine = rows["diffrax.RecursiveCheckpointAdjoint()"]
    assert mine.is_yours and mine.error < 1e-10
    names = ["nodegrad.ACAAdjoint()", "nodegrad.ReversibleAdjoint()"]
    assert all(rows[name].error < 1e-10 for name in names)
    assert not any(rows[name].is_yours for name in names)
    measured = [mine, *(rows[name] for name in names)]
    assert all(row.seconds > 0 and row.temp_bytes > 0 for row in measured)
    approximate = rows["diffrax.BacksolveAdjoint()"]
    assert not approximate.is_exact and 1e-12 < approximate.error < 1e-2
    # It is for steady states, which this solve does not reach.
    implicit = rows["diffrax.ImplicitAdjoint()"]
    assert implicit.error is None or implicit.error > 0.1
    # The fastest, or one that takes hardly longer and less memory.
    best = rows[found.recommended]
    assert best in measured
    assert best.seconds <= 1.1 * min(row.seconds for row in measured)
    assert found.checks["reconstruction"].details[0]["coupling_distance"] < 1e-4
    assert found.recommended in str(found)


# Gradients that are wrong.


def test_a_wrong_derivative_rule_is_found():
    field = lambda t, y, p: -p * sine(y)
    found = check(make_loss(field, Y0), jnp.array(0.7))
    assert found.verdict == "differences_disagree" and not found.ok
    # All adjoints apply the wrong rule, so they agree.
    assert found.checks["adjoint"].verdict == "passed"
    # The error is the one that the right rule shows.
    right = make_loss(lambda t, y, p: -p * jnp.sin(y), Y0)
    exact = jax.grad(lambda p: right(p, nodegrad.odesolve))(jnp.array(0.7))
    error = abs(found.gradient - exact) / max(abs(exact), abs(found.gradient))
    assert jnp.allclose(found.checks["finite_differences"].error, error, rtol=1e-6)


@pytest.mark.slow
def test_errors_of_two_entries_of_an_array_do_not_cancel():
    # Equal errors of two equal entries: a sum with signs alone may miss them.
    field = lambda t, y, p: -p[0] * y + jnp.sum(sine(p[1:]))
    found = check(make_loss(field, Y0), jnp.array([0.7, 0.3, 0.3]))
    assert found.verdict == "differences_disagree"
    assert len(found.checks["finite_differences"].details) == 4


@pytest.mark.slow
def test_entries_of_an_array_may_differ_by_orders_of_magnitude():
    field = lambda t, y, p: -p[0] * 1e4 * y + p[1] * 1e-4
    assert check(make_loss(field, Y0), jnp.array([1e-4, 1e4])).verdict == "right"


@pytest.mark.exhaustive
def test_a_gradient_that_is_stopped_is_found():
    loss = make_loss(pendulum, Y0)
    stopped = lambda p, solve: loss(jax.lax.stop_gradient(p), solve) + 0 * p
    found = check(stopped, jnp.array(1.0))
    assert found.verdict == "differences_disagree"
    assert found.gradient == 0


@pytest.mark.exhaustive
def test_an_approximate_adjoint_is_found():
    loose = diffrax.BacksolveAdjoint(
        stepsize_controller=diffrax.PIDController(0.1, 0.1)
    )
    p, solve = jnp.array(1.0), diffrax.diffeqsolve
    found = check(make_loss(pendulum, Y0, t1=6.0, adjoint=loose), p, solve=solve)
    assert found.verdict == "adjoint_differs"
    assert found.checks["finite_differences"].verdict == "passed"
    exact = make_loss(pendulum, Y0, t1=6.0, adjoint=diffrax.DirectAdjoint())
    expected = relative_error(found.gradient, jax.grad(exact)(p, solve))
    assert jnp.allclose(found.checks["adjoint"].error, expected, rtol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("adapts", [True, False])
def test_an_inaccurate_solve_is_found(adapts):
    if adapts:
        setting = dict(controller=diffrax.PIDController(0.3, 0.3))
    else:
        setting = dict(solver=diffrax.Heun(), controller=CONSTANT, dt0=0.4)
    loss = make_loss(pendulum, Y0, t1=4.0, **setting)
    found = check(loss, jnp.array(1.5))
    assert found.verdict == "solve_too_loose"
    assert found.checks["adjoint"].error < 1e-10
    assert found.checks["finite_differences"].error < 1e-6
    # Against a solve of high accuracy.
    finest = make_loss(
        pendulum, Y0, t1=4.0, controller=diffrax.PIDController(1e-9, 1e-9)
    )
    exact = jax.grad(finest)(jnp.array(1.5), nodegrad.odesolve)
    error = abs(found.gradient - exact) / abs(exact)
    assert jnp.allclose(found.checks["solve"].error, error, rtol=0.5)
    assert error > 0.01


@pytest.mark.slow
def test_a_lost_reconstruction_is_found():
    loss = make_loss(
        lambda t, y, p: -p * y,
        Y0,
        diffrax.ReversibleHeun(),
        t1=10.0,
        dt0=0.02,
        controller=CONSTANT,
        adjoint=nodegrad.ReversibleAdjoint(),
    )
    found = check(loss, jnp.array(5.0))
    assert found.verdict == "reconstruction_lost"
    assert found.gradient is None
    assert found.checks["reconstruction"].error > 1
    assert "resync_every" in str(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["jump, steps adapt", "jump, constant steps", "kink"])
def test_a_loss_that_is_not_smooth_is_found(kind):
    if kind == "kink":
        # The gradient at zero is zero, the slope to the right is not.
        field = lambda t, y, p: jax.nn.relu(p) - y
        found = check(make_loss(field, Y0), jnp.array(0.0))
    else:
        # The gradient of each step is 1, but y(1) = 3 y0 + constant.
        field = lambda t, y, p: jnp.where(y < 1.0, 1.0, 3.0)
        setting = dict(controller=CONSTANT, dt0=0.01) if "constant" in kind else {}
        loss = make_loss(field, lambda p: p[None], **setting)
        found = check(loss, jnp.array(0.513))
        assert jnp.allclose(found.gradient, 1.0)
    assert found.verdict == "not_smooth"
    assert found.checks["adjoint"].verdict == "passed"


@pytest.mark.exhaustive
def test_a_chaotic_problem_is_not_blamed_on_a_rule():
    def lorenz(t, y, p):
        u, v, w = y
        return jnp.stack([10 * (v - u), u * (p - w) - v, u * v - 8 / 3 * w])

    found = check(make_loss(lorenz, jnp.ones(3), t1=25.0), jnp.array(28.0))
    assert found.verdict == "solve_too_loose"
    assert found.checks["finite_differences"].verdict == "undecided"
    assert "chaotic" in str(found)


@pytest.mark.exhaustive
def test_an_event_is_no_failure():
    # y = exp(-a t) is a half at t = log(2) / a.
    def loss(a, solve):
        event = diffrax.Event(lambda t, y, args, **kw: y - 0.5, optx.Newton(1e-9, 1e-9))
        term = diffrax.ODETerm(lambda t, y, a: -a * y)
        problem = term, diffrax.Tsit5(), 0.0, 9.0, None, jnp.array(1.0), a
        return solve(*problem, stepsize_controller=PID, event=event).ts[-1]

    found = check(loss, jnp.array(0.7), solve=diffrax.diffeqsolve)
    assert found.verdict == "right"
    assert jnp.allclose(found.gradient, -jnp.log(2.0) / 0.7**2, rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("door", [nodegrad.odesolve, diffrax.diffeqsolve])
def test_a_failed_solve_is_a_verdict(door):
    loss = make_loss(lambda t, y, p: y**2, lambda p: p[None], t1=2.0)
    found = check(loss, jnp.array(1.0), solve=door)
    assert found.verdict == "solve_failed"


# Misuse.


def test_misuse_is_refused_by_name():
    loss = make_loss(pendulum, Y0)
    p = jnp.array(1.0)
    with pytest.raises(TypeError, match="must have an argument `solve`"):
        nodegrad.check_gradient(lambda p: p, p)
    with pytest.raises(ValueError, match="never called its argument `solve`"):
        nodegrad.check_gradient(lambda p, solve: p, p)
    with pytest.raises(ValueError, match="must return one real number"):
        nodegrad.check_gradient(lambda p, solve: loss(p, solve) * jnp.ones(2), p)
    with pytest.raises(ValueError, match="there is none"):
        nodegrad.check_gradient(loss, jnp.array(1))
    with pytest.raises(ValueError, match="takes `diffrax.diffeqsolve` or"):
        nodegrad.check_gradient(loss, p, solve=jnp.sin)
    with pytest.raises(ValueError, match="between 0 and 1"):
        nodegrad.check_gradient(loss, p, tolerance=2.0)
    with pytest.raises(ValueError, match="`num_directions` must be a positive"):
        nodegrad.check_gradient(loss, p, num_directions=0)
    with pytest.raises(TypeError, match="outside of `jax.jit`"):
        jax.jit(lambda p: nodegrad.check_gradient(loss, p).value)(p)
    with pytest.raises(TypeError, match="no argument `event`"):
        wrong = make_loss(pendulum, Y0, event=None)
        nodegrad.check_gradient(wrong, p, solve=nodegrad.odesolve)


# Estimates from differences, of functions with known derivatives.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_estimates_are_as_accurate_as_they_say(dtype):
    eps = float(jnp.finfo(dtype).eps)
    h = step_sizes(eps)
    for i in range(50):
        a, b = jr.uniform(jr.PRNGKey(i), (2,), jnp.float64, -3.0, 3.0).tolist()
        fn = lambda x: jnp.exp(a * x) + jnp.sin(b * x + 1)  # noqa: B023
        hs = jnp.concatenate([jnp.zeros(1), h, -h])
        # Noise of one unit of rounding.
        noise = eps * jr.uniform(jr.PRNGKey(100 + i), hs.shape, jnp.float64, -1.0, 1.0)
        values = jax.device_get(fn(hs) * (1 + noise))
        _, estimate = _estimate(h, values, eps)
        exact = float(jax.grad(fn)(0.0))
        assert abs(estimate.value - exact) <= estimate.uncertainty
        assert estimate.uncertainty < (1e-7 if dtype == jnp.float64 else 1e-2)
        assert _is_smooth(h, values, estimate, eps, 1e-2 * max(abs(exact), 0.1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_functions_that_are_not_smooth_are_told_apart(dtype):
    eps = float(jnp.finfo(dtype).eps)
    h = step_sizes(eps)
    hs = np.concatenate([[0.0], h, -h])
    noise = 1 + eps * np.random.default_rng(0).uniform(-1, 1, len(hs))

    def is_smooth(fn):
        values = fn(hs) * noise
        _, estimate = _estimate(h, values, eps)
        return _is_smooth(h, values, estimate, eps, 1e-2)

    # A kink at zero; jumps away from zero; steps of a stair.
    assert not is_smooth(lambda x: 1 + np.maximum(x, 0))
    assert not is_smooth(lambda x: 1 + x + 0.1 * (x > h[-3]))
    assert not is_smooth(lambda x: 1 + x + 2 * h[-3] * np.round(x / h[-3]))
    assert is_smooth(lambda x: np.exp(3 * x) * np.cos(x))
    assert is_smooth(lambda x: 1 + x**2)
    assert is_smooth(lambda x: 1 + 0 * x)
