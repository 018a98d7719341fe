"""Times of steps where they depend on more than `t0`, `t1` and `dt0` of this solve."""

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import nodegrad

from ..matrix import DOORS
from ..problems import relative_error


DIFFRAX = diffrax.RecursiveCheckpointAdjoint()


def _field(t, y, rate):
    return -rate * y * (1.2 + jnp.cos(3 * t))


@pytest.mark.slow
def test_constant_steps_go_on_with_the_state_of_the_controller():
    # The steps of the second solve end at fractions of the first interval, not of its
    # own: at 1.3, 1.5, 1.75, ... and not at multiples of 0.3.
    def end(p, adjoint):
        saveat = diffrax.SaveAt(
            t1=True, solver_state=True, controller_state=True, made_jump=True
        )
        options = dict(adjoint=adjoint, max_steps=20)
        term, solver = diffrax.ODETerm(_field), diffrax.Heun()
        first = diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            p["restart"],
            0.3,
            p["y0"],
            p["rate"],
            saveat=saveat,
            **options,
        )
        return diffrax.diffeqsolve(
            term, solver, p["restart"], p["t1"], 0.3, first.ys[-1], p["rate"],
            solver_state=first.solver_state,
            controller_state=first.controller_state,
            made_jump=first.made_jump,
            **options,
        ).ys[-1]  # fmt: skip

    p = {"y0": 1.3, "rate": 0.8, "restart": 1.0, "t1": 3.1}
    p = jax.tree.map(jnp.asarray, p)
    expected = jax.jit(jax.grad(end), static_argnums=1)(p, DIFFRAX)
    adjoint = nodegrad.ACAAdjoint()
    # The derivative by the time of the restart is a small sum of large terms.
    small = expected.pop("restart")
    for mode in (jax.grad, jax.jacfwd):
        found = jax.jit(mode(end), static_argnums=1)(p, adjoint)
        assert relative_error(found.pop("restart"), small) < 1e-12
        assert relative_error(found, expected) < 1e-13


@pytest.mark.rows(test=2, ci=6)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("t0", "t1", "step", "dtype"),
    [
        # A year, and steps of a few days: 100 ulp are 0.012.
        (2020.0, 2021.0, 0.01, jnp.float32),
        (0.0, 1.0, 0.125, jnp.bfloat16),
        (2020.0, 2020.1, [0.0, 0.03, 0.05, 0.095, 0.1], jnp.float32),
    ],
    ids=["constant", "bfloat16", "prescribed"],
)
def test_a_step_that_would_end_just_before_t1_ends_there(door, t0, t1, step, dtype):
    # As in Diffrax, within 100 ulp. These steps are few, and the last one is longer.
    is_constant = isinstance(step, float)

    def end(solve, adjoint, y0, rate, t0, t1):
        controller = diffrax.ConstantStepSize()
        if not is_constant:
            start = jax.lax.stop_gradient(t0)
            controller = diffrax.StepTo(start + jnp.array(step, dtype))
        return solve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y),
            diffrax.Heun(),
            t0,
            t1,
            jnp.array(step, dtype) if is_constant else None,
            y0,
            rate,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=128,
        ).ys[0]

    gradient = jax.grad(end, (2, 3, 4, 5))
    inputs = (
        jnp.float32(1.0),
        jnp.float32(0.7),
        jnp.array(t0, dtype),
        jnp.array(t1, dtype),
    )
    expected = gradient(diffrax.diffeqsolve, diffrax.DirectAdjoint(), *inputs)
    found = gradient(DOORS[door], nodegrad.ACAAdjoint(), *inputs)
    assert relative_error(found, expected) < 20 * float(jnp.finfo(dtype).eps)


def _distance(found, expected):
    # Some derivatives are zero but for rounding.
    apart = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), found, expected)
    return max(jax.tree.leaves(apart))


