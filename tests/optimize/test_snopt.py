"""The optimiser alone, fed with made-up curvature."""

import functools
import itertools

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


SAMPLES = 8.0


class Model(eqx.Module):
    """A layer with a bias, one without, a convolution, a cell, and something else."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    cell: eqx.nn.GRUCell
    scale: jax.Array
    name: str = eqx.field(static=True, default="model")

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.first = eqx.nn.Linear(4, 3, key=keys[0])
        self.second = eqx.nn.Linear(3, 2, use_bias=False, key=keys[1])
        self.conv = eqx.nn.Conv2d(2, 3, 3, key=keys[2])
        self.cell = eqx.nn.GRUCell(2, 3, key=keys[3])
        self.scale = jnp.ones(5)


SIZES = {
    ".first": (5, 3),
    ".second": (3, 2),
    ".conv": (19, 3),
    ".cell.weight_ih": (2, 9),
    ".cell.weight_hh": (3, 9),
}


def make_params(dtype=jnp.float64):
    params = eqx.filter(Model(jr.PRNGKey(0)), eqx.is_inexact_array)
    return jax.tree.map(lambda x: x.astype(dtype), params)


# NumPy draws what follows: JAX compiles a program for every shape.
def make_curvature(seed, dtype=jnp.float64, draws=3):
    rng = np.random.default_rng(seed)

    def spd(size):
        x = rng.normal(size=(2 * size, size))
        return jnp.asarray(x.T @ x, dtype)

    out = {}
    for name, (d_in, d_out) in SIZES.items():
        drawn = jnp.asarray(rng.normal(size=(draws, d_out, d_in)), dtype)
        weight = jnp.array(SAMPLES, dtype)
        out[name] = KroneckerFactors(spd(d_in), spd(d_out), weight, drawn)
    return out


def make_grads(seed, params):
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, params)


@functools.cache
def jitted(optim):
    return jax.jit(lambda g, s, p, c: optim.update(g, s, p, curvature=c))


def update(optim, grads, state, curvature=None, params=None):
    return jitted(optim)(grads, state, params, curvature)


def matrices(tree):
    """Every layer's matrix, written down by hand."""
    join = lambda layer: jnp.concatenate(
        [layer.weight.reshape(len(layer.weight), -1), layer.bias.reshape(-1, 1)], 1
    )
    return {
        ".first": join(tree.first),
        ".second": tree.second.weight,
        ".conv": join(tree.conv),
        ".cell.weight_ih": tree.cell.weight_ih,
        ".cell.weight_hh": tree.cell.weight_hh,
    }


@pytest.mark.slow
def test_step_matches_the_dense_inverse_of_the_kronecker_product():
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt("paper", moment="kronecker", damping=0.3)
    updates, _ = update(optim, grads, optim.init(params), curvature)
    g, u = matrices(grads), matrices(updates)
    for name, factors in curvature.items():
        a, b = factors.input_factor / SAMPLES, factors.output_factor / SAMPLES
        # Of a matrix read row by row, B G A is (B kron A) vec(G).
        dense = jnp.kron(b, a) + 0.3 * jnp.eye(g[name].size)
        expected = jnp.linalg.solve(dense, g[name].reshape(-1))
        assert relative_error(u[name].reshape(-1), expected) < 1e-9
    untouched = updates.scale, updates.cell.bias, updates.cell.bias_n
    for new, old in zip(
        untouched, (grads.scale, grads.cell.bias, grads.cell.bias_n), strict=True
    ):
        assert jnp.array_equal(new, old)


