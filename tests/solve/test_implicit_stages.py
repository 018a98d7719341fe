"""The pullback of steps of diagonally implicit Runge-Kutta methods."""

from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import nodegrad

from ..problems import relative_error


# Stages are found to a loose tolerance, so that another formula for their derivative,
# or at another place, would not give the same numbers.
_ROOT_FINDER = diffrax.VeryChord(rtol=1e-5, atol=1e-6)
_LEAST_SQUARES = optx.LevenbergMarquardt(rtol=1e-2, atol=1e-2)
_GAMMA = 1 - np.sqrt(0.5)


class _Sdirk2(diffrax.AbstractSDIRK):
    """Alexander's method: both stages are implicit, and none is shared."""

    tableau: ClassVar = diffrax.ButcherTableau(
        a_lower=(np.array([1 - _GAMMA]),),
        a_diagonal=np.array([_GAMMA, _GAMMA]),
        a_predictor=(np.array([1.0]),),
        b_sol=np.array([1 - _GAMMA, _GAMMA]),
        b_error=np.array([-_GAMMA, _GAMMA]),
        c=np.array([1.0]),
        c1=_GAMMA,
    )
    interpolation_cls: ClassVar = (
        diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    )
    root_finder: optx.AbstractRootFinder = _ROOT_FINDER
    root_find_max_steps: int = 10

    def order(self, terms):
        del terms
        return 2


def _field(t, y, args):
    # A pendulum with friction and a stiff variable that follows it.
    rate, matrix = args
    q, p, fast = y["q"], y["p"], y["fast"]
    pull = matrix @ jnp.concatenate([q, p])
    return {
        "q": p + 0 * pull[:1],
        "p": -jnp.sin(q) + pull[1:] + jnp.cos(t),
        "fast": -200.0 * (fast - q * p) * rate,
    }


_Y0 = {"q": jnp.array([0.5]), "p": jnp.array([0.1]), "fast": jnp.zeros(1)}
_ARGS = jnp.array(1.3), jnp.array([[0.1, -0.2], [0.3, -0.4]])
_TIMES = jnp.array([0.1, 1.2])
_STEPS = {
    "adaptive": diffrax.PIDController(rtol=1e-4, atol=1e-6),
    "jumps": diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-4, atol=1e-6), jump_ts=jnp.array([0.4, 0.7])
    ),
}
_SAVES = {
    "t1": diffrax.SaveAt(t1=True),
    "ts": diffrax.SaveAt(ts=jnp.linspace(0.15, 1.15, 4), t1=True),
    "solver state": diffrax.SaveAt(t1=True, solver_state=True),
}


def _loss(solver, adjoint, steps, save, solve):
    def loss(y0, args, times):
        options = {} if solve is nodegrad.odesolve else {"max_steps": 1024}
        sol = solve(
            diffrax.ODETerm(_field),
            solver,
            times[0],
            times[1],
            0.02,
            y0,
            args,
            saveat=_SAVES[save],
            # The times of jumps have the type of other times.
            stepsize_controller=jax.tree.map(
                lambda x: x.astype(times.dtype) if eqx.is_array(x) else x,
                _STEPS[steps],
            ),
            adjoint=adjoint,
            **options,
        )
        leaves = jax.tree.leaves((sol.ys, sol.solver_state))
        return sum(jnp.sum(jnp.sin(x)) for x in leaves if x.dtype != bool)

    return loss


