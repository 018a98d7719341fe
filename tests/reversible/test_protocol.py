"""Solvers with a `backward_step` that this package knows nothing else about."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad

from ..matrix import DOORS, value_and_grad
from ..problems import Field, relative_error


RCA = diffrax.RecursiveCheckpointAdjoint()
SUCCESS = diffrax.RESULTS.successful


class UsersHeun(nodegrad.AbstractReversibleSolver, diffrax.AbstractStratonovichSolver):
    """Reversible Heun as a user writes it: `diffrax.ReversibleHeun` and an inverse."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation
    order = lambda self, terms: 2
    init = lambda self, terms, t0, t1, y0, args: (y0, terms.vf(t0, y0, args))
    func = lambda self, terms, t0, y0, args: terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        return diffrax.ReversibleHeun().step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        (yhat1, vf1), control = solver_state, terms.contr(t0, t1)
        f1 = terms.prod(vf1, control)
        yhat0 = jax.tree.map(lambda y, z, f: 2 * y - z - f, y1, yhat1, f1)
        vf0 = terms.vf(t0, yhat0, args)
        f0 = terms.prod(vf0, control)
        y0 = jax.tree.map(lambda y, f, g: y - (f + g) / 2, y1, f0, f1)
        return y0, dict(y0=y0, y1=y1), (yhat0, vf0), SUCCESS


class Undone:
    """Undoes a step by a step of the opposite size; needs no base class."""

    resyncs_at_jumps = False

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        assert made_jump is False and len(ts_state) == 1
        y0, _, info, state, result = self.step(
            terms, t1, t0, y1, args, solver_state, made_jump
        )
        return y0, info, state, result


class NearlyRK4(Undone, nodegrad.RK4):
    pass


class SharesItsLastStage(Undone, diffrax.Bosh3):
    """The inverse evaluates the stage that is shared, which the solver state has."""

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        fresh = self.init(terms, t1, t0, y1, args)
        y0, info, _, result = super().backward_step(
            terms, t0, t1, y1, args, ts_state, fresh, made_jump
        )
        first, _ = solver_state
        state = jnp.zeros_like(first), terms.vf(t0, y0, args)
        return y0, info, state, result


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "door, controller, saveat, backwards",
    [
        ("native", "pid", "all", False),
        ("diffrax", "clip", "fn", True),
        ("diffrax", "step_to", "dense", True),
    ],
)
def test_a_users_solver_has_exact_gradients(door, controller, saveat, backwards):
    setting = controller, saveat, backwards
    expected = value_and_grad(
        diffrax.diffeqsolve, RCA, diffrax.ReversibleHeun(), *setting
    )
    adjoint = nodegrad.ReversibleAdjoint()
    ours = value_and_grad(DOORS[door], adjoint, UsersHeun(), *setting)
    assert relative_error(ours, expected) < 1e-10


def _noisy():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.PRNGKey(0))
    drift = diffrax.ODETerm(lambda t, y, a: -a * jnp.sin(y))
    noise = lambda t, y, a: a * jnp.stack([jnp.cos(y), 1 + 0.1 * y], axis=1)
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(noise, path))


@pytest.mark.exhaustive
def test_a_users_solver_of_stochastic_equations():
    def loss(y0, a, solver, solve, adjoint):
        sol = solve(_noisy(), solver, 0.0, 1.0, 0.05, y0, a, adjoint=adjoint)
        return jnp.sum(sol.ys**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3, 4))
    point = jnp.array([1.0, 0.5]), jnp.array(0.7)
    expected = grad(*point, diffrax.ReversibleHeun(), diffrax.diffeqsolve, RCA)
    for solve in DOORS.values():
        ours = grad(*point, UsersHeun(), solve, nodegrad.ReversibleAdjoint())
        assert relative_error(ours, expected) < 1e-11


@pytest.mark.slow
def test_a_users_solver_under_vmap_and_twice():
    field = Field(3, 5, jr.PRNGKey(0))
    y0s = jr.normal(jr.PRNGKey(1), (4, 3))

    def loss(scale, y0, solver, adjoint):
        term = diffrax.ODETerm(lambda t, y, scale: scale * field(t, y, None))
        sol = nodegrad.odesolve(
            term, solver, 0.0, 1.0, 0.1, y0, scale, adjoint=adjoint, max_steps=16
        )
        return jnp.sum(sol.ys**2)

    def both(solver, adjoint):
        many = lambda s: jnp.sum(jax.vmap(lambda y: loss(s, y, solver, adjoint))(y0s))
        gradient = jax.grad(many)
        return jax.jit(lambda s: (gradient(s), jax.jvp(gradient, (s,), (s,))))(0.7)

    expected = both(diffrax.ReversibleHeun(), nodegrad.ACAAdjoint())
    ours = both(UsersHeun(), nodegrad.ReversibleAdjoint())
    assert relative_error(ours, expected) < 1e-11


def _spiral(t, y, a):
    return jnp.stack([-a * y[0] + 2 * y[1], -2 * y[0] - a * y[1]]) + jnp.sin(3 * t)