@pytest.mark.slow
def test_running_moment_matches_numpy_over_seven_steps_with_refreshes():
    params = make_params()
    optim = nodegrad.scale_by_snopt("paper")
    state, moments, bases = optim.init(params), {}, {}
    for step in range(7):
        grads = make_grads(step, params)
        curvature = make_curvature(step) if step in (0, 3, 6) else None
        updates, state = update(optim, grads, state, curvature)
        g, u = matrices(grads), matrices(updates)
        for name in SIZES:
            if curvature is not None:
                a, b, n, _ = curvature[name]
                values_a, basis_a = np.linalg.eigh(np.array(a / n))
                values_b, basis_b = np.linalg.eigh(np.array(b / n))
                moments[name] = np.outer(values_b, values_a)
                bases[name] = basis_b, basis_a
            basis_b, basis_a = bases[name]
            rotated = basis_b.T @ np.array(g[name]) @ basis_a
            moments[name] = 0.75 * moments[name] + 0.25 * SAMPLES * rotated**2
            expected = basis_b @ (rotated / (moments[name] + 0.05)) @ basis_a.T
            assert relative_error(u[name], expected) < 1e-10
            # The moment contains the gradient that it divides.
            largest = 1 / (2 * np.sqrt(0.25 * SAMPLES * 0.05))
            in_basis = basis_b.T @ np.array(u[name]) @ basis_a
            assert np.max(np.abs(in_basis)) <= largest


@pytest.mark.slow
def test_ekfac_follows_the_second_moments_through_changes_of_basis():
    params = make_params()
    optim = nodegrad.scale_by_snopt(kl_clip=jnp.inf, factor_decay=0.8, decay=0.7)
    state, dense, averages = optim.init(params), {}, {}
    for step in range(4):
        grads = make_grads(step, params)
        curvature = make_curvature(step) if step in (0, 2) else None
        updates, state = update(optim, grads, state, curvature)
        g, u = matrices(grads), matrices(updates)
        for name in SIZES:
            layer = state.layers[name]
            basis = np.kron(layer.output_basis, layer.input_basis)
            if curvature is not None:
                a, b, n, draws = curvature[name]
                new = np.array(a / n), np.array(b / n)
                old = averages.get(name, new)
                averages[name] = [
                    0.8 * x + 0.2 * y for x, y in zip(old, new, strict=True)
                ]
                assert relative_error(layer.input_factor, averages[name][0]) < 1e-13
                if name not in dense:
                    dense[name] = np.kron(averages[name][1], averages[name][0])
                # All as a dense matrix, of which the new basis sees the diagonal.
                drawn = draws.reshape(3, -1)
                dense[name] = 0.7 * dense[name] + 0.3 * drawn.T @ drawn / n
                dense[name] = basis @ np.diag(np.diag(basis.T @ dense[name] @ basis))
                dense[name] = dense[name] @ basis.T
            rotated = basis.T @ np.array(g[name]).reshape(-1)
            moment = 0.7 * np.diag(basis.T @ dense[name] @ basis)
            moment = moment + 0.3 * SAMPLES * rotated**2
            dense[name] = basis @ np.diag(moment) @ basis.T
            expected = basis @ (rotated / (moment + 0.1 * moment.mean()))
            assert relative_error(u[name].reshape(-1), expected) < 1e-10


@pytest.mark.slow
def test_great_damping_leaves_the_direction_of_the_gradient():
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt("paper", damping=1e12)
    updates, _ = update(optim, grads, optim.init(params), curvature)
    for name, u in matrices(updates).items():
        assert relative_error(u * 1e12, matrices(grads)[name]) < 1e-8


@pytest.mark.slow
def test_no_decay_and_no_curvature_to_speak_of_divides_by_the_squared_gradient():
    params = make_params()
    identity = {
        name: KroneckerFactors(
            SAMPLES * jnp.eye(d_in), SAMPLES * jnp.eye(d_out), jnp.array(SAMPLES)
        )
        for name, (d_in, d_out) in SIZES.items()
    }
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt("paper", decay=0.0, damping=0.2)
    updates, _ = update(optim, grads, optim.init(params), identity)
    for name, g in matrices(grads).items():
        expected = g / (SAMPLES * g**2 + 0.2)
        assert relative_error(matrices(updates)[name], expected) < 1e-8


