"""One tangent map: every mode of differentiation, of every solve, is the same map.

The modes are held to the derivative of Diffrax's own loop, to plain scans over the
accepted steps, and to each other.
"""

import itertools as it
import random

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import nodegrad

from .matrix import DOORS
from .problems import accepted_grid, Field, relative_error, unrolled, van_der_pol
from .tangents import (
    CONTROLLERS,
    flat,
    inputs,
    METHODS,
    oracle,
    outputs,
    PROBLEMS,
    SAVEATS,
    Setting,
    WEIGHTS,
)


# Modes of differentiation: `(our flat function, oracle) -> (ours, expected)`.


def _direction(x, seed=0):
    return jr.normal(jr.PRNGKey(seed), x.shape)


def _jvp(ours, jacobian, hessian):
    x, v = ours.point, _direction(ours.point)
    push = jax.jit(lambda x, v: jax.jvp(ours.run, (x,), (v,))[1])
    return push(x, v), jacobian(x) @ v


def _linearize(ours, jacobian, hessian):
    x = ours.point
    _, push = jax.linearize(jax.jit(ours.run), x)
    v, w = _direction(x), _direction(x, 1)
    return (push(v), push(w)), (jacobian(x) @ v, jacobian(x) @ w)


def _by_input(ours, jacobian):
    """The columns of each input apart, so that small ones are not lost in large."""
    return jax.vmap(ours.unravel)(jacobian)


def _jacfwd(ours, jacobian, hessian):
    found = jax.jit(jax.jacfwd(ours.run))(ours.point)
    return _by_input(ours, found), _by_input(ours, jacobian(ours.point))


def _jacrev(ours, jacobian, hessian):
    found = jax.jit(jax.jacrev(ours.run))(ours.point)
    return _by_input(ours, found), _by_input(ours, jacobian(ours.point))


def _grad_of_vmap(ours, jacobian, hessian):
    # Only `y0` has a batch axis; all that the lanes share is to be summed.
    x, y0s = ours.point, ours.points(3)
    weights = _direction(jnp.zeros((3, 4)))

    def at(x, other):
        return ravel_pytree(ours.unravel(x) | {"y0": ours.unravel(other)["y0"]})[0]

    def total(x, y0s):
        lane = lambda y0: ours.run(at(x, y0))
        return jnp.sum(weights * jax.vmap(lane)(y0s))

    found = jax.jit(jax.grad(total, argnums=(0, 1)))(x, y0s)
    rows = [w @ jacobian(at(x, y0)) for w, y0 in zip(weights, y0s, strict=True)]
    shared = ours.unravel(sum(rows))
    shared["y0"] = jax.tree.map(jnp.zeros_like, shared["y0"])
    apart = jax.vmap(lambda row: ours.unravel(row)["y0"])(jnp.stack(rows))
    ours_apart = jax.vmap(lambda row: ours.unravel(row)["y0"])(found[1])
    return (ours.unravel(found[0]), ours_apart), (shared, apart)


def _vmap_of_grad(ours, jacobian, hessian):
    xs = ours.points(3)
    found = jax.jit(jax.vmap(jax.grad(lambda x: WEIGHTS @ ours.run(x))))(xs)
    return found, jnp.stack([WEIGHTS @ jacobian(x) for x in xs])


def _vmap_of_jvp(ours, jacobian, hessian):
    xs = ours.points(3)
    vs = _direction(xs)
    push = jax.jit(jax.vmap(lambda x, v: jax.jvp(ours.run, (x,), (v,))[1]))
    expected = [jacobian(x) @ v for x, v in zip(xs, vs, strict=True)]
    return push(xs, vs), jnp.stack(expected)


def _second(outer, inner):
    def mode(ours, jacobian, hessian):
        differentiated = jax.jit(outer(inner(lambda x: WEIGHTS @ ours.run(x))))
        return differentiated(ours.point), hessian(ours.point)

    return mode


MODES = {
    "jvp": _jvp,
    "linearize": _linearize,
    "jacfwd": _jacfwd,
    "jacrev": _jacrev,
    "grad(vmap)": _grad_of_vmap,
    "vmap(grad)": _vmap_of_grad,
    "vmap(jvp)": _vmap_of_jvp,
    "jacfwd(jacrev)": _second(jax.jacfwd, jax.jacrev),
    "jacfwd(jacfwd)": _second(jax.jacfwd, jax.jacfwd),
    "jacrev(jacfwd)": _second(jax.jacrev, jax.jacfwd),
}


def _covering(factors, seed=0):
    """Rows in which every two choices of two factors meet at least once.

    The whole product has 5600 rows of 10 seconds and more. Greedy: of a few random rows
    that have some pair yet to be seen, the one that has most of them.
    """
    rng, rows = random.Random(seed), []
    pairs = lambda row: set(it.combinations(enumerate(row), 2))
    product = it.product(*factors)
    missing = set().union(*map(pairs, product))
    while missing:
        (i, x), (j, y) = min(missing)
        candidates = []
        for _ in range(50):
            row = [rng.choice(factor) for factor in factors]
            row[i], row[j] = x, y
            candidates.append(tuple(row))
        row = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(row)
        rows.append(row)
    return rows