@pytest.mark.rows(test=1, ci=5)
@pytest.mark.parametrize(
    ("solver", "steps", "save"),
    [
        (diffrax.Kvaerno5(root_finder=_ROOT_FINDER), "jumps", "t1"),
        (diffrax.Kvaerno3(root_finder=_ROOT_FINDER), "adaptive", "ts"),
        (diffrax.Kvaerno4(root_finder=_ROOT_FINDER), "adaptive", "solver state"),
        (_Sdirk2(), "adaptive", "ts"),
        # It minimises the residual, and what it leaves counts.
        (_Sdirk2(root_finder=_LEAST_SQUARES, root_find_max_steps=99), "adaptive", "t1"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_gradients_are_those_of_diffrax(solver, steps, save):
    # Also by both times of the solve, through the times of the stages.
    default = diffrax.RecursiveCheckpointAdjoint()
    loss = _loss(solver, default, steps, save, diffrax.diffeqsolve)
    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(_Y0, _ARGS, _TIMES)
    # Fewer slots than steps.
    loss = _loss(solver, nodegrad.ACAAdjoint(4), steps, save, diffrax.diffeqsolve)
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(_Y0, _ARGS, _TIMES)
    # Rounding changes the sizes of steps. Another formula would differ by 1e-5; with a
    # root finder that minimises and stops early by 10.
    bound = 1e-6 if solver.root_finder is _LEAST_SQUARES else 1e-9
    assert relative_error(found, expected) < bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_gradients_of_a_batch_are_those_of_diffrax(dtype):
    # If one solve of a batch is at a jump, or has ended before the others, all evaluate
    # their first stage again. It differs from the one that was carried by what the
    # root finder leaves.
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    left, tol = {jnp.float64: (1e-7, 1e-6), jnp.float32: (1e-4, 1e-3)}[dtype]
    solver = diffrax.Kvaerno3(root_finder=diffrax.VeryChord(rtol=left, atol=left))
    # Different starts take different numbers of steps.
    scaled = lambda scale: jax.tree.map(lambda y: scale * y, cast(_Y0))
    inputs = jax.vmap(scaled)(jnp.array([0.1, 1.0, 4.0], dtype)), cast(_ARGS)

    def gradient(adjoint):
        one = _loss(solver, adjoint, "jumps", "t1", diffrax.diffeqsolve)
        each = jax.vmap(lambda y0, args: one(y0, args, cast(_TIMES)), (0, None))
        total = lambda y0s, args: jnp.sum(each(y0s, args))
        return jax.jit(jax.grad(total, (0, 1)))(*inputs)

    found = gradient(nodegrad.ACAAdjoint(4))
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    if dtype == jnp.float32:
        # Rounding leaves some 1e-11 of a gradient of 1e-22 by the fast variable, so
        # errors are relative to the gradients by all variables.
        joined = lambda trees: [ravel_pytree(tree)[0] for tree in trees]
        found, expected = joined(found), joined(expected)
    assert relative_error(found, expected) < tol


@pytest.mark.slow
def test_a_solve_of_a_batch_that_has_ended_has_finite_tangents():
    # Its next steps have size zero. Lineax raises where any of them is not finite.
    solver = diffrax.Kvaerno3(root_finder=optx.Newton(1e-8, 1e-8))
    term = diffrax.ODETerm(lambda t, y, args: -(y**3))

    def slopes(adjoint):
        last = lambda t1: diffrax.diffeqsolve(
            term, solver, 0.0, t1, 0.1, 1.0, adjoint=adjoint, max_steps=16
        ).ys[0]
        push = lambda t1: jax.jvp(last, (t1,), (1.0,))
        return jax.jit(jax.vmap(push))(jnp.array([0.3, 1.1]))

    expected = slopes(diffrax.ForwardMode())
    assert relative_error(slopes(nodegrad.ACAAdjoint()), expected) < 1e-13


@pytest.mark.slow
def test_the_first_step_may_be_tiny():
    # The square of this step is zero in float32.
    single = lambda x: jnp.asarray(x, jnp.float32)
    field = lambda t, y, a: -a * (y - jnp.cos(t))

    def loss(t1, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Kvaerno3(),
            single(0),
            t1,
            single(1e-20),
            single(0.3),
            single(3),
            stepsize_controller=diffrax.PIDController(1e-3, 1e-3),
            adjoint=adjoint,
        )
        return sol.ys[0]

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    expected = slope(single(1), diffrax.RecursiveCheckpointAdjoint())
    assert relative_error(slope(single(1), nodegrad.ACAAdjoint()), expected) < 1e-4


@pytest.mark.slow
def test_half_steps_of_an_implicit_solver():
    # The tolerances of the root finder are those of the controller. The step size
    # stays at 0.1. `diffrax.diffeqsolve` cannot run this.
    def last(rate):
        sol = nodegrad.odesolve(
            lambda t, y, rate: -rate * y,
            diffrax.HalfSolver(diffrax.ImplicitEuler()),
            *(0.0, 1.0, 0.1, 1.0, rate),
            stepsize_controller=diffrax.PIDController(1e-9, 1e9, dtmin=0.1, dtmax=0.1),
        )
        return sol.ys[0]

    found = jax.jit(jax.value_and_grad(last))(2.0)
    value = 1.1**-20
    assert relative_error(found, (value, -value / 1.1)) < 1e-12


def test_a_field_is_not_traced_for_every_use_of_a_step():
    calls = []

    def field(t, y, args):
        calls.append(t)
        return _field(t, y, args)

    def loss(args, solve):
        sol = solve(
            diffrax.ODETerm(field), diffrax.Kvaerno5(), 0.0, 1.0, 0.02, _Y0, args,
            stepsize_controller=_STEPS["adaptive"], adjoint=nodegrad.ACAAdjoint(),
        )  # fmt: skip
        return jnp.sum(sol.ys["q"])

    # To check the terms, for the step, and for its pullback. (`odesolve` also checks
    # what the field returns.)
    for solve, most in ((diffrax.diffeqsolve, 3), (nodegrad.odesolve, 4)):
        calls.clear()
        jax.make_jaxpr(lambda args, s=solve: jax.grad(loss)(args, s))(_ARGS)
        assert len(calls) <= most
