"""Bad and unusual inputs: each gives the right value, or is refused by name.

The rows are the inputs that users of other libraries complained about. What has a test
elsewhere is not repeated: NaNs of the vector field and too many steps
(test_odesolve.py), closures, tolerances and `max_steps=None` (test_adjoint.py), reverse
mode over a derivative (test_modes.py), complex states (test_complex.py), several
devices (test_sharding.py), vectors that do not fit (../curvature/test_products.py), and
costs (../second_order/test_hessian_blocks.py).
"""

import functools as ft
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import nodegrad

from ..matrix import DOORS
from ..problems import relative_error


PID = diffrax.PIDController(1e-6, 1e-6)
SaveAt, ODETerm = diffrax.SaveAt, diffrax.ODETerm
# Both adjoints, each with a solver that it takes.
ACA = (diffrax.Tsit5(), nodegrad.ACAAdjoint())
REVERSIBLE = (nodegrad.Reversible(diffrax.Tsit5()), nodegrad.ReversibleAdjoint())


def _decay(t, y, args):
    return -y


def _solve(door, method=ACA, terms=_decay, **overrides):
    solver, adjoint = method
    if callable(terms) and not isinstance(terms, diffrax.AbstractTerm):
        terms = ODETerm(terms)
    arguments = dict(
        solver=solver,
        t0=0.0,
        t1=1.0,
        dt0=0.05,
        y0=jnp.ones(2),
        args=None,
        adjoint=adjoint,
        max_steps=256,
    )
    return DOORS[door](terms, **{**arguments, **overrides})


# Refused while the solve is traced, by the native door.


def _key_error(t, y, args):
    raise KeyError(t)


