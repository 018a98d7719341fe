"""The share of a slope that the next batch confirms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import nodegrad
from nodegrad._optimize import quadratic_steps
from nodegrad._optimize.quadratic_model import after_step, Agreement, updated_share


WIDTH = 8
TRUE = jr.normal(jr.PRNGKey(0), (1, WIDTH))


def _losses(model, x, y):
    return jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1)


def _batch(key, size):
    """Samples with noise as large as the part that can be learned."""
    first, second = jr.split(key)
    x = jr.normal(first, (size, WIDTH))
    return x, x @ TRUE.T + 2 * jr.normal(second, (size, 1))


def _ravelled(layer):
    return np.append(np.asarray(layer.weight)[0], np.asarray(layer.bias))


def _expected_gradient(model):
    """The gradient of the expected loss of a new sample."""
    return 2 * (_ravelled(model) - np.append(np.asarray(TRUE)[0], 0))


def _excess(model):
    """The expected loss of new samples, less the least possible one."""
    return float(jnp.sum((model.weight - TRUE) ** 2) + jnp.sum(model.bias**2))


def _train(batches):
    """Yields `(model, state)` before training, and after every step."""
    optim = nodegrad.snopt()
    step, refresh = nodegrad.make_steps(optim, _losses, moments=True)
    model = eqx.nn.Linear(WIDTH, 1, key=jr.PRNGKey(1))
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    yield model, state
    for i, batch in enumerate(batches):
        run = refresh if i % 10 == 0 else step
        model, state, _ = run(model, state, *batch, key=jr.PRNGKey(i))
        yield model, state


def test_all_of_a_slope_of_a_whole_set_is_confirmed():
    # The loss is quadratic: the model of it is exact, and all batches are the same.
    batch = _batch(jr.PRNGKey(2), 64)
    # Later the slopes are as small as the rounding of the loss.
    for _, state in _train([batch] * 12):
        np.testing.assert_allclose(state.agreement.share, 1, atol=1e-6)


@pytest.mark.parametrize("size", [16, 256])
def test_the_share_is_that_of_the_slope_which_is_not_noise(size):
    batches = [_batch(jr.PRNGKey(i), size) for i in range(300)]
    found, true, seen, before = [], 0.0, 0.0, None
    for i, (model, state) in enumerate(_train(batches)):
        # After the first descent. Single ratios have tails, a ratio of sums does not.
        if i > 40:
            true += _ravelled(state.agreement.direction) @ _expected_gradient(before)
            seen += state.agreement.slopes[0]
            found.append(state.agreement.share[0])
        before = model
    assert abs(np.mean(found) - true / seen) < 0.05
    assert true / seen < 0.25


@pytest.mark.slow
def test_small_batches_are_not_fitted_one_by_one(monkeypatch):
    def final(num_seeds=3):
        runs = []
        for seed in range(num_seeds):
            keys = jr.split(jr.PRNGKey(100 + seed), 100)
            *_, last = (_excess(m) for m, _ in _train([_batch(k, 16) for k in keys]))
            runs.append(last)
        return np.median(runs)

    shared = final()
    monkeypatch.setattr(quadratic_steps, "trusted", jnp.ones_like)
    assert shared < 0.5 * final()


def test_a_step_that_was_not_taken_changed_no_slope():
    slopes, ones = jnp.array([-2.0]), jnp.ones(1)
    args = ([jnp.zeros(3)], slopes, jnp.array([1.0]), ones)
    taken = after_step(*args, jnp.array(True))
    refused = after_step(*args, jnp.array(False))
    # The new batch has half of the slope: at the start, or at the end of the step.
    for state, slope in ((taken, 0.0), (refused, -1.0)):
        share = updated_share(state, jnp.array([slope]), jnp.array(100))
        np.testing.assert_allclose(share, 1 + 0.1 * (0.5 - 1))


def test_only_slopes_that_descend_and_have_a_model_are_compared():
    state = Agreement(
        jnp.zeros(3),
        jnp.array([0.0, 3.0, -1.0]),
        jnp.array([0.0, 0.0, jnp.nan]),
        jnp.array([0.7, 0.4, 0.6]),
    )
    share = updated_share(state, jnp.ones(3), jnp.array(0))
    np.testing.assert_allclose(share, [0.7, 0.4, 0.6])
