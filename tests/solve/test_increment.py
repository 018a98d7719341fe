"""The increment of a Runge-Kutta step whose stages are loops."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import nodegrad
from nodegrad._internal.batch import Axes, Batch
from nodegrad._layers.work import products_dominate
from nodegrad._steps.increment import Increment, StagedIncrement
from nodegrad._steps.tableau import is_scanned

from ..problems import relative_error


TABLEAUS = {
    "tsit5": diffrax.Tsit5.tableau,
    "rk4": nodegrad.RK4.tableau,
    "heun": diffrax.Heun.tableau,
    "dopri8": diffrax.Dopri8.tableau,
}


def _problem(dtype):
    """A vector field with arrays that solves share and arrays of their own."""
    shared = jnp.asarray([0.3, -0.7, 1.1], dtype)
    own = jr.normal(jr.PRNGKey(0), (2, 3), dtype)

    def product(shared, own):
        def fn(t, y, control):
            pull = jnp.sin(own * y["a"]) + shared * y["b"] * t
            rates = {"a": pull * y["b"], "b": jnp.cos(t) * shared[0] - y["a"] * own}
            return jax.tree.map(lambda x: x * control["h"] + control["w"], rates)

        return fn

    return shared, own, product


def _arguments(dtype):
    keys = iter(jr.split(jr.PRNGKey(1), 4))
    state = lambda: jr.normal(next(keys), (2, 3), dtype)
    h = jnp.asarray([0.2, 0.3], dtype)
    control = {"h": h, "w": jnp.asarray([0.01, -0.02], dtype)}
    t0 = jnp.asarray([0.1, 0.4], dtype)
    return t0, t0 + h, control, {"a": state(), "b": state()}


@pytest.mark.rows(test=0, ci=3)
@pytest.mark.parametrize(
    "tableau, returns, dtype",
    [
        ("tsit5", "all", jnp.float64),
        ("heun", "none", jnp.float64),
        ("rk4", "first", jnp.float32),
        ("tsit5", "none", jnp.float32),
        ("dopri8", "all", jnp.float64),
        ("rk4", "all", jnp.float64),
    ],
)
def test_pullback_is_that_of_the_stages_one_after_another(
    tableau, returns, dtype, monkeypatch
):
    # On a GPU the stages would be unrolled.
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    shared, own, product = _problem(dtype)
    args, tableau = _arguments(dtype), TABLEAUS[tableau]
    one = jax.tree.map(lambda x: x[0], args)
    make = lambda shared, own: Increment(tableau, product(shared, own), returns)
    consts, staged = make(shared, own[0]).closure_convert(*one)
    assert isinstance(staged, StagedIncrement)
    assert staged.scanned
    assert sorted(x.shape for x in consts) == [(3,), (3,)]
    is_own = [bool(jnp.all(x == own[0])) for x in consts]
    consts = [own if mine else shared for mine in is_own]

    def both(consts, args):
        """Two solves, one after the other, without a loop over the stages."""
        named = dict(zip(is_own, consts, strict=True))
        solve = lambda own, *args: make(named[False], own)(*args)
        return jax.vmap(solve)(named[True], *args)

    spec = jax.tree.map(lambda _: True, args)
    axes = [Axes((mine,)) for mine in is_own]
    wrt = [True, True]

    @jax.jit
    def ours(consts, args, cts):
        out, pull = staged.pullback(Batch((2,)), consts, axes, wrt, args, spec)
        return out, pull(cts)

    @jax.jit
    def theirs(consts, args, cts):
        out, pull = jax.vjp(both, consts, args)
        return out, pull(cts)

    out = both(consts, args)
    noise = lambda x: jr.normal(jr.PRNGKey(2), x.shape, x.dtype)
    cts = jax.tree.map(noise, out)
    found, expected = ours(consts, args, cts), theirs(consts, args, cts)
    tolerance = 1e-13 if dtype == jnp.float64 else 1e-5
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert relative_error(x, y) < tolerance
    # Its derivative by forward mode is that of theirs.
    push = lambda fn: jax.jvp(fn, (consts, args, cts), (consts, args, cts))[1]
    for x, y in zip(
        jax.tree.leaves(push(ours)), jax.tree.leaves(push(theirs)), strict=True
    ):
        assert relative_error(x, y) < 10 * tolerance


_MATRIX = jnp.ones((8, 8))


@pytest.mark.parametrize(
    "field, expected",
    [
        (lambda y: jnp.sin(y) * jnp.roll(y, 1), False),
        (lambda y: y[jnp.array([1, 0, 2, 3, 4, 5, 6, 7])], False),
        (lambda y: jnp.tanh(_MATRIX @ y), True),
        (lambda y: jax.jit(lambda y: _MATRIX @ jnp.tanh(_MATRIX @ y))(y), True),
        (lambda y: jax.lax.fori_loop(0, 3, lambda _, y: _MATRIX @ y, y), True),
        # A small product in a large vector field.
        (lambda y: y.at[:2].set(_MATRIX[:2, :2] @ y[:2]) * jnp.sin(y) + y, False),
        (lambda y: jnp.convolve(y, jnp.ones(8)), True),
        (lambda y: jnp.linalg.solve(_MATRIX + jnp.eye(8), y), True),
        # The inverse of a number costs no more than what surrounds it.
        (lambda y: jnp.sin(y) * jnp.linalg.inv(y[:1, None])[0], False),
        (lambda y: jnp.fft.irfft(jnp.fft.rfft(y)), True),
    ],
)
def test_what_kind_of_work_a_vector_field_does(field, expected):
    jaxpr = jax.make_jaxpr(field)(jnp.ones(8)).jaxpr
    assert products_dominate(jaxpr) is expected


@pytest.mark.parametrize(
    "tableau, product, backend, expected",
    [
        ("tsit5", False, "cpu", True),
        ("tsit5", True, "cpu", False),
        ("tsit5", False, "gpu", False),
        ("dopri8", True, "gpu", True),
    ],
)
def test_when_stages_are_a_loop(tableau, product, backend, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    field = (lambda y: _MATRIX @ y) if product else jnp.sin
    jaxpr = jax.make_jaxpr(field)(jnp.ones(8)).jaxpr
    assert is_scanned(TABLEAUS[tableau], jaxpr) is expected
