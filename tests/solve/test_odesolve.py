"""The native door: values, batches, failures, and what it refuses."""

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad
from nodegrad._reverse.plan import nearly

from ..problems import Field, forced_pair, PAIR_ARGS, PAIR_Y0, relative_error


PID = diffrax.PIDController(1e-6, 1e-8)
TS = jnp.array([0.0, 0.01, 0.3, 0.9, 1.5])


def _both(solver, t0, t1, dt0, saveat, controller, **kwargs):
    def run(solve, adjoint):
        return solve(
            diffrax.ODETerm(forced_pair),
            solver,
            t0,
            t1,
            dt0,
            PAIR_Y0,
            PAIR_ARGS,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            **kwargs,
        )

    ours = run(nodegrad.odesolve, nodegrad.ACAAdjoint())
    theirs = run(diffrax.diffeqsolve, diffrax.DirectAdjoint())
    return ours, theirs


def _assert_equal(ours, theirs, tol=1e-12):
    def close(x, y):
        # Rows nobody wrote hold infinity in both.
        return bool(jnp.allclose(x, y, rtol=tol, atol=tol / 10))

    assert jax.tree.all(jax.tree.map(close, ours.ts, theirs.ts))
    assert jax.tree.all(jax.tree.map(close, ours.ys, theirs.ys))
    for name in ("num_steps", "num_accepted_steps", "num_rejected_steps"):
        assert ours.stats[name] == theirs.stats[name]


@pytest.mark.rows(test=3, ci=6)
@pytest.mark.parametrize(
    "saveat",
    [
        diffrax.SaveAt(t1=True),
        diffrax.SaveAt(t0=True, ts=TS, steps=3, t1=True),
        diffrax.SaveAt(
            subs={
                "a": diffrax.SubSaveAt(steps=1, fn=lambda t, y, args: t * y["u"][0]),
                "b": [diffrax.SubSaveAt(t0=True, ts=TS)],
            }
        ),
    ],
    ids=["t1", "all", "subs"],
)
@pytest.mark.parametrize(
    ("solver", "dt0", "controller"),
    [
        (diffrax.Tsit5(), None, PID),
        (diffrax.Euler(), 0.01, diffrax.ConstantStepSize()),
        (
            diffrax.Bosh3(),
            0.3,
            diffrax.ClipStepSizeController(PID, step_ts=[0.5], jump_ts=[0.7]),
        ),
        (
            diffrax.Dopri8(),
            None,
            diffrax.StepTo(jnp.array([0.0, 0.2, 0.21, 0.9, 1.5])),
        ),
    ],
    ids=["pid", "constant", "clip", "step_to"],
)
def test_values_equal_those_of_diffeqsolve(saveat, solver, dt0, controller):
    ours, theirs = _both(solver, 0.0, 1.5, dt0, saveat, controller, max_steps=256)
    # The error estimate is a small difference of large numbers, so differently rounded
    # stages place adaptive steps a little differently; what is saved at given times
    # hardly notices.
    adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    saves_steps = not (
        isinstance(saveat.subs, diffrax.SubSaveAt) and not saveat.subs.steps
    )
    _assert_equal(ours, theirs, tol=1e-8 if adaptive and saves_steps else 1e-12)
    assert ours.result == diffrax.RESULTS.successful


@pytest.mark.slow
def test_values_equal_those_of_diffeqsolve_backwards_in_time():
    saveat = diffrax.SaveAt(t0=True, ts=TS[::-1], steps=2, t1=True)
    ours, theirs = _both(diffrax.Tsit5(), 1.5, 0.0, None, saveat, PID, max_steps=64)
    _assert_equal(ours, theirs, tol=1e-8)
    saveat = diffrax.SaveAt(ts=TS[::-1], t1=True)
    _assert_equal(*_both(diffrax.Tsit5(), 1.5, 0.0, None, saveat, PID, max_steps=64))


@pytest.mark.slow
def test_dense_output_equals_that_of_diffeqsolve():
    saveat = diffrax.SaveAt(dense=True)
    ours, theirs = _both(diffrax.Tsit5(), 0.0, 1.5, None, saveat, PID, max_steps=64)
    for t in (0.0, 0.123, 0.7, 1.5):
        assert relative_error(ours.evaluate(t), theirs.evaluate(t)) < 1e-12


def test_no_time_at_all():
    saveat = diffrax.SaveAt(t0=True, ts=[0.3, 0.3], t1=True)

    def loss(y0, t1):
        sol = nodegrad.odesolve(
            lambda t, y, args: 2 * y,
            diffrax.Tsit5(),
            0.3,
            t1,
            0.1,
            y0,
            saveat=saveat,
        )
        return jnp.sum(sol.ys), sol

    (value, sol), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        1.5, 0.3
    )
    assert value == 4 * 1.5
    assert sol.stats["num_steps"] == 0
    assert grads[0] == 4.0


