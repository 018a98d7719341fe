"""Identities that hold for every solve, for random states, settings and directions.

Every structure is compiled once and run for several examples, since compilation takes
nearly all of the time. CI runs a few examples of a few structures. With
`NODEGRAD_EXAMPLES=100` in the environment there are as many examples, of any structure.
"""

import functools as ft
import os
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import nodegrad


EXAMPLES = os.environ.get("NODEGRAD_EXAMPLES")
few = settings(
    deadline=None,
    max_examples=int(EXAMPLES or 5),
    derandomize=EXAMPLES is None,
    database=None,
)

# Shapes of the leaves of a state; `None` is a leaf that is missing.
TREES = {
    "scalar": (),
    "dict": {"a": (2,), "b": None, "c": ()},
    "nested": [(1, 2), {"empty": (0,)}, (None, [()])],
    "nothing but None and one": (None, (3,)),
}
METHODS = {
    "aca": (diffrax.Heun(), nodegrad.ACAAdjoint(4)),
    "all": (diffrax.Tsit5(), nodegrad.ACAAdjoint("all")),
    "reversible": (
        nodegrad.Reversible(diffrax.Heun(), resync_every=4),
        nodegrad.ReversibleAdjoint(),
    ),
}
CONTROLLERS = ["constant", "pid", "step_to"]
# Rounding, and what a derivative makes of it. The times of "mixed" are float32, and so
# is every other leaf of the state.
TOLERANCES = {"float64": 1e-9, "float32": 2e-3, "mixed": 2e-3}


class Structure(NamedTuple):
    tree: str
    dtype: str
    controller: str
    method: str
    backwards: bool
    door: str


ALL = st.builds(
    Structure,
    st.sampled_from(list(TREES)),
    st.sampled_from(list(TOLERANCES)),
    st.sampled_from(CONTROLLERS),
    st.sampled_from(list(METHODS)),
    st.booleans(),
    st.sampled_from(["native", "diffrax"]),
)
ADAPTIVE = Structure("nested", "float64", "pid", "aca", False, "native")
REVERSIBLE = Structure("dict", "mixed", "constant", "reversible", True, "diffrax")
# Diffrax's controller of adaptive steps refuses states of several dtypes under strict
# promotion, which the tests have.
POSSIBLE = ALL.filter(lambda s: (s.dtype, s.controller) != ("mixed", "pid"))


def _structures(*for_ci):
    return st.sampled_from(for_ci) if EXAMPLES is None else POSSIBLE


SEEDS = st.integers(0, 2**31)


def _is_shape(x):
    return isinstance(x, tuple) and all(isinstance(i, int) for i in x)


def _arrays(structure, rng):
    """Random inputs: the state, a parameter, start, span and save times."""
    times = np.float32 if structure.dtype != "float64" else np.float64
    count = iter(range(100))

    def leaf(shape):
        wide = structure.dtype == "float64" or (
            structure.dtype == "mixed" and next(count) % 2
        )
        return rng.uniform(0.2, 1.0, shape).astype(np.float64 if wide else np.float32)

    span = rng.uniform(0.5, 1.0) * (-1 if structure.backwards else 1)
    t0 = rng.uniform(-1.0, 1.0)
    x = dict(
        y0=jax.tree.map(leaf, TREES[structure.tree], is_leaf=_is_shape),
        k=times(rng.uniform(0.5, 1.5)),
        t0=times(t0),
        span=times(span),
        ts=(t0 + span * np.sort(rng.uniform(0.05, 0.95, 3))).astype(times),
    )
    return jax.tree.map(jnp.asarray, x)


def _field(t, y, args):
    """Autonomous, and every leaf depends on all."""
    k = args["k"]
    total = sum(jnp.sum(x).astype(k.dtype) for x in jax.tree.leaves(y))
    rate = jnp.tanh(k * total) / args["n"].astype(k.dtype)
    return jax.tree.map(lambda x: rate.astype(x.dtype) * jnp.cos(x) - x, y)


def _solve(structure, x, times=None):
    """What was saved at `ts`, or at the end if `times` are the times of the steps."""
    solver, adjoint = METHODS[structure.method]
    solve = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
    t0, t1, dt0 = x["t0"], x["t0"] + x["span"], None
    if times is not None:
        t0, t1, controller = times[0], times[-1], diffrax.StepTo(times)
    elif structure.controller == "constant":
        controller, dt0 = diffrax.ConstantStepSize(), x["span"] / 8
    elif structure.controller == "pid":
        controller = diffrax.PIDController(1e-3, 1e-3)
    else:
        fractions = jnp.array([0, 0.2, 0.5, 0.6, 1.0], t0.dtype)
        controller = diffrax.StepTo(t0 + x["span"] * fractions)
    saveat = diffrax.SaveAt(ts=x["ts"]) if times is None else diffrax.SaveAt(t1=True)
    # Leaves that are no floating point arrays are constants.
    args = {"k": x["k"], "n": jnp.array(2), "none": None, "empty": jnp.zeros(0, int)}
    sol = solve[structure.door](
        diffrax.ODETerm(_field),
        solver,
        t0,
        t1,
        dt0,
        x["y0"],
        args,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=64,
    )
    return sol.ys


