"""How far the parameters scatter around their mean, and what that does to the steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import nodegrad
from nodegrad._optimize import quadratic_steps
from nodegrad._optimize.quadratic_model import after_batch, after_step, Progress, trust


WIDTH = 8
TRUE = jr.normal(jr.PRNGKey(0), (1, WIDTH))


def _losses(model, x, y):
    return jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1)


def _batch(key, size):
    """Samples with noise as large as the part that can be learned."""
    first, second = jr.split(key)
    x = jr.normal(first, (size, WIDTH))
    return x, x @ TRUE.T + 2 * jr.normal(second, (size, 1))


def _excess(model):
    """The expected loss of new samples, less the least possible one."""
    return float(jnp.sum((model.weight - TRUE) ** 2) + jnp.sum(model.bias**2))


def _averaged(model, state):
    return eqx.combine(state.progress.average, model)


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


@pytest.mark.slow
def test_slopes_of_a_whole_set_count_wholly():
    batch = _batch(jr.PRNGKey(2), 64)
    # Later the mean has caught up, and what is left is rounding.
    for _, state in _train([batch] * 12):
        assert trust(state.progress) == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 256])
def test_the_excess_is_that_of_the_expected_loss(size):
    batches = [_batch(jr.PRNGKey(i), size) for i in range(400)]
    found, true, before = [], [], None
    for i, (model, state) in enumerate(_train(batches)):
        # After the descent. The excess was estimated where the step started.
        if i > 50:
            found.append(state.progress.excess)
            true.append(_excess(before[0]) - _excess(_averaged(*before)))
        before = model, state
    # Both are means of 350 numbers that depend on each other.
    assert np.mean(true) > 0
    np.testing.assert_allclose(np.mean(found), np.mean(true), rtol=0.2)


def test_the_average_is_the_running_mean_of_the_parameters():
    batches = [_batch(jr.PRNGKey(i), 16) for i in range(60)]
    average = None
    for i, (model, state) in enumerate(_train(batches)):
        if average is None:
            average = np.asarray(model.weight)
        else:
            # Step `i` is the `i`-th one: its weight is 5/6, 5/7, ..., at least 1/10.
            rate = max(0.1, 5 / (5 + i))
            average = average + rate * (np.asarray(model.weight) - average)
        kept = _averaged(model, state).weight
        np.testing.assert_allclose(kept, average, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_small_batches_are_not_fitted_one_by_one(monkeypatch):
    def final(num_seeds=3):
        """Median excesses at the end: of the parameters, and of their mean."""
        runs = []
        for seed in range(num_seeds):
            keys = jr.split(jr.PRNGKey(100 + seed), 100)
            *_, last = _train([_batch(k, 16) for k in keys])
            runs.append([_excess(last[0]), _excess(_averaged(*last))])
        return np.median(runs, axis=0)

    own, of_mean = final()
    assert of_mean < 0.8 * own
    monkeypatch.setattr(quadratic_steps, "trust", lambda progress: jnp.ones(()))
    assert own < 0.5 * final()[0]


def _progress(**changes):
    """Of one parameter: the loss fell from 3 to 1, and the mean is the minimum."""
    numbers = {"excess": 0.0, "level": 1.0, "start": 3.0} | changes
    return Progress(jnp.zeros(1), **{k: jnp.array(x) for k, x in numbers.items()})


@pytest.mark.parametrize(
    ("excess", "expected"),
    # The loss at the mean is lower by the excess: it fell by 2 and the excess.
    [(-1.0, 1), (0.0, 1), (0.03, 1), (0.12, 0.03 * 2.12 / 0.12), (1.0, 0.15)],
)
def test_slopes_count_less_where_the_excess_is_a_large_part_of_the_fall(
    excess, expected
):
    np.testing.assert_allclose(trust(_progress(excess=excess)), expected, rtol=1e-6)


def test_slopes_count_least_where_the_loss_rose():
    np.testing.assert_allclose(trust(_progress(excess=0.1, level=4.0)), 0.15, rtol=1e-6)


def test_the_excess_of_a_quadratic_loss_is_exact():
    # The loss 4 w^2, at 0.5: its gradient is 4, and the excess 1.
    args = jnp.array([0.5]), jnp.array([4.0]), jnp.array(2.0)
    new = after_batch(_progress(), *args, jnp.array(100))
    np.testing.assert_allclose([new.excess, new.level, new.start], [0.1, 1.1, 3.0])
    # In the beginning the last steps count more, and the start is the mean of all.
    new = after_batch(_progress(), *args, jnp.array(4))
    np.testing.assert_allclose([new.excess, new.level, new.start], [0.5, 1.5, 2.8])
    moved = after_step(new, jnp.array([0.5]), jnp.array(4))
    np.testing.assert_allclose(moved.average, [0.25])