@pytest.mark.slow
def test_signs_of_eigenvectors_do_not_matter():
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt("paper")
    _, state = update(optim, grads, optim.init(params), curvature)
    flipped = {
        name: layer._replace(
            input_basis=-layer.input_basis,
            output_basis=layer.output_basis.at[:, 0].multiply(-1),
        )
        for name, layer in state.layers.items()
    }
    expected, _ = update(optim, grads, state)
    updates, _ = update(optim, grads, state._replace(layers=flipped))
    assert relative_error(updates, expected) < 1e-12


def test_undamped_step_is_covariant_under_rescaled_inputs():
    # W x = (W M^-1)(M x): the gradient becomes G M^T, the factor M A M^T.
    curvature = make_curvature(1)[".second"]
    params = {"second": eqx.nn.Linear(3, 2, use_bias=False, key=jr.PRNGKey(0))}
    params = eqx.filter(params, eqx.is_inexact_array)
    m = jr.normal(jr.PRNGKey(5), (3, 3))
    grad = jr.normal(jr.PRNGKey(2), (2, 3))
    optim = nodegrad.scale_by_snopt("paper", moment="kronecker", damping=0.0)
    state, key = optim.init(params), "['second']"

    def step(grad, a):
        grads = eqx.tree_at(lambda p: p["second"].weight, params, grad)
        factors = curvature._replace(input_factor=a)
        updates, _ = optim.update(grads, state, curvature={key: factors})
        return updates["second"].weight

    plain = step(grad, curvature.input_factor)
    rescaled = step(grad @ m.T, m @ curvature.input_factor @ m.T)
    assert relative_error(rescaled @ m, plain) < 1e-8


@pytest.mark.slow
def test_clip_bounds_the_length_of_the_step():
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    free = nodegrad.scale_by_snopt(kl_clip=jnp.inf)
    bound = nodegrad.scale_by_snopt(kl_clip=1e-3)
    u, _ = update(free, grads, free.init(params), curvature)
    v, _ = update(bound, grads, bound.init(params), curvature)
    g, u, v = matrices(grads), matrices(u), matrices(v)
    length = sum(jnp.vdot(u[name], g[name]) for name in SIZES)
    assert jnp.allclose(sum(jnp.vdot(v[name], g[name]) for name in SIZES) ** 2,
                        1e-3 * length)  # fmt: skip
    ratio = jnp.sqrt(1e-3 / length)
    for name in SIZES:
        assert relative_error(v[name], u[name] * ratio) < 1e-12


@pytest.mark.slow
@pytest.mark.rows(test=2, ci=4)
@pytest.mark.parametrize(
    "preset, bad",
    [
        *itertools.product(["paper", "robust"], ["nan", "zero", "inf"]),
        # Only this preset uses the draws.
        ("robust", "nan draws"),
    ],
)
def test_useless_factors_keep_the_old_basis(preset, bad):
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt(preset)
    _, state = update(optim, grads, optim.init(params), curvature)
    a, b, weight, draws = make_curvature(4)[".first"]
    if bad == "nan draws":
        draws = draws.at[0, 0, 0].set(jnp.nan)
    else:
        value = dict(nan=jnp.nan, zero=0.0, inf=jnp.inf)[bad]
        a = jnp.full_like(a, value)
    broken = {**curvature, ".first": KroneckerFactors(a, b, weight, draws)}
    updates, new = update(optim, grads, state, broken)
    old_layer, new_layer = state.layers[".first"], new.layers[".first"]
    for field in ("input_basis", "output_basis", "num_refreshes", "num_samples"):
        assert jnp.array_equal(getattr(old_layer, field), getattr(new_layer, field))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, new)))
    # The others did move on.
    assert int(new.layers[".second"].num_refreshes) == 2


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_a_gradient_with_a_nan_is_forgotten_at_the_next_refresh(preset):
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt(preset)
    _, state = update(optim, grads, optim.init(params), curvature)
    broken = jax.tree.map(lambda g: g * jnp.nan, grads)
    _, state = update(optim, broken, state)
    updates, state = update(optim, grads, state, curvature)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    assert int(state.layers[".first"].num_refreshes) == 2