_COMPLEX = jnp.ones((2, 2), complex)
REFUSED = {
    # The vector field.
    "field of another shape": (
        dict(terms=lambda t, y, a: jnp.ones(3)),
        r"expected \(2",
    ),
    "field of one number": (dict(terms=lambda t, y, a: -y[:1]), r"expected \(2"),
    "field of another tree": (
        dict(terms=lambda t, y, a: {"a": y}),
        "structure of `y0`",
    ),
    "field without result": (dict(terms=lambda t, y, a: None), "structure of `y0`"),
    "field of strings": (dict(terms=lambda t, y, a: "x"), "must return numbers and"),
    "complex field": (
        dict(terms=lambda t, y, a: y.astype(complex)),
        "pass a complex `y0`",
    ),
    "complex field of products": (
        dict(terms=lambda t, y, a: _COMPLEX @ (_COMPLEX @ y)),
        "pass a complex `y0`",
    ),
    "terms are a number": (dict(terms=3.0), r"`terms` must be a vector field `f\(t, y"),
    "terms are nothing": (dict(terms=None), "`terms` must be a vector field"),
    # The state.
    "state is a string": (dict(y0="state"), "Every leaf of `y0` must be a number"),
    "state has a function": (dict(y0=(1.0, jnp.sin)), "belongs into `args`"),
    "state is a key": (dict(y0=jr.key(0)), "Every leaf of `y0` must be a number"),
    "state is empty": (dict(y0=()), r"`y0` must hold at least one .* got \(\)"),
    "state is missing": (dict(y0=None), "`y0` must hold at least one .* got None"),
    "batch of scalars": (dict(y0=1.0, batched=True), "leading batch axis"),
    "batches of two sizes": (
        dict(y0={"a": jnp.ones(2), "b": jnp.ones(3)}, batched=True),
        "leading batch axis",
    ),
    # Times.
    "dt0 points away": (dict(dt0=-0.1), r"`dt0` must point from.*dt0=-0\.1"),
    "dt0 points away, backwards": (dict(t1=-1.0), "it is negative"),
    "dt0 is zero": (dict(dt0=0.0), "must not be zero"),
    "dt0 is NaN": (dict(dt0=math.nan), "`dt0` must point from.*dt0=nan"),
    "dt0 is a vector": (dict(dt0=jnp.ones(1)), r"must be a scalar; got shape \(1,\)"),
    "dt0 is a string": (dict(dt0="small"), "`dt0` must be a real number; got 'small'"),
    "dt0 is missing": (dict(dt0=None), "please pass a value for `dt0`"),
    "t0 is missing": (dict(t0=None), "`t0` must be a real number; got None"),
    "t0 is complex": (dict(t0=1j), "must be real numbers"),
    "t0 is NaN": (dict(t0=math.nan), "`t0` must be a finite number; got nan"),
    "t1 is infinite": (dict(t1=math.inf), "`t1` must be a finite number; got inf"),
    "t1 is a vector": (dict(t1=jnp.ones(2)), "scalars, also with `batched=True`"),
    # Outputs.
    "ts unordered": (dict(saveat=SaveAt(ts=[0.5, 0.2])), r"ordered.*ts\[1\] = 0.2"),
    "ts outside": (dict(saveat=SaveAt(ts=[0.5, 1.2])), r"between.*ts\[1\] = 1.2"),
    "ts is NaN": (dict(saveat=SaveAt(ts=[0.5, math.nan])), r"ts\[1\] = nan"),
    "ts is a matrix": (
        dict(saveat=SaveAt(ts=jnp.ones((1, 2)))),
        "one sequence of times",
    ),
    "ts is complex": (dict(saveat=SaveAt(ts=[0.5j])), "must be real numbers"),
    "ts forwards in a solve backwards": (
        dict(t1=-1.0, dt0=-0.1, saveat=SaveAt(ts=[-0.5, -0.2])),
        r"ordered from `t0` to `t1`.*ts\[1\]",
    ),
    "steps is negative": (dict(saveat=SaveAt(steps=-1)), r"`SaveAt\(steps=...\)`"),
    "fn of strings": (
        dict(saveat=SaveAt(t1=True, fn=lambda t, y, a: "x")),
        r"`SaveAt\(fn=...\)` must return numbers",
    ),
    "saveat is a time": (dict(saveat=0.5), "an instance of `diffrax.SaveAt`"),
    "solver state": (dict(saveat=SaveAt(t1=True, solver_state=True)), "diffeqsolve"),
    # Solver, controller, adjoint and the bound on the steps.
    "solver is a class": (dict(solver=diffrax.Tsit5), "instance of `diffrax.Abstract"),
    "controller is a number": (
        dict(stepsize_controller=0.1),
        "`stepsize_controller` must be an instance",
    ),
    "solver without tolerances": (
        dict(solver=diffrax.Kvaerno3()),
        "PIDController.*or pass `root_finder=",
    ),
    "rtol is negative": (
        dict(stepsize_controller=diffrax.PIDController(-1e-3, 1e-3)),
        "`rtol` of the controller must not be negative or NaN; got -0.001",
    ),
    "atol of a clipped controller is NaN": (
        dict(
            stepsize_controller=diffrax.ClipStepSizeController(
                diffrax.PIDController(1e-3, math.nan), step_ts=jnp.array([0.5])
            )
        ),
        "`atol` of the controller must not be negative or NaN; got nan",
    ),
    "throw is a string": (dict(throw="no"), "`throw` must be `True` or `False`"),
    "batched is a number": (dict(batched=1), "`batched` must be `True` or `False`"),
    "adjoint is a class": (dict(adjoint=nodegrad.ACAAdjoint), "takes a `nodegrad.ACA"),
    "ImplicitAdjoint": (
        dict(adjoint=diffrax.ImplicitAdjoint()),
        r"work in `diffrax.diffeqsolve\(..., adjoint=...\)` alone",
    ),
    "BacksolveAdjoint": (dict(adjoint=diffrax.BacksolveAdjoint()), "diffeqsolve"),
    "DirectAdjoint": (dict(adjoint=diffrax.DirectAdjoint()), "diffeqsolve"),
    "solver that cannot be undone": (
        dict(adjoint=nodegrad.ReversibleAdjoint()),
        r"nodegrad.Reversible\(Tsit5\(\)\)",
    ),
    "max_steps is zero": (dict(max_steps=0), "positive Python integer"),
    "max_steps is a float": (dict(max_steps=2.5), "positive Python integer"),
    "max_steps is an array": (dict(max_steps=jnp.array(9)), "positive Python integer"),
    "steps without a bound": (
        dict(max_steps=None, saveat=SaveAt(steps=True)),
        "max_steps",
    ),
    "dense without a bound": (
        dict(max_steps=None, saveat=SaveAt(dense=True)),
        "max_steps",
    ),
    # Arguments that only Diffrax has, and a misspelt one.
    "event": (dict(event=None), r"`diffrax.diffeqsolve\(..., event=..., adjoint="),
    "progress meter": (
        dict(progress_meter=diffrax.NoProgressMeter()),
        r"`diffrax.diffeqsolve\(..., progress_meter=..., adjoint=",
    ),
    "misspelt": (dict(save_at=None), "has no argument `save_at`.$"),
    "rtol": (dict(rtol=1e-3), "Tolerances belong to the controller"),
    "times of SciPy": (dict(t_eval=[1.0]), r"`saveat=diffrax.SaveAt\(ts=...\)`"),
}
# What Diffrax leaves to the adjoint, and so to nodegrad.
REFUSED_BY_BOTH = [
    "field of another tree",
    "complex field",
    "complex field of products",
    "solver that cannot be undone",
    "max_steps is zero",
    "max_steps is a float",
    "max_steps is an array",
]