def _dot(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return sum(jnp.sum(x.astype(float) * y.astype(float)) for x, y in pairs)


def _distance(found, expected):
    """The norm of the difference, relative: single numbers may vanish by chance."""
    difference = jax.tree.map(jnp.subtract, found, expected)
    return (_dot(*2 * [difference]) / (_dot(*2 * [expected]) + 1e-12)) ** 0.5


def _stack(*trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _combined(tree):
    """The first row of every array times 2 minus the second one times 3."""
    return jax.tree.map(lambda x: 2 * x[0] - 3 * x[1], tree)


def _random_like(tree, rng):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


@ft.lru_cache
def _modes(structure):
    """A program with the derivatives of one solve in all modes, for two directions."""
    solve = ft.partial(_solve, structure)

    def run(x, directions, cotangents):
        ys, pull = jax.vjp(solve, x)
        _, push = jax.linearize(solve, x)
        three = jax.tree.map(
            lambda d: jnp.append(d, (2 * d[0] - 3 * d[1])[None], 0),
            (directions, cotangents),
        )
        tangents = jax.vmap(push)(three[0])
        (gradients,) = jax.vmap(pull)(three[1])
        # The Hessian of a scalar loss in the state and the parameter.
        spaces = lambda x: {name: x[name] for name in ("y0", "k")}
        loss = lambda p: sum(
            jnp.sum(jnp.sin(y).astype(float))
            for y in jax.tree.leaves(solve({**x, **p}))
        )
        product = lambda v: jax.jvp(jax.grad(loss), (spaces(x),), (v,))[1]
        products = jax.vmap(product)(spaces(directions))
        return ys, tangents, gradients, products

    return jax.jit(run)


@pytest.mark.exhaustive
@few
@given(_structures(REVERSIBLE), SEEDS)
def test_derivatives_are_linear_transposed_and_symmetric(structure, seed):
    rng = np.random.default_rng(seed)
    x, tol = _arrays(structure, rng), TOLERANCES[structure.dtype]
    directions = _stack(*(_random_like(x, rng) for _ in range(2)))
    shapes = eqx.filter_eval_shape(ft.partial(_solve, structure), x)
    cotangents = _stack(*(_random_like(shapes, rng) for _ in range(2)))
    _, tangents, gradients, products = _modes(structure)(x, directions, cotangents)
    row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    # Both are linear.
    assert _distance(row(tangents, 2), _combined(tangents)) < tol
    assert _distance(row(gradients, 2), _combined(gradients)) < tol
    # And transposes of each other.
    for i in range(2):
        left = _dot(row(cotangents, i), row(tangents, i))
        right = _dot(row(gradients, i), row(directions, i))
        size = (
            _dot(*2 * [row(cotangents, i)]) ** 0.5
            * _dot(*2 * [row(tangents, i)]) ** 0.5
        )
        assert abs(left - right) < tol * (size + 1e-3)
    # The Hessian is symmetric.
    spaces = lambda i: {name: row(directions[name], i) for name in ("y0", "k")}
    left, right = (_dot(row(products, i), spaces(1 - i)) for i in range(2))
    assert abs(left - right) < tol * (abs(left) + 1)


@ft.lru_cache
def _gradient(structure):
    def loss(x):
        ys = _solve(structure, x)
        return sum(jnp.sum(jnp.sin(y).astype(float)) for y in jax.tree.leaves(ys))

    fn = jax.value_and_grad(loss)
    return jax.jit(fn), jax.jit(jax.vmap(fn))


@pytest.mark.exhaustive
@few
@given(_structures(ADAPTIVE, REVERSIBLE), SEEDS)
def test_a_batch_is_a_loop_and_time_may_be_shifted(structure, seed):
    rng = np.random.default_rng(seed)
    one, batch = _gradient(structure)
    xs = [_arrays(structure, rng) for _ in range(3)]
    each = [one(x) for x in xs]
    # Adaptive steps of a batch round differently, and so do shifted times: a controller
    # amplifies it. Its own tolerance is 1e-3.
    tol = TOLERANCES[structure.dtype]
    tol = max(tol, 1e-6) if structure.controller == "pid" else tol
    assert _distance(batch(_stack(*xs)), _stack(*each)) < tol
    # The vector field does not depend on time. Adding rounds `t0` and `ts`.
    x = xs[0]
    shifted = {**x, "t0": x["t0"] + 2, "ts": x["ts"] + 2}
    tol = tol if structure.dtype == "float64" else 1e-2
    assert _distance(one(shifted), each[0]) < tol


@ft.lru_cache
def _split(structure):
    def whole(x, times):
        return _last(_solve(structure, x, times))

    def halves(x, times):
        middle = _last(_solve(structure, x, times[:4]))
        return _last(_solve(structure, {**x, "y0": middle}, times[3:]))

    def both(x, times, ct):
        outs = [jax.vjp(lambda x, f=f: f(x, times), x) for f in (whole, halves)]
        return [(y, pull(ct)) for y, pull in outs]

    return jax.jit(both)


def _last(ys):
    return jax.tree.map(lambda y: y[-1], ys)


@pytest.mark.exhaustive
@few
@given(_structures(ADAPTIVE), SEEDS)
def test_an_interval_may_be_split_at_the_end_of_a_step(structure, seed):
    # Copies of a reversible solver are coupled anew where a solve starts.
    structure = structure._replace(controller="step_to")
    if structure.method == "reversible":
        structure = structure._replace(method="aca")
    rng = np.random.default_rng(seed)
    x = _arrays(structure, rng)
    times = x["t0"] + x["span"] * jnp.linspace(0, 1, 8, dtype=x["t0"].dtype)
    whole, halves = _split(structure)(x, times, _random_like(x["y0"], rng))
    assert _distance(halves, whole) < TOLERANCES[structure.dtype]