@pytest.mark.slow
def test_factor_of_rank_one_is_fine():
    params, curvature = make_params(jnp.float32), make_curvature(1)
    one = {
        name: KroneckerFactors(
            1e-12 * jnp.ones((d_in, d_in), jnp.float32),
            1e12 * jnp.ones((d_out, d_out), jnp.float32),
            jnp.float32(SAMPLES),
            curvature[name].draws.astype(jnp.float32),
        )
        for name, (d_in, d_out) in SIZES.items()
    }
    grads = make_grads(2, params)
    for preset in ("paper", "robust"):
        optim = nodegrad.scale_by_snopt(preset)
        updates, state = update(optim, grads, optim.init(params), one)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates))
        assert all(int(s.num_refreshes) == 1 for s in state.layers.values())


def test_without_curvature_it_is_rmsprop():
    params = make_params()
    optim = nodegrad.scale_by_snopt("paper", decay=0.9, damping=1e-8)
    reference = optax.scale_by_rms(0.9, 1e-8, eps_in_sqrt=True)
    state, reference_state = optim.init(params), reference.init(params)
    for step in range(3):
        grads = make_grads(step, params)
        updates, state = update(optim, grads, state)
        expected, reference_state = reference.update(grads, reference_state)
        for name, u in matrices(updates).items():
            assert relative_error(u, matrices(expected)[name]) < 1e-10


def test_curvature_of_some_layers_leaves_the_others():
    params, curvature = make_params(), make_curvature(1)
    optim = nodegrad.scale_by_snopt(layers=lambda key: "cell" not in key)
    state = optim.init(params)
    assert set(state.layers) == {".first", ".second", ".conv"}
    grads = make_grads(2, params)
    updates, state = update(optim, grads, state, {".first": curvature[".first"]})
    counts = {name: int(layer.num_refreshes) for name, layer in state.layers.items()}
    assert counts == {".first": 1, ".second": 0, ".conv": 0}
    assert jnp.array_equal(updates.cell.weight_hh, grads.cell.weight_hh)


def test_frozen_bias_takes_the_part_of_the_factor_that_is_left():
    params, curvature = make_params(), make_curvature(1)
    params = eqx.tree_at(lambda p: p.first.bias, params, None)
    optim = nodegrad.scale_by_snopt("paper", moment="kronecker")
    grads = make_grads(2, params)
    updates, _ = update(optim, grads, optim.init(params), curvature)
    a, b, n, _ = curvature[".first"]
    dense = jnp.kron(b / n, a[:-1, :-1] / n) + 0.05 * jnp.eye(12)
    expected = jnp.linalg.solve(dense, grads.first.weight.reshape(-1))
    assert relative_error(updates.first.weight.reshape(-1), expected) < 1e-9
    assert updates.first.bias is None


@pytest.mark.slow
def test_stacked_layers_are_layers_each():
    make = lambda key: eqx.nn.Linear(4, 3, key=key)
    stacked = eqx.filter_vmap(make)(jr.split(jr.PRNGKey(0), 2))
    stacked = eqx.filter(stacked, eqx.is_array)
    curvature = make_curvature(1), make_curvature(2)
    one, two = (c[".first"] for c in curvature)
    stack = lambda axis: lambda x, y: jnp.stack([x, y], axis)
    both = jax.tree.map(stack(0), one, two)._replace(
        draws=jnp.stack([one.draws, two.draws], 1)
    )
    grads = make_grads(3, stacked)
    optim = nodegrad.scale_by_snopt(kl_clip=jnp.inf)
    updates, _ = optim.update(grads, optim.init(stacked), curvature={"": both})
    for i, factors in enumerate((one, two)):
        at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        expected, _ = optim.update(
            at(grads), optim.init(at(stacked)), curvature={"": factors}
        )
        assert relative_error(at(updates), expected) < 1e-10