@pytest.mark.parametrize(
    "name, door",
    [
        *((name, "native") for name in REFUSED),
        *((name, "diffrax") for name in REFUSED_BY_BOTH),
    ],
)
def test_a_solve_is_refused_by_name(name, door):
    overrides, words = REFUSED[name]
    if door == "diffrax" and name == "field of another tree":
        # These are the words of Diffrax.
        words = "same structure as `y0`"
    with pytest.raises((ValueError, TypeError), match=words):
        # As most users have it. Under strict promotion, Diffrax refuses some of these.
        with jax.numpy_dtype_promotion("standard"):
            _solve(door, **overrides)


@pytest.mark.parametrize("door", DOORS)
def test_exceptions_of_the_vector_field_pass_through(door):
    with pytest.raises(KeyError):
        _solve(door, terms=_key_error)


def test_an_adaptive_solve_with_a_method_without_error_estimate_is_refused():
    with pytest.raises(RuntimeError, match="error estimates"):
        _solve("native", solver=nodegrad.RK4(), stepsize_controller=PID)


# Second derivatives along a solve, and the optimiser.


def _blocks(**overrides):
    arguments = dict(
        terms=lambda t, y, a: -a * y,
        solver=diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=0.25,
        y0=jnp.ones(1),
        args=jnp.array(1.0),
        terminal_cost=lambda y: jnp.sum(y**2),
    )
    return nodegrad.hessian_blocks(**{**arguments, **overrides})


PARAMS = {"w": jnp.ones(2), "t1": jnp.array(1.0)}
MLP = {"layer": eqx.nn.Linear(1, 1, key=jr.PRNGKey(0))}


def _end_time(params):
    return params["t1"]


def _time(**settings):
    return nodegrad.terminal_time(_end_time, **{"penalty": 0.1, **settings})


def _update(optim, model, updates):
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    return optim.update(updates, state)