def _spiral_grad(solver, adjoint, solve=nodegrad.odesolve, h=0.1, throw=True):
    """The gradient of a solve, and the reconstruction error if it is measured."""

    def loss(y0, a):
        sol = solve(
            diffrax.ODETerm(_spiral),
            solver,
            0.0,
            2.0,
            h,
            y0,
            a,
            adjoint=adjoint,
            throw=throw,
        )
        return jnp.sum(sol.ys**2), sol.stats.get("reconstruction_error")

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return grad(jnp.array([1.0, 0.5]), jnp.array(0.4))


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("door", DOORS)
def test_gradients_are_as_exact_as_the_inverse(door):
    solve, adjoint = DOORS[door], nodegrad.ReversibleAdjoint(check=True)
    expected, _ = _spiral_grad(nodegrad.RK4(), RCA, diffrax.diffeqsolve)
    ours, error = _spiral_grad(NearlyRK4(), adjoint, solve)
    assert 1e-8 < error < 1e-4
    assert 1e-9 < relative_error(ours, expected) < 10 * error
    # The defect of a step is of the order h^6, and of the solve h^5.
    _, half = _spiral_grad(NearlyRK4(), adjoint, solve, h=0.05)
    assert 25 < error / half < 40


def _stored(cls, every):
    return type(f"StoredEvery{every}", (cls,), {"resync_every": every})()


@pytest.mark.exhaustive
def test_states_before_resyncs_are_stored():
    expected, _ = _spiral_grad(nodegrad.RK4(), RCA, diffrax.diffeqsolve)
    adjoint = nodegrad.ReversibleAdjoint(check=True)
    _, error = _spiral_grad(NearlyRK4(), adjoint)
    _, stored_error = _spiral_grad(_stored(NearlyRK4, 5), adjoint)
    assert stored_error < error / 2
    # With all states stored nothing is left of the defect.
    ours, _ = _spiral_grad(_stored(NearlyRK4, 1), adjoint)
    assert relative_error(ours, expected) < 1e-13


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("door", DOORS)
def test_a_stage_that_steps_share_is_in_the_solver_state(door):
    solve, adjoint = DOORS[door], nodegrad.ReversibleAdjoint(check=True)
    expected, _ = _spiral_grad(diffrax.Bosh3(), RCA, diffrax.diffeqsolve, h=0.05)
    ours, error = _spiral_grad(SharesItsLastStage(), adjoint, solve, h=0.05)
    assert relative_error(ours, expected) < 10 * error < 1e-2
    ours, _ = _spiral_grad(_stored(SharesItsLastStage, 1), adjoint, solve, h=0.05)
    assert relative_error(ours, expected) < 1e-13


def test_a_wrong_inverse_is_refused():
    class Wrong(nodegrad.RK4):
        def backward_step(self, terms, t0, t1, y1, *args):
            return 1.1 * y1, {}, None, SUCCESS

    class Fails(NearlyRK4):
        def backward_step(self, *args):
            y0, info, state, _ = super().backward_step(*args)
            return y0, info, state, diffrax.RESULTS.nonlinear_divergence

    for solver in (Wrong(), Fails()):
        with pytest.raises(Exception, match="reconstructed differs"):
            jax.block_until_ready(_spiral_grad(solver, nodegrad.ReversibleAdjoint()))
        quiet, _ = _spiral_grad(solver, nodegrad.ReversibleAdjoint(), throw=False)
        assert all(jnp.all(jnp.isnan(g)) for g in quiet)


def test_solvers_without_an_inverse_are_told_of_the_protocol():
    with pytest.raises(TypeError, match="AbstractReversibleSolver"):
        _spiral_grad(diffrax.Tsit5(), nodegrad.ReversibleAdjoint())


@pytest.mark.parametrize(
    "solver",
    [
        nodegrad.Reversible(diffrax.Bosh3(), 0.9),
        nodegrad.Reversible(diffrax.Heun(), resync_every=4),
        nodegrad.ALF(),
    ],
    ids=repr,
)
def test_solvers_of_the_package_have_the_method_too(solver):
    term, a = diffrax.ODETerm(_spiral), jnp.array(0.4)
    y0, times = jnp.array([1.0, 0.5]), jnp.array([0.0, 0.1, 0.25])
    state0 = solver.init(term, times[0], times[1], y0, a)
    # A resync would be in the fifth step.
    first, second = (times[0], times[1]), (times[1], times[2])
    y1, _, _, state1, _ = solver.step(term, *first, y0, a, state0, False)
    y2, _, info, state2, _ = solver.step(term, *second, y1, a, state1, False)
    found1, found_info, state, result = solver.backward_step(
        term, *second, y2, a, (times[0],), state2, False
    )
    assert result == SUCCESS
    assert relative_error((found1, found_info), (y1, info)) < 1e-13
    found0, _, state, _ = solver.backward_step(
        term, *first, found1, a, (times[0],), state, False
    )
    assert relative_error(found0, y0) < 1e-13
    kept = lambda s: s.velocity if isinstance(solver, nodegrad.ALF) else s.z
    assert relative_error(kept(state), kept(state0)) < 1e-13
    assert isinstance(solver, nodegrad.AbstractReversibleSolver)


def test_nothing_is_stored_of_a_users_solver():
    field = Field(8, 16, jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(1), (64, 8))

    def loss(y0, max_steps):
        vf = lambda t, y, args: jax.vmap(lambda y: field(t, y, args))(y)
        h = 1 / max_steps
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vf),
            UsersHeun(),
            0.0,
            1.0,
            h,
            y0,
            adjoint=nodegrad.ReversibleAdjoint(),
            max_steps=max_steps,
        )
        return jnp.sum(sol.ys**2)

    def temporary(n):
        grad = jax.jit(lambda y0: jax.grad(loss)(y0, n))
        return grad.lower(y0).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1000) < temporary(10) + 1000
