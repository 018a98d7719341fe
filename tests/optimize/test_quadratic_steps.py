"""`snopt()` without a learning rate among other things: units, chains, idle batches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import nodegrad


X = jr.normal(jr.PRNGKey(0), (64, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.1 * jr.normal(jr.PRNGKey(1), (64,)) + 3


def _squares(model, x, y):
    return (jax.vmap(model)(x)[:, 0] - y) ** 2


def _train(optim, model, batches, loss=_squares, start=None, dtype=None):
    """Returns model, state and losses after training on `batches`."""
    step, refresh = nodegrad.make_steps(optim, loss, moments=True)
    params = eqx.filter(model, eqx.is_inexact_array)
    state, values = optim.init(params) if start is None else start, []
    for i, batch in enumerate(batches):
        if dtype is not None:
            batch = [x.astype(dtype) for x in batch]
        run = refresh if i % 10 == 0 else step
        model, state, value = run(model, state, *batch, key=jr.PRNGKey(i))
        values.append(float(value))
    return model, state, np.array(values)


def _linear(dtype=None):
    return eqx.nn.Linear(3, 1, dtype=dtype, key=jr.PRNGKey(2))


@pytest.mark.slow
def test_targets_may_have_any_unit():
    # In float32. The first loss is 5e8.
    unit = 1e4
    batches = 60 * [(X, unit * Y)]
    *_, values = _train(
        nodegrad.snopt(), _linear(jnp.float32), batches, dtype=jnp.float32
    )
    ones = jnp.concatenate([X, jnp.ones((64, 1))], axis=1)
    _, (least, *_), *_ = np.linalg.lstsq(np.asarray(ones), np.asarray(Y))
    assert values[-1] < 1.01 * unit**2 * least / 64


@pytest.mark.slow
def test_a_layer_that_is_not_used_changes_nothing():
    # Names are sorted in a jitted function: the unused layer comes first, or last.
    def losses(unused):
        model = {"m": _linear(), unused: _linear(), "shift": jnp.zeros(())}
        loss = lambda model, x, y: _squares(model["m"], x, y - model["shift"])
        return _train(nodegrad.snopt(), model, 12 * [(X, Y)], loss)[-1]

    assert np.allclose(losses("a"), losses("z"), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_factor_of_the_loss_makes_little_difference(factor):
    # Not none: the directions start with another length.
    model = eqx.nn.MLP(3, 1, 16, 1, jnp.tanh, dtype=jnp.float32, key=jr.PRNGKey(3))
    curved = (X, jnp.sin(2 * X[:, 0]) * X[:, 1])

    def last(factor):
        loss = lambda *args: factor * _squares(*args)
        *_, values = _train(
            nodegrad.snopt(), model, 60 * [curved], loss, dtype=jnp.float32
        )
        return values[-1] / factor

    assert last(factor) < 4 * last(1.0)


@pytest.mark.slow
def test_batches_without_a_gradient_do_not_stop_the_training():
    # The hinge loss of the first task becomes zero, with its gradient.
    hinge = lambda model, x, y: jax.nn.relu(1 - y * jax.vmap(model)(x)[:, 0])
    sign = jnp.where(X[:, 0] > 0, 1.0, -1.0)
    easy = X + sign[:, None] * jnp.array([[1.0, 0.0, 0.0]])
    model, state, values = _train(
        nodegrad.snopt(), _linear(), 120 * [(easy, sign)], hinge
    )
    assert np.all(values[60:] == 0)
    other = jnp.where(X[:, 1] > 0, 1.0, -1.0)
    moved = X + other[:, None] * jnp.array([[0.0, 1.0, 0.0]])
    *_, values = _train(
        nodegrad.snopt(), model, 60 * [(moved, other)], hinge, start=state
    )
    assert values[0] > 0.5
    assert values[-1] < 0.01


def test_the_first_states_can_be_donated():
    optim, params = nodegrad.snopt(), {"w": jnp.ones(3)}
    value = lambda p: jnp.sum(p["w"] ** 2)

    def step(params, state):
        extra = dict(value=value(params), value_fn=value)
        updates, state = optim.update(jax.grad(value)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = optim.init(params)
    new, _ = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert value(new) < 3

    learned = nodegrad.terminal_time(lambda p: p["t1"], penalty=0.1)
    params, slope = {"t1": jnp.array(1.0)}, {"t1": jnp.array(0.1)}
    update = lambda state: learned.update(slope, state, params, grad=slope)[1]
    jax.jit(update, donate_argnums=0)(learned.init(params))


@pytest.mark.slow
def test_complex_parameters_descend():
    class Model(eqx.Module):
        layer: eqx.nn.Linear
        point: jax.Array

    goal = jnp.array(1.0 + 2.0j)

    def loss(model, x, y):
        return _squares(model.layer, x, y) + jnp.abs(model.point - goal) ** 2

    model = Model(_linear(), jnp.array(3.0 - 1.0j))
    for optim in (nodegrad.snopt(), optax.sgd(0.1)):
        found, *_ = _train(optim, model, 150 * [(X, Y)], loss)
        assert jnp.abs(found.point - goal) < 0.02


@pytest.mark.slow
def test_the_model_is_one_of_the_loss_whatever_comes_before():
    # A transformation of the gradients changes the direction, and not its slope.
    batches, ends = 40 * [(X, Y)], []
    for before in (optax.identity(), optax.scale(0.5), optax.clip_by_global_norm(0.1)):
        optim = optax.chain(before, nodegrad.snopt())
        *_, values = _train(optim, _linear(), batches)
        assert np.all(np.diff(values) <= 0.01 * values[:-1])
        ends.append(values[-1])
    assert max(ends) < 1.1 * min(ends)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)])
def test_parameters_are_frozen_by_gradients_of_zero(names):
    model = eqx.nn.MLP(3, 1, 8, 1, jnp.tanh, key=jr.PRNGKey(3))
    frozen = jax.tree.map(lambda _: False, eqx.filter(model, eqx.is_inexact_array))
    first = lambda m: [getattr(m.layers[0], name) for name in names]
    frozen = eqx.tree_at(first, frozen, len(names) * [True])
    optim = optax.chain(optax.masked(optax.set_to_zero(), frozen), nodegrad.snopt())
    found, _, values = _train(optim, model, 60 * [(X, Y)])
    assert eqx.tree_equal(first(found), first(model))
    assert values[-1] < values[0] / 2

    masked = optax.masked(nodegrad.snopt(), jax.tree.map(lambda x: not x, frozen))
    with pytest.raises(ValueError, match=r"To freeze parameters.*set_to_zero"):
        masked.init(eqx.filter(model, eqx.is_inexact_array))