OTHERS = {
    "blocks, t1 is NaN": (lambda: _blocks(t1=math.nan), "`t1` must be a finite"),
    "blocks, dt0 is zero": (lambda: _blocks(dt0=0.0), "must not be zero"),
    "blocks, state": (lambda: _blocks(y0="x"), "Every leaf of `y0`"),
    "blocks, terms": (lambda: _blocks(terms=3.0), "`terms` must be a vector field"),
    "blocks, solver": (lambda: _blocks(solver=diffrax.Tsit5), "instance of `diffrax"),
    "blocks, max_steps": (lambda: _blocks(max_steps=2.5), "positive Python integer"),
    "blocks, saved time is NaN": (
        lambda: _blocks(ts=[0.5, math.nan]),
        r"ts\[1\] = nan",
    ),
    "hvp, integers": (
        lambda: nodegrad.hvp(jnp.sum, jnp.array([1]), jnp.array([1])),
        "must hold floating point arrays",
    ),
    "hvp, no vector": (
        lambda: nodegrad.hvp(jnp.sum, jnp.ones(2), None),
        "`v` must have the structure",
    ),
    "snopt, damping": (
        lambda: nodegrad.scale_by_snopt(damping="high"),
        "`damping` must be a real number; got 'high'",
    ),
    "snopt, NaN": (
        lambda: nodegrad.scale_by_snopt(decay=math.nan),
        "`decay` must be in",
    ),
    "snopt, other layers": (
        lambda: _update(nodegrad.scale_by_snopt(), MLP, {"w": jnp.ones(2)}),
        r"none of the layers \[.*layer.*pass trees of one structure",
    ),
    "snopt, curvature": (
        lambda: nodegrad.scale_by_snopt().update(
            MLP, nodegrad.scale_by_snopt().init(MLP), curvature=[1]
        ),
        "`curvature` must be a dictionary",
    ),
    "steps, kind": (
        lambda: nodegrad.make_steps(optax.sgd(0.1), jnp.sum, kind="newton"),
        "`kind` must be one of",
    ),
    "time, update_every": (
        lambda: _time(update_every=2.5),
        "`update_every` must be an integer; got 2.5",
    ),
    "time, bounds": (lambda: _time(bounds=(1.0,)), r"`bounds` must be a pair \(low"),
    "time, penalty": (lambda: _time(penalty="x"), "`penalty` must be a real number"),
    "time, end": (
        lambda: _time().init({**PARAMS, "t1": jnp.array(1)}),
        "floating point scalar array",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_is_refused_by_name(name):
    call, words = OTHERS[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# Times that are known only when the solve runs: a result for every sample.


@pytest.mark.rows(test=1, ci=2)
@pytest.mark.parametrize("door", DOORS)
def test_a_time_of_nan_is_no_success(door):
    def solve(t1):
        sol = _solve(door, t1=t1, dt0=None, stepsize_controller=PID, throw=False)
        return sol.ys[0, 0], sol.result == diffrax.RESULTS.successful

    ys, okay = jax.jit(jax.vmap(solve))(jnp.array([1.0, math.nan]))
    assert okay.tolist() == [True, False]
    assert jnp.allclose(ys[0], math.exp(-1), atol=1e-5)


@pytest.mark.parametrize(
    "times, words",
    [
        (dict(dt0=-0.1), "must point from"),
        (dict(saveat=SaveAt(ts=jnp.array([0.5, 0.2]))), "ordered"),
        (dict(saveat=SaveAt(ts=jnp.array([0.5, math.nan]))), "between"),
    ],
)
@pytest.mark.rows(test=0, ci=1)
def test_wrong_times_are_refused_when_the_solve_runs(times, words):
    solve = eqx.filter_jit(lambda **times: _solve("native", **times).ys)
    arrays = {k: jnp.asarray(x) if k == "dt0" else x for k, x in times.items()}
    with pytest.raises(RuntimeError, match=words):
        jax.block_until_ready(solve(**arrays))


# Right. Each row returns what was found, what is expected, and a tolerance.


def _promoted(solve):
    """Integer and boolean states and times are promoted as in Diffrax."""
    y0 = {"a": 2, "b": True, "c": [np.ones(1)]}
    field = lambda t, y, a: jax.tree.map(jnp.negative, y)
    sol = solve(t0=0, t1=True, y0=y0, terms=field)
    factor = math.exp(-1)
    found = [sol.ys["a"][0], sol.ys["b"][0], sol.ys["c"][0][0, 0]]
    return found, [2 * factor, factor, factor], 1e-8


def _one_number(solve):
    """A vector field that returns a Python number is broadcast to the state."""

    def loss(y0):
        return jnp.sum(solve(terms=lambda t, y, a: 2.0, y0=y0).ys ** 2)

    return jax.grad(loss)(jnp.ones(2)), jnp.full(2, 6.0), 1e-12


def _constants(solve):
    """Leaves of `args` that are no floating point arrays, and unused ones."""
    args = dict(k=jnp.array(0.7), n=jnp.array(2), on=True, name="x", none=None)
    args = {**args, "f": jnp.sin, "empty": jnp.zeros(0), "unused": jnp.ones(2)}
    sign = lambda a: -1.0 if a["on"] else 1.0
    field = lambda t, y, a: sign(a) * a["k"] * a["n"].astype(float) * y
    params, static = eqx.partition(args, eqx.is_inexact_array)

    def loss(params):
        sol = solve(terms=field, args=eqx.combine(params, static))
        return jnp.sum(sol.ys)

    # d/dk of 2 exp(-2 k)
    slope, curve = -4 * math.exp(-1.4), 8 * math.exp(-1.4)
    grad = jax.grad(loss)(params)
    product = nodegrad.hvp(loss, params, jax.tree.map(jnp.ones_like, params))
    assert jax.tree.structure(grad) == jax.tree.structure(params)
    assert not grad["unused"].any() and not product["unused"].any()
    return [grad["k"], product["k"]], [slope, curve], 1e-6


def _empty(solve):
    """Leaves without numbers, and of size zero."""
    y0 = (jnp.zeros(0), None, jnp.array([2.0]))
    field = lambda t, y, a: jax.tree.map(jnp.negative, y)
    loss = lambda y0: jnp.sum(solve(terms=field, y0=y0).ys[2])
    grad = jax.grad(loss)(y0)
    assert grad[0].shape == (0,) and grad[1] is None
    return grad[2], jnp.array([math.exp(-1)]), 1e-5


def _tiny_steps(solve):
    """Steps of 1e-12 in float32 do not jump to `t1` (diffrax#657)."""
    ts = jnp.linspace(0, 1e-9, 6, dtype=jnp.float32)

    def loss(rate):
        sol = solve(
            t0=ts[0], t1=ts[-1], dt0=None, y0=jnp.ones(1, jnp.float32), args=rate,
            terms=lambda t, y, r: -r * y, stepsize_controller=diffrax.StepTo(ts),
        )  # fmt: skip
        return sol.ys[0, 0], sol.stats["num_accepted_steps"]

    grad, steps = jax.grad(loss, has_aux=True)(jnp.float32(1e9))
    assert steps == 5
    return grad * 1e9, jnp.float32(-math.exp(-1)), 1e-4


def _fast_time(solve):
    """A time scale of 1e-10 (diffrax#632)."""
    tau = 1e-10

    def loss(rate):
        sol = solve(t1=tau, dt0=tau / 20, args=rate, terms=lambda t, y, r: -r * y)
        return sol.ys[0, 0]

    return jax.grad(loss)(1 / tau) / tau, -math.exp(-1), 1e-6


def _late(solve):
    """A least step size far from the origin of time (diffrax#703)."""
    t0 = 967.1378944377053
    pid = diffrax.PIDController(1e-3, 1e-3, dtmin=0.2)

    def loss(y0):
        sol = solve(t0=t0, t1=t0 + 1, dt0=None, y0=y0, stepsize_controller=pid)
        return jnp.sum(sol.ys)

    return jax.grad(loss)(jnp.ones(2)), jnp.full(2, math.exp(-1)), 1e-2


def _tight(solve):
    """Tolerances below the precision of float32: the precision of float32."""

    def loss(y0):
        sol = solve(
            t0=jnp.float32(0), t1=jnp.float32(1), dt0=None, y0=y0, max_steps=4096,
            stepsize_controller=diffrax.PIDController(1e-10, 1e-10),
        )  # fmt: skip
        return jnp.sum(sol.ys)

    grad = jax.grad(loss)(jnp.ones(2, jnp.float32))
    return grad, jnp.full(2, math.exp(-1), jnp.float32), 1e-5


def _donated(solve):
    """Donated inputs are not read after they were overwritten (torchdiffeq#238)."""

    def loss(y0, rate):
        sol = solve(terms=lambda t, y, r: -r * y, y0=y0, args=rate)
        return jnp.sum(sol.ys)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), donate_argnums=(0, 1))
    value, grads = step(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.7]))
    factor = jnp.exp(-jnp.array([0.5, 0.7]))
    expected = jnp.sum(jnp.array([1.0, 2.0]) * factor)
    return (value, grads), (expected, (factor, -jnp.array([1.0, 2.0]) * factor)), 1e-7