_CONTROLLERS = {
    "constant": lambda ts: diffrax.ConstantStepSize(),
    "to": lambda ts: diffrax.StepTo(ts),
    # Two programs round differently: tolerances of three digits hide it.
    "adaptive": lambda ts: diffrax.PIDController(1e-5, 1e-5),
}


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("solve", [diffrax.diffeqsolve, nodegrad.odesolve])
def test_prescribed_steps_end_with_the_solve(solve):
    # The last of the times and `t1` have one value. The end moves with `t1`.
    def end(p, solve, adjoint):
        options = dict(stepsize_controller=diffrax.StepTo(p["ts"]), adjoint=adjoint)
        term, solver = diffrax.ODETerm(_field), diffrax.Heun()
        return solve(
            term, solver, p["t0"], p["t1"], None, 1.3, 0.8, max_steps=8, **options
        ).ys[-1]

    times = jnp.array([0.0, 0.3, 0.9, 1.0])
    p = {"ts": times, "t0": times[0], "t1": times[-1]}
    expected = jax.jit(jax.grad(end), static_argnums=(1, 2))(
        p, diffrax.diffeqsolve, DIFFRAX
    )
    assert expected["t1"] != 0
    derivative = {"reverse": jax.grad, "forward": jax.jacfwd}
    for name, of in derivative.items():
        found = jax.jit(of(end), static_argnums=(1, 2))(p, solve, nodegrad.ACAAdjoint())
        assert _distance(found, expected) < 1e-14, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", _CONTROLLERS)
def test_the_time_of_an_event_without_a_root_finder(kind):
    # The solve ends at the end of a step, which moves with the times of the grid.
    event = diffrax.Event(lambda t, y, args, **kwargs: y < 0.5)

    def time_and_state(p, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_field), diffrax.Tsit5(), p["ts"][0], p["ts"][-1],
            None if kind == "to" else p["dt0"], p["y0"], 0.8,
            stepsize_controller=_CONTROLLERS[kind](p["ts"]),
            adjoint=adjoint, event=event, max_steps=64,
        )  # fmt: skip
        return sol.ts[0], sol.ys[0]

    p = {
        "ts": jnp.array([0.0, 0.2, 0.5, 0.9, 1.4, 5.0]),
        "dt0": jnp.array(0.1),
        "y0": jnp.array(1.3),
    }
    jacobians = [
        jax.jit(transform(time_and_state), static_argnums=1)
        for transform in (jax.jacrev, jax.jacfwd)
    ]
    expected = jacobians[0](p, DIFFRAX)
    moved = jax.tree.leaves(expected[0])
    assert max(jnp.max(jnp.abs(x)) for x in moved) > 0.1
    for jacobian in jacobians:
        found = jacobian(p, nodegrad.ACAAdjoint())
        assert _distance(found, expected) < (1e-7 if kind == "adaptive" else 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("root_finder", [None, optx.Newton(1e-12, 1e-12)])
def test_constant_steps_without_an_end(root_finder):
    event = diffrax.Event(lambda t, y, args, **kwargs: y - 0.9, root_finder)

    def time_and_state(p, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * (y - 0.5)), diffrax.Heun(),
            p["t0"], jnp.inf, p["dt0"], p["y0"], p["rate"],
            adjoint=adjoint, event=event, max_steps=64,
        )  # fmt: skip
        return sol.ts[0], sol.ys[0]

    numbers = {"t0": 0.0, "dt0": 0.1, "y0": 1.3, "rate": 1.1}
    p = {name: jnp.array(x) for name, x in numbers.items()}
    expected = jax.jit(jax.jacrev(time_and_state), static_argnums=1)(p, DIFFRAX)
    for transform in (jax.jacrev, jax.jacfwd):
        jacobian = jax.jit(transform(time_and_state), static_argnums=1)
        found = jacobian(p, nodegrad.ACAAdjoint())
        assert _distance(found, expected) < 1e-12


def test_a_failure_is_told_where_times_are_differentiated():
    def end(t0, t1):
        return nodegrad.odesolve(
            lambda t, y, args: -y, diffrax.Tsit5(), t0, t1, 0.1, 1.0, max_steps=3
        ).ys[0]

    for argument in (0, 1):
        for transform in (jax.grad, jax.jacfwd):
            with pytest.raises(RuntimeError, match=r"after 3 accepted steps"):
                transform(end, argnums=argument)(0.0, 1.0)