def test_a_custom_state_and_integer_leaves_are_promoted():
    sol = nodegrad.odesolve(
        lambda t, y, args: {"n": -y["n"]},
        diffrax.Heun(),
        0,
        1,
        0.1,
        {"n": 1},
        {"unused": 3, "name": "x"},
    )
    assert jnp.allclose(sol.ys["n"], jnp.exp(-1.0), rtol=1e-2)


def test_float32_stays_float32():
    f32 = jnp.float32
    sol = nodegrad.odesolve(
        lambda t, y, args: -y,
        diffrax.Tsit5(),
        f32(0.0),
        f32(1.0),
        f32(0.1),
        jnp.ones(2, f32),
    )
    assert sol.ys.dtype == f32
    grad = jax.grad(
        lambda y: jnp.sum(
            nodegrad.odesolve(
                lambda t, y, args: -y,
                diffrax.Tsit5(),
                f32(0.0),
                f32(1.0),
                f32(0.1),
                y,
            ).ys
        )
    )(jnp.ones(2, f32))
    assert grad.dtype == f32
    assert jnp.allclose(grad, jnp.exp(f32(-1.0)), rtol=1e-5)


# Batches.


def _batched_loss(field, y0, batched, **kwargs):
    def solve(y0, batched):
        return nodegrad.odesolve(
            lambda t, y, args: field(t, y, args) - y**3 * jnp.cos(t),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            y0,
            stepsize_controller=diffrax.PIDController(1e-5, 1e-7),
            batched=batched,
            throw=False,
            **kwargs,
        )

    sol = solve(y0, True) if batched else jax.vmap(lambda y: solve(y, False))(y0)
    ys = jnp.where(jnp.isfinite(sol.ys), sol.ys, 0.0)
    return jnp.sum(ys**2), sol


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(adjoint=nodegrad.ACAAdjoint(2), max_steps=64),
        dict(saveat=diffrax.SaveAt(t0=True, ts=TS[:4], steps=3), max_steps=64),
    ],
    ids=["t1", "two checkpoints", "ts and steps"],
)
def test_batched_equals_vmap_lane_by_lane(kwargs):
    field = Field(4, 16, jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(1), (5, 4)) * jnp.arange(1.0, 6.0)[:, None]
    run = jax.jit(
        jax.value_and_grad(
            lambda f, y, batched: _batched_loss(f, y, batched, **kwargs),
            argnums=(0, 1),
            has_aux=True,
        ),
        static_argnums=2,
    )
    (value, sol), grads = run(field, y0, True)
    (expected, expected_sol), expected_grads = run(field, y0, False)
    assert jnp.allclose(value, expected, rtol=1e-13)
    assert relative_error(grads, expected_grads) < 1e-12
    counts = sol.stats["num_accepted_steps"]
    assert jnp.array_equal(counts, expected_sol.stats["num_accepted_steps"])
    assert len(set(counts.tolist())) > 2


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize("batched", [True, False])
def test_a_failed_sample_does_not_poison_its_neighbours(batched):
    field = Field(4, 16, jr.PRNGKey(0))
    good = jr.normal(jr.PRNGKey(1), (3, 4))
    bad = good.at[1].set(jnp.nan)
    loss = lambda f, y: _batched_loss(f, y, batched)
    (_, sol), (grad_field, grad_y0) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(field, bad)
    not_finite = sol.result == nodegrad.RESULTS.vector_field_not_finite
    assert not_finite.tolist() == [False, True, False]
    others = good[jnp.array([0, 2])]
    expected_field, expected_y0 = jax.grad(lambda f, y: loss(f, y)[0], argnums=(0, 1))(
        field, others
    )
    assert relative_error(grad_field, expected_field) < 1e-12
    assert relative_error(grad_y0[jnp.array([0, 2])], expected_y0) < 1e-12


# Failures.


def _blow_up(controller, dt0, **kwargs):
    """y' = y^2 from 1 is infinite at t = 1."""
    return nodegrad.odesolve(
        lambda t, y, args: y**2,
        diffrax.Tsit5(),
        0.0,
        2.0,
        dt0,
        jnp.array(1.0),
        stepsize_controller=controller,
        **kwargs,
    )


def test_blow_up_with_constant_steps_is_reported_not_returned():
    sol = _blow_up(diffrax.ConstantStepSize(), 0.01, throw=False)
    assert sol.result == nodegrad.RESULTS.vector_field_not_finite
    assert sol.result != diffrax.RESULTS.successful
    assert jnp.isfinite(sol.ys).all()
    assert 1.0 <= sol.stats["time_reached"] < 1.1
    with pytest.raises(RuntimeError, match=r"reached t = 1\.0"):
        _blow_up(diffrax.ConstantStepSize(), 0.01)