def _nested(solve):
    """A vector field that evaluates the solution of another solve (SciMLSens#1649)."""
    dense = SaveAt(dense=True)

    def loss(rate):
        inner = solve(terms=lambda t, y, r: -r * y, y0=jnp.array(1.0), args=rate,
                       dt0=0.02, saveat=dense)  # fmt: skip
        outer = solve(terms=lambda t, y, r: inner.evaluate(t), y0=jnp.array(0.0),
                       dt0=0.02)  # fmt: skip
        return outer.ys[0]

    # The integral of exp(-r t) over [0, 1] is (1 - exp(-r)) / r.
    r = 0.7
    expected = (math.exp(-r) * (r + 1) - 1) / r**2
    return jax.grad(loss)(r), expected, 1e-5


def _robertson(t, y, k):
    first, second, third = k[0] * y[0], k[1] * y[1] * y[2], k[2] * y[1] ** 2
    return jnp.stack([second - first, first - second - third, third])


def _stiff(solve, **settings):
    """Sensitivities of a stiff problem (diffrax#511), with clipped steps (#654)."""
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(1e-7, 1e-10), step_ts=jnp.array([0.1, 0.25])
    )

    def final(k):
        sol = solve(
            terms=_robertson, solver=diffrax.Kvaerno5(**settings), t1=0.4,
            dt0=1e-4, y0=jnp.array([1.0, 0.0, 0.0]), args=k, max_steps=1024,
            stepsize_controller=controller, throw=False,
        )  # fmt: skip
        return sol.ys[0], sol.result == diffrax.RESULTS.successful

    k = jnp.array([0.04, 1e4, 3e7])
    found, okay = jax.jit(jax.jacrev(final, has_aux=True))(k)
    # The table that the example cvsRoberts_FSA_dns of CVODES prints for t = 0.4.
    table = jnp.array([
        [-3.5595e-01, 9.5483e-08, -1.5833e-11],
        [3.9025e-04, -2.1309e-10, -5.2900e-13],
        [3.5556e-01, -9.5270e-08, 1.6362e-11],
    ])  # fmt: skip
    assert okay or settings
    return jnp.where(okay, found / table, 1.0), jnp.ones((3, 3)), 1e-3


