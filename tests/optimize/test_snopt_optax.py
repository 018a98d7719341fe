"""The optimiser as a citizen of optax: what optax asks of transforms contributed to it.

(The list is that of `optax/contrib/_common_test.py`.)
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import nodegrad
from nodegrad import KroneckerFactors

from ..problems import relative_error


@pytest.fixture(autouse=True)
def standard_promotion():
    # Optax itself does not do without.
    with jax.numpy_dtype_promotion("standard"):
        yield


OPTIMS = {
    "paper": functools.partial(nodegrad.snopt, 0.02, "paper"),
    "robust": functools.partial(nodegrad.snopt, 0.02, momentum=0.9, weight_decay=1e-3),
}
every_optim = pytest.mark.parametrize("name", list(OPTIMS))
KEY = "['layer']"


def make_params(dtype=jnp.float32):
    weight = (jnp.arange(6.0) / 7).reshape(2, 3).astype(dtype)
    layer = eqx.nn.Linear(3, 2, key=jr.PRNGKey(0), dtype=dtype)
    bias = jnp.ones(2, dtype)
    layer = eqx.tree_at(lambda x: (x.weight, x.bias), layer, (weight, bias))
    # With a leaf that is not trained.
    model = {"layer": layer, "scale": jnp.ones(4, dtype), "steps": jnp.array(3)}
    return eqx.filter(model, eqx.is_inexact_array)


def make_curvature(dtype=jnp.float32, scale=1.0):
    a, b = np.diag([1.0, 2.0, 3.0, 4.0]) + 0.1, np.array([[2.0, 0.3], [0.3, 1.0]])
    as_array = lambda x: jnp.asarray(np.asarray(x) * scale, dtype)
    draws = as_array(np.arange(8.0).reshape(1, 2, 4))
    return {KEY: KroneckerFactors(as_array(a), as_array(b), as_array(4.0), draws)}


def objective(params):
    leaves = jax.tree.leaves(params)
    return sum(jnp.sum((x - jnp.ones((), x.dtype)) ** 2) for x in leaves)


def equal(tree, other):
    return all(
        jnp.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


@every_optim
def test_unknown_extra_arguments_are_ignored_and_nothing_recompiles(name):
    optim, traces = OPTIMS[name](), []

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params, state, refresh):
        traces.append(refresh)
        curvature = make_curvature() if refresh else None
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optim.update(
            grads, state, params, curvature=curvature, value=value, unexpected=1
        )
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = optim.init(params)
    structure = jax.tree.structure(state)
    for refresh in (True, False, False, True, False):
        params, state = step(params, state, refresh)
        assert jax.tree.structure(state) == structure
    assert traces == [True, False]


@every_optim
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_are_stable_inside_a_condition(name, dtype):
    dtype = jnp.dtype(dtype)
    optim, params = OPTIMS[name](), make_params(dtype)

    @jax.jit
    def step(params, state, curvature, run):
        grads = jax.grad(objective)(params)
        refresh = lambda: optim.update(grads, state, params, curvature=curvature)
        plain = lambda: optim.update(grads, state, params)
        updates, state_ = jax.lax.cond(run, refresh, plain)
        updates, state = jax.lax.cond(run, lambda: (updates, state_), plain)
        return optax.apply_updates(params, updates), state

    new = params
    # Curvature comes in whatever type it was summed in.
    curvature = make_curvature(jnp.float64)
    state = jax.jit(optim.init)(params)
    for run in (True, False):
        new, new_state = step(new, state, curvature, run)
        types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
        assert types(new) == types(params)
        assert types(new_state) == types(state)
        state = new_state
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.int32, jnp.float32, dtype)


@every_optim
def test_tree_map_params_finds_the_state(name):
    optim, params = OPTIMS[name](), make_params()
    state = optim.init(params)
    same = optax.tree_utils.tree_map_params(optim, lambda x: x, state)
    assert equal(state, same)
    assert jax.tree.structure(state) == jax.tree.structure(same)
    zeros = optax.tree_utils.tree_map_params(optim, jnp.zeros_like, state)
    assert not any(jnp.any(x) for x in jax.tree.leaves(zeros[0].layers))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_injected_hyperparameters_make_no_difference(preset):
    kwargs = dict(learning_rate=0.02, preset=preset, damping=0.1, decay=0.8)
    kwargs.update(factor_decay=0.5, kl_clip=0.1, weight_decay=0.01, power=-0.75)
    optim = nodegrad.snopt(**kwargs)
    injected = optax.inject_hyperparams(nodegrad.snopt)(**kwargs)
    params = make_params()
    grads, curvature = jax.grad(objective)(params), make_curvature()
    state, injected_state = optim.init(params), injected.init(params)
    assert "damping" in injected_state.hyperparams
    for _ in range(2):
        updates, state = jax.jit(optim.update)(
            grads, state, params, curvature=curvature
        )
        others, injected_state = jax.jit(injected.update)(
            grads, injected_state, params, curvature=curvature
        )
        assert relative_error(others, updates) < 1e-5
    assert relative_error(injected_state.inner_state, state) < 1e-5


@pytest.mark.slow
def test_learning_rate_may_be_a_schedule():
    params = make_params()
    grads, curvature = jax.grad(objective)(params), make_curvature()
    updates = []
    for rate in (0.02, optax.constant_schedule(0.02)):
        optim = nodegrad.snopt(rate)
        new, _ = optim.update(grads, optim.init(params), params, curvature=curvature)
        updates.append(new)
    assert relative_error(*updates) < 1e-6


@pytest.mark.slow
@every_optim
def test_gradients_are_accumulated(name):
    optim, params = OPTIMS[name](), make_params()
    steps = optax.MultiSteps(optim, every_k_schedule=2)
    grads, curvature = jax.grad(objective)(params), make_curvature()
    half = jax.tree.map(lambda g: g / 2, grads)
    rest = jax.tree.map(lambda g: 1.5 * g, grads)
    state = steps.init(params)
    # Curvature belongs to the step that emits.
    updates, state = steps.update(half, state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    updates, state = steps.update(rest, state, params, curvature=curvature)
    expected, _ = optim.update(grads, optim.init(params), params, curvature=curvature)
    assert relative_error(updates, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 0.1])
def test_make_steps_passes_curvature_to_accumulated_gradients(rate):
    # `optax.MultiSteps` takes extra arguments, and has no type that says so.
    optim = optax.MultiSteps(nodegrad.snopt(rate), every_k_schedule=2)
    loss = lambda model, x: jnp.sum(jax.vmap(model)(x) ** 2, axis=1)
    step, refresh = nodegrad.make_steps(optim, loss, moments=True)
    model, x = eqx.nn.Linear(3, 2, key=jr.PRNGKey(0)), jnp.eye(3)
    state, values = optim.init(eqx.filter(model, eqx.is_inexact_array)), []
    for i in range(8):
        run = refresh if i % 4 == 1 else step
        model, state, value = run(model, state, x, key=jr.PRNGKey(i))
        values.append(float(value))
    inner = state.inner_opt_state
    inner = inner[0] if rate is not None else inner.preconditioner
    assert [int(layer.num_refreshes) for layer in inner.layers.values()] == [2]
    assert values[-1] < 0.5 * values[0]


@every_optim
def test_infinite_gradients_are_left_to_optax(name):
    optim, params = OPTIMS[name](), make_params()
    guarded = optax.apply_if_finite(optim, max_consecutive_errors=3)
    state = guarded.init(params)
    grads, curvature = jax.grad(objective)(params), make_curvature()
    bad = eqx.tree_at(lambda g: g["scale"], grads, jnp.full(4, jnp.nan, jnp.float32))
    updates, new = guarded.update(bad, state, params, curvature=curvature)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    assert equal(new.inner_state, state.inner_state)
    updates, _ = guarded.update(grads, new, params, curvature=curvature)
    expected, _ = optim.update(grads, optim.init(params), params, curvature=curvature)
    assert relative_error(updates, expected) < 1e-6


def test_masks_and_partitions_see_layers():
    params, curvature = make_params(), make_curvature()
    grads = jax.grad(objective)(params)
    scale = nodegrad.scale_by_snopt("paper")
    expected, _ = scale.update(grads, scale.init(params), curvature=curvature)

    labels = {"layer": "layers", "scale": "rest", "steps": "rest"}
    optim = optax.partition({"layers": scale, "rest": optax.scale(-3.0)}, labels)
    updates, state = optim.update(
        grads, optim.init(params), params, curvature=curvature
    )
    assert relative_error(updates["layer"], expected["layer"]) < 1e-6
    assert relative_error(updates["scale"], -3.0 * grads["scale"]) < 1e-6
    assert updates["steps"] is None

    nowhere = optax.masked(scale, {"layer": False, "scale": True, "steps": True})
    updates, _ = nowhere.update(
        grads, nowhere.init(params), params, curvature=curvature
    )
    assert equal(updates, grads)


def test_state_can_be_saved_and_resumed(tmp_path):
    optim, params = OPTIMS["robust"](), make_params()
    state, grads = optim.init(params), jax.grad(objective)(params)
    _, state = optim.update(grads, state, params, curvature=make_curvature())
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    loaded = eqx.tree_deserialise_leaves(
        tmp_path / "state.eqx", eqx.filter_eval_shape(optim.init, params)
    )
    assert equal(state, loaded)
    assert equal(
        optim.update(grads, state, params), optim.update(grads, loaded, params)
    )


def test_parameters_without_layers_are_left_alone():
    optim = nodegrad.scale_by_snopt()
    params = [jnp.ones((2, 3)), jnp.ones(3)]
    updates, state = optim.update(params, optim.init(params), curvature={})
    assert equal(updates, params)
    assert int(state.count) == 1
