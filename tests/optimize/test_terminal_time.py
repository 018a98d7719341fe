"""Learning the end time: the rule, and the exact derivatives against AD."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import nodegrad

from ..problems import Field, relative_error


PICK = lambda p: p["t1"]


def _field(t, y, params):
    return params(t, y, None) * jnp.cos(t) + 0.1 * t * y


def _problem():
    params = Field(3, 4, jr.PRNGKey(0))
    y0 = jnp.array([0.3, -0.5, 0.9])
    target = jnp.array([1.0, 0.2, -0.4])
    terminal_loss = lambda y: jnp.sum(jnp.cosh(y - target))
    return params, y0, terminal_loss


def _solve(t1, params, y0, field=_field):
    return nodegrad.odesolve(
        field, diffrax.Dopri8(), 0.0, t1, 0.05, y0, params, max_steps=64
    ).ys[0]


@pytest.mark.slow
def test_exact_derivatives_match_automatic_differentiation():
    params, y0, terminal_loss = _problem()
    t1, penalty = jnp.array(1.3), 0.2

    @jax.jit
    def truth(t1, params):
        total = lambda t1, params: (
            terminal_loss(_solve(t1, params, y0)) + penalty / 2 * t1**2
        )
        return jax.jvp(lambda t1: jax.grad(total, (0, 1))(t1, params), (t1,), (1.0,))

    (first, _), (second, mixed) = truth(t1, params)
    ours = jax.jit(
        lambda t1, params: nodegrad.terminal_time_derivatives(
            terminal_loss,
            _field,
            lambda params: _solve(t1, params, y0),
            t1,
            params,
            penalty=penalty,
        )
    )(t1, params)
    assert relative_error(ours.first, first) < 1e-9
    assert relative_error(ours.second, second) < 1e-9
    assert relative_error(ours.mixed, mixed) < 1e-9


@pytest.mark.parametrize(
    ("t1", "dtype"),
    [(1, jnp.float64), (jnp.int32(1), jnp.float64), (jnp.float32(1), jnp.float32)],
)
def test_an_end_time_may_be_an_integer_or_of_float32(t1, dtype):
    # $y = e^{-r t}$, and the loss is $y$.
    solve = lambda rate: jnp.exp(-rate)
    field = lambda t, y, rate: -rate * y
    rate = jnp.array(2.0, dtype)
    out = nodegrad.terminal_time_derivatives(lambda y: y, field, solve, t1, rate)
    # The derivatives of $e^{-r t}$: by t, twice by t, and by t and r.
    expected = jnp.array([-2.0, 4.0, 1.0], dtype) * jnp.exp(jnp.array(-2.0, dtype))
    assert all(x.dtype == dtype for x in out)
    tol = 10 * jnp.finfo(dtype).eps
    assert jnp.allclose(jnp.stack(list(out)), expected, rtol=tol)


def test_a_complex_state_has_real_derivatives():
    # $y = e^{i r t}$, and the loss is its real part, $\cos(r t)$.
    field = lambda t, y, rate: 1j * rate * y
    solve = lambda rate: jnp.exp(1j * rate)
    rate = jnp.array(2.0)
    out = nodegrad.terminal_time_derivatives(jnp.real, field, solve, 1.0, rate)
    sine, cosine = jnp.sin(2.0), jnp.cos(2.0)
    expected = jnp.stack([-2 * sine, -4 * cosine, -sine - 2 * cosine])
    assert jnp.allclose(jnp.stack(list(out)), expected, rtol=1e-13)


def test_a_gradient_with_a_nan_is_left_out():
    params, grads = _make()
    optim = nodegrad.terminal_time(PICK, penalty=0.1, update_every=1)
    state = optim.init(params)
    _, state = optim.update(grads, state, params, grad=grads)
    failed = jax.tree.map(lambda g: jnp.nan * g, grads)
    updates, after = optim.update(failed, state, params, grad=failed)
    assert PICK(updates) == 0
    assert eqx.tree_equal(after, state)


@pytest.mark.slow
def test_running_cost_counts():
    params, y0, terminal_loss = _problem()
    t1 = jnp.array(1.3)
    cost = lambda t, y, params: jnp.sum(y**2) * (1 + t) + jnp.sum(params.first**2)

    def augmented(t, y__q, params):
        y, _ = y__q
        return _field(t, y, params), cost(t, y, params)

    @jax.jit
    def truth(t1, params):
        def total(t1, params):
            y0__q0 = y0, jnp.array(0.0)
            sol = nodegrad.odesolve(
                augmented, diffrax.Dopri8(), 0.0, t1, 0.05, y0__q0, params, max_steps=64
            )
            y1, q1 = sol.ys
            return terminal_loss(y1[0]) + q1[0]

        return jax.jvp(lambda t1: jax.grad(total, (0, 1))(t1, params), (t1,), (1.0,))

    (first, _), (second, mixed) = truth(t1, params)
    ours = nodegrad.terminal_time_derivatives(
        terminal_loss,
        _field,
        lambda params: _solve(t1, params, y0),
        t1,
        params,
        running_cost=cost,
    )
    assert relative_error(ours.first, first) < 1e-9
    assert relative_error(ours.second, second) < 1e-9
    assert relative_error(ours.mixed, mixed) < 1e-9


def _make(t1=2.0):
    params = {"w": jnp.array([1.0, 2.0]), "t1": jnp.array(t1)}
    grads = {"w": jnp.array([0.5, -0.25]), "t1": jnp.array(-0.3)}
    return params, grads


def test_rule_matches_numpy():
    params, _ = _make()
    rate, penalty, decay = 0.2, 0.05, 0.9
    optim = optax.chain(
        optax.sgd(0.1),
        nodegrad.terminal_time(
            PICK, rate, penalty=penalty, decay=decay, update_every=2
        ),
    )
    state, t1 = optim.init(params), float(params["t1"])
    step = jax.jit(lambda g, s, p: optim.update(g, s, p, grad=g))
    first = second = None
    for count in range(1, 6):
        w, slope = np.array([0.5 / count, -0.25]), -0.3 + 0.1 * count
        grads = {"w": jnp.asarray(w), "t1": jnp.asarray(slope)}
        updates, state = step(grads, state, params)
        q_t, q_tt = penalty * t1 + slope, penalty + slope**2
        first = q_t if first is None else decay * first + (1 - decay) * q_t
        second = q_tt if second is None else decay * second + (1 - decay) * q_tt
        if count % 2 == 0:
            feedback = slope * np.dot(w, -0.1 * w)
            t1 = max(t1 - rate * (first + feedback) / second, 0.1)
        params = optax.apply_updates(params, updates)
        assert abs(float(params["t1"]) - t1) < 1e-12
        assert relative_error(updates["w"], -0.1 * w) < 1e-12


def test_it_rests_where_the_slope_balances_the_penalty():
    # loss = exp(-t1): at rest c t1 = exp(-t1).
    params = {"t1": jnp.array(3.0)}
    optim = nodegrad.terminal_time(PICK, 0.3, penalty=0.1, decay=0.5, update_every=1)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.exp(-p["t1"]))(params)
        updates, state = optim.update(grads, state, params, grad=grads)
        return optax.apply_updates(params, updates), state

    state = optim.init(params)
    for _ in range(200):
        params, state = step(params, state)
    t1 = float(params["t1"])
    assert abs(0.1 * t1 - np.exp(-t1)) < 1e-9


def test_bounds_hold():
    params, grads = _make()
    for sign, limit in ((1.0, 1.5), (-1.0, 2.5)):
        grads = {**grads, "t1": jnp.array(1e-6 * sign)}
        optim = nodegrad.terminal_time(
            PICK, 1e9, penalty=1e-12, bounds=(1.5, 2.5), update_every=1
        )
        updates, _ = optim.update(grads, optim.init(params), params, grad=grads)
        assert float(params["t1"] + updates["t1"]) == limit


def test_slopes_of_samples_add_their_variance_to_the_curvature():
    params, grads = _make()
    optim = nodegrad.terminal_time(PICK, penalty=0.1, update_every=1)
    state = optim.init(params)
    slopes = jnp.array([0.1, -0.7])
    grads = {**grads, "t1": jnp.mean(slopes)}
    square = jnp.mean(slopes**2)
    _, alone = optim.update(grads, state, params, grad=grads)
    _, known = optim.update(grads, state, params, grad=grads, squared_slope=square)
    variance = jnp.var(slopes)
    assert relative_error(known.second - alone.second, variance) < 1e-12


def test_steps_of_some_parameters_alone_are_refused():
    params, grads = _make()
    rule = nodegrad.terminal_time(PICK, penalty=0.1)
    mask = jax.tree.map(lambda _: False, params) | {"t1": True}
    optim = optax.masked(rule, mask)
    with pytest.raises(ValueError, match="steps of all parameters"):
        optim.update(grads, optim.init(params), params, grad=grads)


def test_it_lives_with_optax():
    params, grads = _make()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
    schedule = optax.constant_schedule(0.1)
    with jax.numpy_dtype_promotion("standard"):
        optim = optax.chain(
            optax.adam(1e-2), nodegrad.terminal_time(PICK, schedule, penalty=0.1)
        )
        state = optim.init(params)
        updates, new = jax.jit(lambda g, s, p: optim.update(g, s, p, grad=g, other=1))(
            grads, state, params
        )
    assert updates["t1"].dtype == jnp.bfloat16
    types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert types(new) == types(state)
    mapped = optax.tree_utils.tree_map_params(optim, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_injected_hyperparameters_make_no_difference():
    kwargs = dict(learning_rate=0.3, penalty=0.05, update_every=2, decay=0.8)
    optim = nodegrad.terminal_time(PICK, **kwargs)
    inject = optax.inject_hyperparams(nodegrad.terminal_time, static_args="where")
    injected = inject(PICK, **kwargs)
    params, grads = _make()
    state, injected_state = optim.init(params), injected.init(params)
    assert "update_every" in injected_state.hyperparams
    for _ in range(3):
        updates, state = jax.jit(optim.update)(grads, state, params, grad=grads)
        others, injected_state = jax.jit(injected.update)(
            grads, injected_state, params, grad=grads
        )
        assert relative_error(others, updates) < 1e-6


def test_misuse_is_refused():
    params, grads = _make()
    with pytest.raises(ValueError, match="must be positive"):
        nodegrad.terminal_time(PICK, penalty=0.0)
    with pytest.raises(ValueError, match="`bounds` must be"):
        nodegrad.terminal_time(PICK, penalty=0.1, bounds=(2.0, 1.0))
    with pytest.raises(ValueError, match="`update_every`"):
        nodegrad.terminal_time(PICK, penalty=0.1, update_every=0)
    optim = nodegrad.terminal_time(PICK, penalty=0.1)
    state = optim.init(params)
    with pytest.raises(ValueError, match="grad=grads"):
        optim.update(grads, state, params)
    with pytest.raises(ValueError, match="floating point scalar"):
        nodegrad.terminal_time(lambda p: p["w"], penalty=0.1).init(params)
    with pytest.raises(ValueError, match="`t1` must be a scalar"):
        nodegrad.terminal_time_derivatives(jnp.sum, _field, eqx.nn.Identity(),
                                           jnp.ones(2), params)  # fmt: skip