def _few_iterations(solve):
    """A nonlinear solve with too few iterations: right, or no success (diffrax#752)."""
    return _stiff(solve, root_find_max_steps=3)


def _bounces(solve):
    """The mean over samples of the time of an event (diffrax#568)."""
    event = diffrax.Event(lambda t, y, args, **_: y[0], optx.Newton(1e-10, 1e-10))
    fall = lambda t, y, g: jnp.stack([y[1], -g])

    def mean_time(heights, gravity):
        def time(height):
            y0 = jnp.stack([height, jnp.array(0.0)])
            return solve(terms=fall, t1=3.0, y0=y0, args=gravity, event=event).ts[0]

        return jnp.mean(jax.vmap(time)(heights))

    heights, gravity = jnp.array([1.0, 2.0, 4.0]), jnp.array(8.0)
    exact = lambda heights, gravity: jnp.mean(jnp.sqrt(2 * heights / gravity))
    found, expected = (
        jax.grad(f, argnums=(0, 1))(heights, gravity) for f in (mean_time, exact)
    )
    return found, expected, 1e-8


def _operator(solve):
    """Noise given by a linear operator."""
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.PRNGKey(0))

    def loss(scale, solve):
        noise = lambda t, y, a: lx.DiagonalLinearOperator(scale * jnp.ones(2))
        terms = diffrax.MultiTerm(ODETerm(_decay), diffrax.ControlTerm(noise, path))
        return jnp.sum(solve(terms=terms, solver=diffrax.ReversibleHeun()).ys ** 2)

    default = diffrax.Tsit5(), diffrax.RecursiveCheckpointAdjoint()
    reference = ft.partial(_solve, "diffrax", default)
    return jax.grad(loss)(0.3, solve), jax.grad(loss)(0.3, reference), 1e-9


def _nan_of_a_parameter(solve):
    """A failed sample of a batch does not touch the others."""

    def loss(rates):
        one = lambda r: solve(terms=lambda t, y, r: -r * y, args=r, throw=False)
        return jnp.sum(jax.vmap(lambda r: one(r).ys[0, 0])(rates))

    return jax.grad(loss)(jnp.array([0.7, math.nan]))[0], -math.exp(-0.7), 1e-7


def _too_many_steps(solve):
    """A sample with more steps than are recorded does not touch the others."""
    pid = diffrax.PIDController(1e-7, 1e-7)

    def loss(rates, adjoint=None):
        settings = {} if adjoint is None else dict(adjoint=adjoint)
        one = lambda r: solve(
            terms=lambda t, y, r: -r * y * jnp.cos(r * t), args=r, dt0=None,
            stepsize_controller=pid, throw=False, **settings,
        ).ys[0, 0]  # fmt: skip
        return jnp.sum(jax.vmap(one)(rates))

    _, adjoint = solve.args[1]
    few = type(adjoint)(max_recorded_steps=32)
    grad = jax.grad(loss)(jnp.array([0.5, 40.0]), few)
    assert jnp.isnan(grad[1])
    return grad[0], -math.cos(0.5) * math.exp(-math.sin(0.5)), 1e-5