_FACTORS = [
    list(x) for x in (PROBLEMS, METHODS, CONTROLLERS, SAVEATS, DOORS, [False], MODES)
]
_FEW = [
    ("pair", "aca", "pid", "ts", "native", False, "jvp"),
    ("perceptron", "aca(4)", "constant", "steps", "diffrax", False, "jacfwd"),
    ("pair", "bosh3", "clip", "t1", "native", False, "jvp"),
]


def _check(row):
    setting, mode = Setting(*row[:-1]), row[-1]
    ours = flat(setting)
    try:
        found, expected = MODES[mode](ours, *oracle(setting))
    except Exception as error:
        # Reverse mode over forward mode may be refused, but not without a word.
        if mode != "jacrev(jacfwd)":
            raise
        assert "jax.hessian" in str(error)
        return
    adaptive = setting.controller in ("pid", "clip")
    # Where the error estimate chooses the steps, rounding moves them a little.
    assert relative_error(found, expected) < (1e-10 if adaptive else 1e-11)


def _name(row):
    return f"{row[-1]}-{Setting(*row[:-1])}"


@pytest.mark.parametrize("row", _FEW, ids=_name)
def test_a_mode_is_the_derivative_of_diffrax_s_loop(row):
    _check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", _covering(_FACTORS), ids=_name)
def test_every_mode_of_every_solve_is_the_derivative_of_diffrax_s_loop(row):
    _check(row)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["aca", "alf"])
def test_oracles_agree(method):
    setting = Setting("pair", method, "clip", "steps", "diffrax")
    direct = flat(setting, diffrax.DirectAdjoint())
    expected = oracle(setting)[0](direct.point)
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jax.jit(jacobian(direct.run))(direct.point)
        assert relative_error(_by_input(direct, found), _by_input(direct, expected)) < (
            1e-11
        )


@pytest.mark.slow
@pytest.mark.parametrize("method, door", [("aca", "native"), ("alf", "diffrax")])
@pytest.mark.parametrize("name", ["y0", "params", "t0", "t1", "dt0", "ts", "times"])
def test_one_tangent_alone_is_its_part_of_the_whole(method, door, name):
    # Nothing else is perturbed: JAX then hands symbolic zeros on.
    setting = Setting("pair", method, "clip", "fn", door)
    x, run = inputs(setting), outputs(setting)
    v = jax.tree.map(_direction, x[name])
    push = lambda part: jax.jvp(lambda p: run(x | {name: p}), (part,), (v,))[1]
    point, _ = ravel_pytree(x)
    direction = jax.tree.map(jnp.zeros_like, x) | {name: v}
    expected = oracle(setting)[0](point) @ ravel_pytree(direction)[0]
    assert relative_error(jax.jit(push)(x[name]), expected) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [None, 4, "all"])
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Bosh3()])
def test_every_mode_is_that_of_the_unrolled_accepted_grid(solver, checkpoints):
    y0, mu = jnp.array([2.0, 0.0]), jnp.array(5.0)
    controller = diffrax.PIDController(1e-4, 1e-6)
    grid = accepted_grid(van_der_pol, solver, 0.0, 1.0, y0, mu, controller)
    frozen = lambda p: unrolled(solver, van_der_pol, grid, p[:2], p[2])
    point = jnp.append(y0, mu)

    def solve_with(solve, p):
        sol = solve(
            diffrax.ODETerm(van_der_pol),
            solver,
            0.0,
            1.0,
            None,
            p[:2],
            p[2],
            stepsize_controller=controller,
            adjoint=nodegrad.ACAAdjoint(checkpoints),
            max_steps=256,
        )
        return sol.ys[0]

    for solve in DOORS.values():
        ours = lambda p, solve=solve: solve_with(solve, p)
        for mode in (
            jax.jacfwd,
            jax.jacrev,
            lambda f: jax.jacfwd(jax.jacfwd(f)),
            lambda f: jax.jacfwd(jax.jacrev(f)),
        ):
            found, expected = (jax.jit(mode(f))(point) for f in (ours, frozen))
            assert relative_error(found, expected) < 1e-11


# Forward and reverse mode are transposes of each other.


def _check_transpose(seed, draws):
    rng = random.Random(seed)
    choose = lambda options: rng.choice(list(options))
    factors = PROBLEMS, METHODS, CONTROLLERS, SAVEATS, DOORS, (False, True)
    setting = Setting(*map(choose, factors))
    ours = flat(setting)

    @jax.jit
    def both(x, v, w):
        # Of one and the same solve: in two programs rounding moves adaptive steps.
        _, push = jax.linearize(ours.run, x)
        return push(v), jax.linear_transpose(push, x)(w)[0]

    # Other numbers take other numbers of steps, and need no other program.
    for i, x in enumerate(ours.points(draws)):
        v, w = _direction(x, i), _direction(jnp.zeros(4), seed + i)
        push, pull = both(x, v, w)
        assert jnp.all(jnp.isfinite(push))
        scale = jnp.linalg.norm(push) * jnp.linalg.norm(w)
        assert jnp.abs(push @ w - pull @ v) < 1e-13 * scale, setting


@pytest.mark.parametrize("seed", range(4))
def test_forward_and_reverse_are_transposes(seed):
    _check_transpose(seed, 6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_forward_and_reverse_are_transposes_in_200_solves(seed):
    _check_transpose(seed, 4)