def test_snopt_decays_weights_and_has_momentum():
    params, curvature = make_params(), make_curvature(1)
    scale = nodegrad.scale_by_snopt("paper")
    optim = nodegrad.snopt(0.1, "paper", momentum=0.9, weight_decay=0.01)
    state, scale_state = optim.init(params), scale.init(params)
    trace = jax.tree.map(jnp.zeros_like, params)
    for step in range(3):
        grads = make_grads(step, params)
        updates, state = update(optim, grads, state, curvature, params)
        scaled, scale_state = update(scale, grads, scale_state, curvature)
        decayed = jax.tree.map(lambda u, p: u + 0.01 * p, scaled, params)
        trace = jax.tree.map(lambda m, u: 0.9 * m + u, trace, decayed)
        expected = jax.tree.map(lambda m: -0.1 * m, trace)
        assert relative_error(updates, expected) < 1e-12


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(preset="fast"), "`preset` must be one of"),
        (dict(moment="adam"), "`moment` must be one of"),
        (dict(damping_mode="lm"), "`damping_mode` must be"),
        (dict(decay=1.0), r"`decay` must be in \[0, 1\)"),
        (dict(factor_decay=-0.1), "`factor_decay` must be in"),
        (dict(damping=-1.0), "`damping` must not be negative"),
        (dict(power=1.0), "`power` must be negative"),
    ],
)
def test_wrong_settings_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        nodegrad.scale_by_snopt(**kwargs)


def test_curvature_that_does_not_fit_is_refused():
    params, curvature = make_params(), make_curvature(1)
    grads = make_grads(2, params)
    optim = nodegrad.scale_by_snopt()
    state = optim.init(params)
    with pytest.raises(ValueError, match="None of the layers"):
        optim.update(grads, state, curvature={".other": curvature[".first"]})
    with pytest.raises(ValueError, match="must have shapes"):
        optim.update(grads, state, curvature={".first": curvature[".second"]})
    without = curvature[".first"]._replace(draws=None)
    with pytest.raises(ValueError, match="`moments=True`"):
        optim.update(grads, state, curvature={".first": without})
    wrong = curvature[".first"]._replace(draws=curvature[".second"].draws)
    with pytest.raises(ValueError, match="The draws of"):
        optim.update(grads, state, curvature={".first": wrong})


@pytest.mark.parametrize("optim", [nodegrad.snopt(), nodegrad.scale_by_snopt()])
def test_a_model_with_functions_in_it_is_refused(optim):
    model = eqx.nn.MLP(2, 2, 4, 1, key=jr.PRNGKey(0))
    with pytest.raises(TypeError, match=r"at .activation. Pass `eqx.filter"):
        optim.init(model)
    with pytest.raises(TypeError, match=r"floating point numbers; got .* at \['n'\]"):
        optim.init({"layer": model.layers[0], "n": jnp.array(3)})


def test_a_preset_is_no_learning_rate():
    with pytest.raises(TypeError, match="`learning_rate` must be a real number"):
        nodegrad.snopt("paper")


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay"])
def test_a_setting_of_the_optimiser_is_not_negative(name):
    for rate in (None, 0.1):
        for x in (-1.0, jnp.array(-1.0), float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"`{name}` must be finite and not"):
                nodegrad.snopt(**{"learning_rate": rate, name: x})
    with pytest.raises(TypeError, match="`weight_decay` must be a real number"):
        nodegrad.snopt(weight_decay=None)  # pyright: ignore[reportArgumentType]


def test_settings_may_be_known_arrays_in_a_jitted_function():
    rate, params = jnp.array(0.1), make_params()
    init = lambda p: nodegrad.snopt(rate, weight_decay=rate, momentum=rate).init(p)
    assert jax.tree.leaves(jax.jit(init)(params))


def test_layers_are_chosen_by_a_function():
    loss = lambda model: jnp.zeros(2)
    for make in (
        nodegrad.snopt,
        nodegrad.scale_by_snopt,
        lambda layers: nodegrad.value_grad_and_curvature(loss, layers=layers)(0),
    ):
        with pytest.raises(TypeError, match="`layers` must be a function from the"):
            make(layers=["first"])


def test_no_decay_of_factors_keeps_none():
    optim = nodegrad.scale_by_snopt(factor_decay=0)
    (layer, *_) = optim.init(make_params()).layers.values()
    assert layer.input_factor is None