_BOTH = {"aca": ACA, "reversible": REVERSIBLE}
_ROWS = {
    _constants: "both",
    _promoted: "both",
    _tiny_steps: "both",
    _late: "both",
    _one_number: "both",
    _empty: "both",
    _nested: "both",
    _fast_time: "both",
    _donated: "both",
    _operator: "both",
    # The copies of a reversible solver need more steps than float32 allows.
    _tight: "aca",
    # They have a solver of their own, or belong to one door.
    _stiff: "aca",
    _few_iterations: "aca",
    _bounces: "both",
}


def _cases(rows):
    # Methods are outermost, and `rows` takes evenly spaced cases: some of each.
    return [
        pytest.param(row, door, method, id=f"{row.__name__[1:]}, {door}, {name}")
        for name, method in _BOTH.items()
        for door in reversed(DOORS)
        for row, methods in rows.items()
        if methods in ("both", name) and (row, door) != (_bounces, "native")
    ]


@pytest.mark.rows(test=2, ci=6)
@pytest.mark.parametrize("row, door, method", _cases(_ROWS))
def test_an_unusual_input_gives_the_right_value(row, door, method):
    found, expected, tolerance = row(ft.partial(_solve, door, method))
    found, expected = jax.tree.map(jnp.asarray, (found, expected))
    assert relative_error(found, expected) < tolerance


# The case of ci=1 is the first one: a sample that cannot be reconstructed.
@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize(
    "row, door, method",
    sorted(
        _cases({_nan_of_a_parameter: "both", _too_many_steps: "both"}),
        key=lambda case: case.id != "nan_of_a_parameter, diffrax, reversible",
    ),
)
def test_a_sample_without_a_derivative_leaves_the_others_alone(row, door, method):
    found, expected, tolerance = row(ft.partial(_solve, door, method))
    assert relative_error(found, jnp.asarray(expected)) < tolerance


def _noisy(path):
    diffusion = diffrax.ControlTerm(lambda t, y, args: y, path)
    return diffrax.MultiTerm(ODETerm(_decay), diffusion)


@pytest.mark.parametrize("door", DOORS)
def test_steps_that_noise_does_not_allow_are_refused(door):
    key = jr.PRNGKey(0)
    unsafe = _noisy(diffrax.UnsafeBrownianPath((2,), key))
    tree = _noisy(diffrax.VirtualBrownianTree(0.0, 1.0, 0.01, (2,), key))
    # A rejected step of an unsafe path draws another increment: of 2000 solutions of
    # dy = y dw the logarithms had a variance of 0.14, and not of 1.
    clipped = diffrax.ClipStepSizeController(PID, step_ts=jnp.array([0.5]))
    for controller in (PID, clipped):
        with pytest.raises(ValueError, match="UnsafeBrownianPath"):
            _solve(
                door,
                terms=unsafe,
                solver=diffrax.Heun(),
                stepsize_controller=controller,
            )
    with pytest.raises(ValueError, match="Euler's method"):
        solver = diffrax.HalfSolver(diffrax.Euler())
        _solve(door, terms=tree, solver=solver, stepsize_controller=PID)
    with pytest.warns(UserWarning, match="Tsit5.*converg.*Stratonovich"):
        _solve(door, terms=tree)


@pytest.mark.parametrize("door", DOORS)
def test_results_compare_with_those_of_both_libraries(door):
    sol = _solve(door)
    for results in (diffrax.RESULTS, nodegrad.RESULTS):
        assert sol.result == results.successful
        assert results.successful == sol.result
        assert sol.result != results.max_steps_reached
    assert sol.result != nodegrad.RESULTS.coupling_lost


@pytest.mark.parametrize("door", DOORS)
def test_a_loop_may_carry_a_result(door):
    # All items have one type, as those of Diffrax have.
    results = nodegrad.RESULTS

    def first_failure(found, scale):
        sol = _solve(door, y0=scale * jnp.ones(2), max_steps=8, throw=False)
        result = sol.result if door == "native" else results.promote(sol.result)
        return results.where(found == results.successful, result, found), None

    found, _ = jax.lax.scan(first_failure, results.successful, jnp.arange(2.0))
    assert found == diffrax.RESULTS.max_steps_reached
