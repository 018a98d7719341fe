"""The two jitted steps."""

import inspect

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import nodegrad

from ..problems import relative_error


X = jr.normal(jr.PRNGKey(1), (6, 2), jnp.float32)
Y = jnp.sin(X)


def _model():
    make = lambda: eqx.nn.MLP(
        2, 2, 8, 1, activation=jnp.tanh, key=jr.PRNGKey(0), dtype=jnp.float32
    )
    return make()


def predict(model, x, y):
    del y
    zero, end = jnp.float32(0), jnp.float32(1)
    return nodegrad.odesolve(
        lambda t, y, args: model(y), diffrax.Heun(), zero, end, jnp.float32(0.25), x,
        batched=True, max_steps=8,
    ).ys[:, 0]  # fmt: skip


def square(out, x, y):
    del x
    return jnp.sum((out - y) ** 2, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empirical_fisher", "ggn"])
def test_both_steps_descend_and_are_compiled_once(kind):
    traces = []

    def loss(model, x, y):
        traces.append(1)
        return square(predict(model, x, y), x, y)

    def traced_predict(model, x, y):
        traces.append(1)
        return predict(model, x, y)

    if kind == "ggn":
        optim = nodegrad.snopt(jnp.float32(0.3))
        steps = nodegrad.make_steps(
            optim, square, predict=traced_predict, kind="ggn", moments=True
        )
    else:
        optim = nodegrad.snopt(jnp.float32(0.1), "paper")
        steps = nodegrad.make_steps(optim, loss)
    model = _model()
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    values, counts = [], []
    for i in range(24):
        run = steps.refresh if i % 5 == 0 else steps.step
        model, state, value = run(model, state, X, Y, key=jr.PRNGKey(i))
        values.append(float(value))
        counts.append(len(traces))
    assert values[-1] < values[0] / 2
    assert counts[1] == counts[-1]


@pytest.mark.slow
def test_steps_without_curvature_are_those_of_the_optimiser():
    loss = lambda model, x, y: (square(predict(model, x, y), x, y), "aux")
    optim = optax.adam(1e-2)
    steps = nodegrad.make_steps(optim, loss, has_aux=True)
    model = _model()
    params = eqx.filter(model, eqx.is_inexact_array)
    with jax.numpy_dtype_promotion("standard"):
        new, _, (value, aux) = steps.step(model, optim.init(params), X, Y)
        mean = lambda m: jnp.mean(loss(m, X, Y)[0])
        expected, grads = eqx.filter_value_and_grad(mean)(model)
        updates, _ = optim.update(grads, optim.init(params), params)
    assert aux == "aux"
    assert relative_error(value, expected) < 1e-6
    change = jax.tree.map(jnp.subtract, eqx.filter(new, eqx.is_inexact_array), params)
    assert relative_error(change, updates) < 1e-3


def test_options_are_those_of_the_curvature():
    ours, of_curvature = (
        inspect.signature(fn).parameters
        for fn in (nodegrad.make_steps, nodegrad.value_grad_and_curvature)
    )
    assert list(ours)[1:] == list(of_curvature)
    assert all(ours[name] == option for name, option in of_curvature.items())
    with pytest.raises(TypeError, match="make_steps.*unexpected.*'batchsize'"):
        nodegrad.make_steps(optax.sgd(0.1), square, batchsize=3)


@pytest.mark.slow
@pytest.mark.parametrize("has_aux", [False, True])
def test_every_option_reaches_the_curvature(has_aux):
    seen = []

    def update(grads, state, params=None, *, curvature=None, **extra):
        seen.append(curvature)
        return jax.tree.map(jnp.zeros_like, grads), state

    outputs = lambda model, x, y: jax.vmap(model)(x)
    if has_aux:
        outputs = lambda model, x, y: (jax.vmap(model)(x), "aux")
    options = dict(
        predict=outputs,
        kind="ggn",
        reduction="expand",
        num_draws="exact",
        moments=True,
        batch_size=6,
        layers=lambda path: "[1]" in path,
        has_aux=has_aux,
    )
    optim = optax.GradientTransformationExtraArgs(lambda params: (), update)
    steps = nodegrad.make_steps(optim, square, **options)
    curved = nodegrad.value_grad_and_curvature(square, **options)
    _, _, curvature = curved(_model(), X, Y, key=jr.PRNGKey(0))
    with jax.disable_jit():
        _, _, value = steps.refresh(_model(), (), X, Y, key=jr.PRNGKey(0))
    assert isinstance(value, tuple) == has_aux
    assert relative_error(seen[0], curvature) < 1e-6