def test_blow_up_with_adaptive_steps_is_reported():
    sol = _blow_up(
        diffrax.PIDController(1e-3, 1e-3), None, throw=False, max_steps=65536
    )
    assert sol.result != diffrax.RESULTS.successful
    assert jnp.isfinite(sol.ys).all()
    assert abs(sol.stats["time_reached"] - 1.0) < 1e-2


def test_steps_too_small_are_told_from_too_many_steps():
    def solve(max_steps):
        # The solution is singular at t = 1, and all steps to there are finite.
        return nodegrad.odesolve(
            lambda t, y, args: 1 / jnp.abs(1 - t) ** 1.5,
            diffrax.Tsit5(),
            0.0,
            2.0,
            None,
            jnp.array(0.0),
            stepsize_controller=diffrax.PIDController(1e-8, 1e-8),
            max_steps=max_steps,
            throw=False,
        )

    assert solve(20).result == diffrax.RESULTS.max_steps_reached
    sol = solve(4096)
    assert sol.result == nodegrad.RESULTS.step_too_small
    assert abs(sol.stats["time_reached"] - 1.0) < 1e-6


def test_a_nan_of_the_vector_field_is_located():
    sol = nodegrad.odesolve(
        lambda t, y, args: jnp.sqrt(0.73 - t) * y,
        diffrax.Tsit5(),
        0.0,
        1.0,
        None,
        jnp.array(1.0),
        stepsize_controller=PID,
        throw=False,
    )
    assert sol.result == nodegrad.RESULTS.vector_field_not_finite
    assert jnp.allclose(sol.stats["time_reached"], 0.73, atol=1e-6)
    assert jnp.isfinite(sol.ys).all()


def test_the_gradient_of_a_failed_solve_is_that_of_the_part_solved():
    def loss(y0, solve):
        sol = solve(
            diffrax.ODETerm(lambda t, y, args: y**2),
            diffrax.Tsit5(),
            0.0,
            2.0,
            None,
            y0,
            stepsize_controller=PID,
            throw=False,
            max_steps=10,
        )
        return sol.ys[0]

    ours = jax.grad(loss)(1.0, nodegrad.odesolve)
    theirs = jax.grad(loss)(1.0, diffrax.diffeqsolve)
    assert jnp.allclose(ours, theirs, rtol=1e-9)


def test_results_are_per_sample_under_vmap():
    def result(t1):
        sol = nodegrad.odesolve(
            lambda t, y, args: y**2,
            diffrax.Tsit5(),
            0.0,
            t1,
            0.01,
            jnp.array(1.0),
            throw=False,
        )
        return sol.result == nodegrad.RESULTS.successful, sol.stats["time_reached"]

    okay, time = jax.vmap(result)(jnp.array([0.5, 2.0]))
    assert okay.tolist() == [True, False]
    assert time[0] == 0.5


def test_failure_inside_jit_raises():
    solve = eqx.filter_jit(lambda: _blow_up(diffrax.ConstantStepSize(), 0.01).ys)
    with pytest.raises(Exception, match="NaN or an infinity"):
        solve()


# Rounding.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("t1", [1.0, -1.0, 3.7e5, 0.0, -1e-30, 2.0**-40])
def test_goes_to_t1_from_where_diffrax_does(t1, dtype):
    expected = jnp.asarray(t1, dtype)
    for _ in range(100):
        expected = eqxi.prevbefore(expected)
    before = nearly(jnp.asarray(t1, dtype))
    if t1 == 0:
        # Diffrax's single steps from zero start at the first normal number.
        assert 100 * expected <= before < 0
    else:
        assert before == expected


def test_times_may_be_arrays_from_outside_of_a_jitted_function():
    # They are constants there, but operations on them are traced.
    t0, t1, ts = jnp.array(0.0), jnp.array(1.0), jnp.array([0.5, 1.0])

    @jax.jit
    def solve(y0):
        return nodegrad.odesolve(
            lambda t, y, args: -y, diffrax.Tsit5(), t0, t1, 0.05, y0,
            saveat=diffrax.SaveAt(ts=ts), max_steps=32,
        ).ys  # fmt: skip

    assert jnp.max(jnp.abs(solve(1.0) - jnp.exp(-ts))) < 1e-7

    @jax.jit
    def backwards(y0):
        return nodegrad.odesolve(
            lambda t, y, args: -y, diffrax.Tsit5(), t0, t1, -0.05, y0,
            saveat=diffrax.SaveAt(ts=ts),
        ).ys  # fmt: skip

    # Known when the function is traced, so the error says the numbers.
    with pytest.raises(ValueError, match=r"`dt0` must point from .*dt0=-0\.05"):
        backwards(1.0)
