"""Gradients of every solver that Diffrax has, against Diffrax's default adjoint."""

import inspect
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

import nodegrad

from ..matrix import DOORS
from ..problems import relative_error


def _linear(t, y, a):
    return jnp.stack([a * y[1], -jnp.sin(y[0])]) + 0.1 * t


def _noise(shape: tuple[int, ...], levy_area: type) -> diffrax.VirtualBrownianTree:
    key = jr.PRNGKey(0)
    return diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, shape, key, levy_area)


def _ode(levy_area: Any):
    return diffrax.ODETerm(_linear), jnp.array([1.0, 0.5])


def _split(levy_area: Any):
    relax = diffrax.ODETerm(lambda t, y, a: -2.0 * a * y)
    return diffrax.MultiTerm(diffrax.ODETerm(_linear), relax), jnp.array([1.0, 0.5])


def _separable(levy_area: Any):
    q = diffrax.ODETerm(lambda t, p, a: a * p)
    p = diffrax.ODETerm(lambda t, q, a: -jnp.sin(q))
    return (q, p), (jnp.array([1.0, 0.5]), jnp.array([0.0, 0.2]))


def _noisy(noise: Any, shape: tuple[int, ...], levy_area: type):
    control = diffrax.ControlTerm(noise, _noise(shape, levy_area))
    return diffrax.MultiTerm(diffrax.ODETerm(_linear), control), jnp.array([1.0, 0.5])


def _additive(levy_area: type):
    noise = lambda t, y, a: a * jnp.array([[0.3, 0.1], [0.0, 0.2]])
    return _noisy(noise, (2,), levy_area)


def _commutative(levy_area: type):
    return _noisy(lambda t, y, a: 0.3 * a * jnp.cos(y), (), levy_area)


def _langevin(levy_area: type):
    one = jnp.array(1.0)
    drift = diffrax.UnderdampedLangevinDriftTerm(one, one, lambda x, a: a * x)
    path = _noise((2,), levy_area)
    noise = diffrax.UnderdampedLangevinDiffusionTerm(one, one, path)
    y0 = jnp.array([1.0, 0.5]), jnp.array([0.0, 0.1])
    return diffrax.MultiTerm(drift, noise), y0


_BM, _STLA = diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea
_STTLA = diffrax.SpaceTimeTimeLevyArea
_IMPLICIT = dict(root_finder=optx.Newton(rtol=1e-10, atol=1e-10))
# The class, its arguments, the problem, and the kind of noise.
_CASES = {
    "ALIGN": ((0.05,), {}, _langevin, _STLA),
    "Bosh3": ((), {}, _ode, None),
    "Dopri5": ((), {}, _ode, None),
    "Dopri8": ((), {}, _ode, None),
    "Euler": ((), {}, _additive, _BM),
    "EulerHeun": ((), {}, _commutative, _BM),
    "GeneralShARK": ((), {}, _commutative, _STLA),
    "HalfSolver": ((diffrax.Heun(),), {}, _commutative, _BM),
    "Heun": ((), {}, _commutative, _BM),
    "ImplicitEuler": ((), _IMPLICIT, _ode, None),
    "ItoMilstein": ((), {}, _commutative, _BM),
    "KenCarp3": ((), _IMPLICIT, _split, None),
    "KenCarp4": ((), _IMPLICIT, _split, None),
    "KenCarp5": ((), _IMPLICIT, _split, None),
    "Kvaerno3": ((), _IMPLICIT, _ode, None),
    "Kvaerno4": ((), _IMPLICIT, _ode, None),
    "Kvaerno5": ((), _IMPLICIT, _ode, None),
    "LeapfrogMidpoint": ((), {}, _ode, None),
    "Midpoint": ((), {}, _commutative, _BM),
    "QUICSORT": ((0.05,), {}, _langevin, _STTLA),
    "Ralston": ((), {}, _commutative, _BM),
    "ReversibleHeun": ((), {}, _commutative, _BM),
    "SEA": ((), {}, _additive, _STLA),
    "SPaRK": ((), {}, _commutative, _STLA),
    "SRA1": ((), {}, _additive, _STLA),
    "SemiImplicitEuler": ((), {}, _separable, None),
    "ShARK": ((), {}, _additive, _STLA),
    "ShOULD": ((0.05,), {}, _langevin, _STTLA),
    "Sil3": ((), _IMPLICIT, _split, None),
    "SlowRK": ((), {}, _commutative, _STLA),
    "StratonovichMilstein": ((), {}, _commutative, _BM),
    "Tsit5": ((), {}, _ode, None),
}


def test_no_solver_is_forgotten():
    solvers = {
        name
        for name, value in vars(diffrax).items()
        if inspect.isclass(value)
        and issubclass(value, diffrax.AbstractSolver)
        and not name.startswith("Abstract")
    }
    assert solvers == set(_CASES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(_CASES, key=lambda name: name != "Midpoint"))
def test_gradients_are_those_of_diffrax(name):
    args, kwargs, problem, levy_area = _CASES[name]
    solver = getattr(diffrax, name)(*args, **kwargs)
    terms, y0 = problem(levy_area)

    def loss(y0, a, solve, adjoint):
        sol = solve(
            terms,
            solver,
            0.0,
            1.0,
            0.1,
            y0,
            a,
            saveat=diffrax.SaveAt(steps=True),
            adjoint=adjoint,
            max_steps=10,
        )
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(sol.ys))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    a = jnp.array(1.3)
    default = diffrax.RecursiveCheckpointAdjoint()
    expected = grad(y0, a, diffrax.diffeqsolve, default)
    for solve in DOORS.values():
        ours = grad(y0, a, solve, nodegrad.ACAAdjoint())
        assert relative_error(ours, expected) < 1e-10
