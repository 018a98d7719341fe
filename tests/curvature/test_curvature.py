"""Kronecker factors against outer products written down by hand."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import nodegrad
from nodegrad import value_grad_and_curvature

from ..problems import explicit_step, relative_error


SIZE, WIDTH, BATCH, STEPS = 3, 4, 5, 6


class Model(eqx.Module):
    """An encoder, a vector field that depends on time, and a read-out."""

    encode: eqx.nn.Linear
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear
    decode: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.encode = eqx.nn.Linear(2, SIZE, key=keys[0])
        self.inner = eqx.nn.Linear(SIZE, WIDTH, key=keys[1])
        self.outer = eqx.nn.Linear(WIDTH, SIZE, use_bias=False, key=keys[2])
        self.decode = eqx.nn.Linear(SIZE, 2, key=keys[3])

    def field(self, t, y, args):
        del args
        return self.outer(jnp.tanh(self.inner(y))) * (1 + t)


SOLVER = diffrax.Bosh3()
MODEL = Model(jr.PRNGKey(0))
X = jr.normal(jr.PRNGKey(1), (BATCH, 2))
TARGET = jr.normal(jr.PRNGKey(2), (BATCH, 2))


def solve(field, y0, *, batched=False, solver=None, adjoint=None, steps=STEPS, t0=0.0,
          t1=1.0, saveat=None):  # fmt: skip
    return nodegrad.odesolve(
        field,
        SOLVER if solver is None else solver,
        t0,
        t1,
        (t1 - t0) / steps,
        y0,
        batched=batched,
        adjoint=nodegrad.ACAAdjoint() if adjoint is None else adjoint,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        max_steps=512,
    ).ys


def batch_loss(model, x, target, how="batched", **kwargs):
    y = jax.vmap(model.encode)(x)
    if how == "batched":
        y = solve(model.field, y, batched=True, **kwargs)[:, -1]
    elif how == "vmap":
        y = jax.vmap(lambda y: solve(model.field, y, **kwargs)[-1])(y)
    elif how == "loop":
        y = jnp.stack([solve(model.field, y, **kwargs)[-1] for y in y])
    else:
        field = lambda t, y, args: jax.vmap(lambda y: model.field(t, y, args))(y)
        y = solve(field, y, **kwargs)[-1]
    out = jax.vmap(model.decode)(y)
    return jnp.sum(jnp.cosh(out - target), axis=1)


def curvature_of(how="batched", reduction="integral", model=MODEL, **kwargs):
    loss = lambda model, x, target: batch_loss(model, x, target, how, **kwargs)
    fn = eqx.filter_jit(value_grad_and_curvature(loss, reduction=reduction))
    return fn(model, X, TARGET)


def one(x):
    return jnp.append(x, 1.0)


def nodes_by_hand(model, x, target):
    """Inputs and gradients of the field's layers at the ends of all steps."""
    grid = jnp.linspace(0.0, 1.0, STEPS + 1)

    def rest(y, index):
        for i in range(index, STEPS):
            y = explicit_step(
                SOLVER.tableau, model.field, grid[i], grid[i + 1], y, None
            )
        return jnp.sum(jnp.cosh(model.decode(y) - target))

    def node(index, y):
        ct = jax.grad(rest)(y, index)
        a = jnp.tanh(model.inner(y))
        g_outer = (1 + grid[index]) * ct
        g_inner = (1 - a**2) * (model.outer.weight.T @ g_outer)
        return (one(y), g_inner), (a, g_outer)

    y, out = model.encode(x), []
    for index in range(STEPS + 1):
        out.append(node(index, y))
        if index < STEPS:
            step = grid[index], grid[index + 1]
            y = explicit_step(SOLVER.tableau, model.field, *step, y, None)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *out)


def factors_by_hand(reduction):
    h = 1 / STEPS
    weights = h * jnp.ones(STEPS + 1).at[0].set(0.5).at[-1].set(0.5)
    nodes = jax.jit(jax.vmap(lambda x, y: nodes_by_hand(MODEL, x, y)))(X, TARGET)
    sums = lambda w, x: jnp.einsum("n,bni,bnj->ij", w, x, x)
    out = {}
    for key, (a, g) in zip((".inner", ".outer"), nodes, strict=True):
        if reduction == "integral":
            out[key] = sums(weights, a), sums(weights, g)
        elif reduction == "expand":
            out[key] = sums(weights, a), sums(weights * h, g)
        else:
            mean = jnp.einsum("n,bni->bi", weights, a)
            total = jnp.einsum("n,bni->bi", weights, g)
            out[key] = mean.T @ mean, total.T @ total
    return out


@pytest.mark.rows(test=1, ci=3)
@pytest.mark.parametrize("reduction", ["integral", "expand", "reduce"])
def test_factors_inside_a_solve_match_outer_products_by_hand(reduction):
    _, _, curvature = curvature_of(reduction=reduction)
    for key, (inputs, outputs) in factors_by_hand(reduction).items():
        assert relative_error(curvature[key].input_factor, inputs) < 1e-12
        assert relative_error(curvature[key].output_factor, outputs) < 1e-12
        assert float(curvature[key].weight) == BATCH


@pytest.mark.slow
def test_factors_outside_a_solve_match_outer_products_by_hand():
    _, _, curvature = curvature_of()

    def per_sample(x, target):
        def rest(h):
            y = solve(MODEL.field, h)[-1]
            return jnp.sum(jnp.cosh(MODEL.decode(y) - target))

        y = solve(MODEL.field, MODEL.encode(x))[-1]
        g_decode = jnp.sinh(MODEL.decode(y) - target)
        return (one(x), jax.grad(rest)(MODEL.encode(x))), (one(y), g_decode)

    rows = jax.jit(jax.vmap(per_sample))(X, TARGET)
    for key, (a, g) in zip((".encode", ".decode"), rows, strict=True):
        assert relative_error(curvature[key].input_factor, a.T @ a) < 1e-12
        assert relative_error(curvature[key].output_factor, g.T @ g) < 1e-12


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["integral", "reduce"])
def test_batched_vmap_and_loop_agree(reduction):
    expected = curvature_of("loop", reduction, steps=3)
    hows = ["batched", "vmap"] + (["inside"] if reduction != "reduce" else [])
    for how in hows:
        assert relative_error(curvature_of(how, reduction, steps=3), expected) < 1e-12


def test_value_and_gradient_are_those_without_curvature():
    value, grads, _ = curvature_of()
    mean = lambda model: jnp.mean(batch_loss(model, X, TARGET))
    expected = eqx.filter_jit(eqx.filter_value_and_grad(mean))(MODEL)
    assert relative_error((value, grads), expected) < 1e-12
    assert jax.tree.structure(grads) == jax.tree.structure(expected[1])


@pytest.mark.slow
def test_mean_of_a_batch_with_its_size_is_the_same():
    loss = lambda *args: jnp.mean(batch_loss(*args))
    fn = value_grad_and_curvature(loss, batch_size=BATCH)
    assert relative_error(eqx.filter_jit(fn)(MODEL, X, TARGET), curvature_of()) < 1e-12


@pytest.mark.slow
def test_corner_of_the_input_factor_is_the_time_of_all_samples():
    _, _, curvature = curvature_of(t0=0.5, t1=2.5)
    assert abs(float(curvature[".inner"].input_factor[-1, -1]) - 2.0 * BATCH) < 1e-12
    backwards = curvature_of(t0=0.0, t1=-2.0)[2][".inner"].input_factor
    assert abs(float(backwards[-1, -1]) - 2.0 * BATCH) < 1e-12


@pytest.mark.slow
def test_factors_have_order_two():
    trace = lambda steps: jnp.stack(
        [jnp.trace(x) for x in curvature_of(steps=steps)[2][".inner"][:2]]
    )
    exact = trace(320)
    ratio = (trace(10) - exact) / (trace(20) - exact)
    assert jnp.all(jnp.abs(ratio - 4) < 0.3)


_SOLVERS = {
    "Dopri5": (diffrax.Dopri5(), None),
    "RK4": (nodegrad.RK4(), None),
    "Euler": (diffrax.Euler(), None),
    "Kvaerno3": (
        diffrax.Kvaerno3(
            root_finder=diffrax.VeryChord(
                rtol=1e-10, atol=1e-10, norm=lambda x: jnp.max(jnp.abs(x))
            )
        ),
        None,
    ),
    "Reversible": (nodegrad.Reversible(diffrax.Bosh3()), nodegrad.ReversibleAdjoint()),
    "Reversible, replayed": (nodegrad.Reversible(diffrax.Bosh3()), None),
    "ReversibleHeun": (diffrax.ReversibleHeun(), nodegrad.ReversibleAdjoint()),
    "ALF": (nodegrad.ALF(), nodegrad.ReversibleAdjoint()),
}


@functools.cache
def fine_factors():
    return curvature_of(solver=diffrax.Tsit5(), steps=80)[2]


@pytest.mark.rows(test=0, ci=2)
@pytest.mark.parametrize("name", _SOLVERS)
def test_factors_do_not_depend_on_the_solver(name):
    solver, adjoint = _SOLVERS[name]
    steps = 80 if name != "Euler" else 500
    expected = fine_factors()
    kwargs = dict(solver=solver, adjoint=adjoint, steps=steps)
    _, _, curvature = curvature_of(**kwargs)
    # Implicit methods keep a slope, of which nobody knows how it hangs on the state.
    tolerance = {"Euler": 2e-2, "Kvaerno3": 5e-3}.get(name, 1e-3)
    for key, factors in expected.items():
        assert relative_error(curvature[key][:2], factors[:2]) < tolerance


@pytest.mark.slow
def test_adaptive_steps_and_the_door_of_diffrax():
    def loss(model, x, target, solve):
        def one_sample(x, target):
            sol = solve(
                diffrax.ODETerm(model.field),
                diffrax.Tsit5(),
                0.0,
                1.0,
                None,
                model.encode(x),
                stepsize_controller=diffrax.PIDController(1e-5, 1e-7),
                adjoint=nodegrad.ACAAdjoint(),
                max_steps=64,
            )
            return jnp.sum(jnp.cosh(model.decode(sol.ys[0]) - target))

        return jax.vmap(one_sample)(x, target)

    results = []
    for door in (nodegrad.odesolve, diffrax.diffeqsolve):
        fn = value_grad_and_curvature(lambda *args, door=door: loss(*args, door))
        results.append(eqx.filter_jit(fn)(MODEL, X, TARGET))
    assert relative_error(*results) < 1e-9
    _, _, fine = curvature_of(steps=80)
    for key, factors in fine.items():
        assert relative_error(results[0][2][key][:2], factors[:2]) < 3e-2


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("solver", [nodegrad.ALF(), diffrax.ReversibleHeun()], ids=str)
def test_evaluations_before_the_first_step_do_not_count(solver, is_cached):
    def loss(model, x, target):
        def one_sample(x, target):
            y0 = model.encode(x)
            field = lambda t, y, args: model.field(t, y, args)
            if is_cached:
                field = jax.jit(field)
                # Traced here, outside of the solve, which then finds it in the cache.
                field(jnp.array(0.0), y0, None)
            terms = diffrax.ODETerm(field)
            adjoint = nodegrad.ReversibleAdjoint()
            sol = diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 1 / STEPS, y0, adjoint=adjoint, max_steps=512
            )
            return jnp.sum(jnp.cosh(model.decode(sol.ys[0]) - target))

        return jax.vmap(one_sample)(x, target)

    found = eqx.filter_jit(value_grad_and_curvature(loss))(MODEL, X, TARGET)
    expected = curvature_of(solver=solver, adjoint=nodegrad.ReversibleAdjoint())
    assert relative_error(found, expected) < 1e-12


@pytest.mark.slow
def test_time_after_the_last_save_does_not_count():
    save = diffrax.SaveAt(ts=[1.0])
    _, _, until = curvature_of(saveat=save)
    _, _, beyond = curvature_of(saveat=save, t1=2.0, steps=2 * STEPS)
    for key, factors in until.items():
        assert relative_error(beyond[key], factors) < 1e-12


@pytest.mark.slow
def test_lanes_that_save_count_by_themselves():
    """A layer that is applied when something is saved, steps being adaptive."""
    ts = jnp.array([0.15, 0.5, 1.0])

    def loss(model, x, target, batched):
        def solve(y0):
            return nodegrad.odesolve(
                model.field,
                diffrax.Bosh3(),
                0.0,
                1.0,
                None,
                y0,
                stepsize_controller=diffrax.PIDController(1e-3, 1e-5),
                saveat=diffrax.SaveAt(ts=ts, fn=lambda t, y, args: model.decode(y)),
                max_steps=64,
                batched=batched,
            ).ys

        y0 = 3.0 * jax.vmap(model.encode)(x)
        ys = solve(y0) if batched else jax.vmap(solve)(y0)
        return jnp.sum(jnp.cosh(ys - target[:, None]), axis=(1, 2))

    both = [
        eqx.filter_jit(value_grad_and_curvature(lambda *a, b=b: loss(*a, b)))(
            MODEL, X, TARGET
        )[2][".decode"]
        for b in (True, False)
    ]
    assert float(both[0].input_factor[-1, -1]) == BATCH * len(ts)
    assert relative_error(*both) < 1e-12


def test_models_cast_inside_of_the_loss_are_refused():
    def loss(model, x, target):
        cast = lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a
        model, x = jax.tree.map(cast, (model, x))
        return jnp.sum(jax.vmap(model.decode)(jax.vmap(model.encode)(x)) ** 2, axis=1)

    with pytest.raises(TypeError, match="was cast to float32 inside of the loss"):
        value_grad_and_curvature(loss)(MODEL, X, TARGET)


@pytest.mark.parametrize("change", [lambda w: w + 0.01, lambda w: w / 2])
def test_models_changed_inside_of_the_loss_are_refused(change):
    # Their probes are changed with them.
    def loss(model, x, target):
        changed = lambda a: change(a) if eqx.is_inexact_array(a) else a
        decode = jax.tree.map(changed, model.decode)
        return jnp.sum(jax.vmap(decode)(jax.vmap(model.encode)(x)) ** 2, axis=1)

    with pytest.raises(ValueError, match=r"`.decode` of the model was computed"):
        value_grad_and_curvature(loss)(MODEL, X, TARGET)
    others = value_grad_and_curvature(loss, layers=lambda key: key == ".encode")
    _, _, curvature = others(MODEL, X, TARGET)
    assert float(curvature[".encode"].input_factor[-1, -1]) == BATCH


@pytest.mark.parametrize(
    "move",
    [
        jax.lax.optimization_barrier,
        jax.lax.stop_gradient,
        lambda arrays: jax.device_put(arrays, jax.devices()[0]),
    ],
)
def test_models_moved_inside_of_the_loss_are_not(move):
    def loss(model, x, moved):
        if moved:
            arrays, static = eqx.partition(model, eqx.is_array)
            model = eqx.combine(move(arrays), static)
        return jnp.sum(jax.vmap(model)(x) ** 2, axis=1)

    fn = eqx.filter_jit(value_grad_and_curvature(loss))
    value, grads, curvature = fn(MODEL.encode, X, True)
    if move is jax.lax.stop_gradient:
        assert not any(jnp.any(x) for x in jax.tree.leaves((grads, curvature[""][:2])))
        assert value == fn(MODEL.encode, X, False)[0]
    else:
        found = value, grads, curvature
        assert relative_error(found, fn(MODEL.encode, X, False)) < 1e-14


@pytest.mark.slow
def test_layers_of_two_dtypes_in_a_row():
    cast = lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a
    narrow = jax.tree.map(cast, MODEL.encode)
    loss = lambda model, x: jnp.sum(
        jax.vmap(lambda x: model[1](jnp.tanh(model[0](x))))(x) ** 2, axis=1
    )
    model, x = (narrow, MODEL.inner), X.astype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        _, grads, _ = value_grad_and_curvature(loss)(model, x)
        expected = eqx.filter_grad(lambda model: jnp.mean(loss(model, x)))(model)
    assert relative_error(grads[0], expected[0]) < 1e-6
    assert relative_error(grads[1], expected[1]) < 1e-12


def test_a_convolution_that_calls_itself_differently_is_no_layer():
    class Doubled(eqx.nn.Conv1d):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x)

    conv, linear = Doubled(1, 2, 2, key=jr.PRNGKey(0)), MODEL.encode
    loss = lambda m, x: jnp.sum(jax.vmap(m[0])(jax.vmap(m[1])(x)[:, None]) ** 2, (1, 2))
    value, grads, curvature = value_grad_and_curvature(loss)((conv, linear), X)
    mean = lambda m: jnp.mean(loss(m, X))
    expected = eqx.filter_value_and_grad(mean)((conv, linear))
    assert relative_error((value, grads), expected) < 1e-12
    assert list(curvature) == ["[1]"]


@pytest.mark.slow
def test_chained_solves_sum_to_one():
    def chained(model, x, target):
        y = jax.vmap(model.encode)(x)
        for part in range(3):
            times = dict(t0=part / 3, t1=(part + 1) / 3, steps=STEPS // 3)
            y = solve(model.field, y, batched=True, **times)[:, -1]
        return jnp.sum(jnp.cosh(jax.vmap(model.decode)(y) - target), axis=1)

    ours = eqx.filter_jit(value_grad_and_curvature(chained))(MODEL, X, TARGET)
    assert relative_error(ours, curvature_of()) < 1e-12


@pytest.mark.slow
def test_states_saved_on_the_way_are_jumps_of_the_cotangent():
    def saved(model, x, target):
        y = jax.vmap(model.encode)(x)
        steps = diffrax.SaveAt(steps=2)
        ys = solve(model.field, y, batched=True, saveat=steps)[:, : STEPS // 2]
        out = jax.vmap(jax.vmap(model.decode))(ys)
        return jnp.sum(jnp.cosh(out - target[:, None]), axis=(1, 2))

    def chained(model, x, target):
        y, total = jax.vmap(model.encode)(x), 0.0
        for part in range(3):
            times = dict(t0=part / 3, t1=(part + 1) / 3, steps=STEPS // 3)
            y = solve(model.field, y, batched=True, **times)[:, -1]
            out = jax.vmap(model.decode)(y)
            total = total + jnp.sum(jnp.cosh(out - target), axis=1)
        return total

    ours, expected = (
        eqx.filter_jit(value_grad_and_curvature(loss))(MODEL, X, TARGET)
        for loss in (saved, chained)
    )
    assert relative_error(ours, expected) < 1e-12


# What the vector field may do with its layers.


def _field_curvature(field, layer, y0, steps=4):
    def loss(model, y0):
        ys = solve(lambda t, y, args: field(model, y), y0, batched=True, steps=steps)
        return jnp.sum(ys[:, -1] ** 2, axis=1)

    fn = eqx.filter_jit(value_grad_and_curvature(loss))
    return fn(layer, y0)


@pytest.mark.slow
def test_layer_used_twice_sums_its_uses():
    keys = jr.split(jr.PRNGKey(3), 3)
    layer = eqx.nn.Linear(SIZE, SIZE, key=keys[0])
    y0 = jr.normal(keys[2], (2, SIZE))
    shared = lambda layer, y: layer(jnp.tanh(layer(y)))
    apart = lambda layers, y: layers[1](jnp.tanh(layers[0](y)))
    value, grads, both = _field_curvature(shared, layer, y0)
    value_, grads_, two = _field_curvature(apart, [layer, layer], y0)
    assert relative_error(value, value_) < 1e-14
    assert relative_error(grads.weight, grads_[0].weight + grads_[1].weight) < 1e-12
    for i in range(2):
        assert relative_error(both[""][i], two["[0]"][i] + two["[1]"][i]) < 1e-12


@pytest.mark.slow
def test_transformations_inside_the_field_change_nothing():
    mlp = eqx.nn.MLP(SIZE, SIZE, WIDTH, 1, activation=jnp.tanh, key=jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(2), (2, SIZE))
    expected = _field_curvature(lambda m, y: m(y), mlp, y0)
    wrapped = {
        "jit": lambda m, y: eqx.filter_jit(lambda m, y: m(y))(m, y),
        "checkpoint": lambda m, y: eqx.filter_checkpoint(m)(y),
        "cond": lambda m, y: jax.lax.cond(y[0] > 1e9, lambda y: y, lambda y: m(y), y),
        "vmap": lambda m, y: jax.vmap(m)(y[None])[0],
        "matrix": lambda m, y: (
            m.layers[1].weight @ jnp.tanh(m.layers[0].weight @ y[:, None]
            + m.layers[0].bias[:, None])
        )[:, 0] + m.layers[1].bias,
    }  # fmt: skip
    for field in wrapped.values():
        assert relative_error(_field_curvature(field, mlp, y0), expected) < 1e-12


@pytest.mark.slow
def test_stacked_layers_are_layers_each():
    keys = jr.split(jr.PRNGKey(0), 2)
    make = lambda key: eqx.nn.Linear(SIZE, SIZE, key=key)
    y0 = jr.normal(jr.PRNGKey(2), (2, SIZE))

    def scanned(layers, y):
        arrays, static = eqx.partition(layers, eqx.is_array)
        step = lambda y, x: (jnp.tanh(eqx.combine(x, static)(y)), None)
        return jax.lax.scan(step, y, arrays)[0]

    def unrolled(layers, y):
        for layer in layers:
            y = jnp.tanh(layer(y))
        return y

    _, _, stacked = _field_curvature(scanned, eqx.filter_vmap(make)(keys), y0)
    _, _, apart = _field_curvature(unrolled, [make(k) for k in keys], y0)
    for i in range(2):
        ours = jax.tree.map(lambda x, i=i: x[i], stacked[""])
        assert relative_error(ours, apart[f"[{i}]"]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("t1", [1.0, 1e-5])
def test_short_intervals_count_in_float32(t1):
    # The corner of an input factor is the time of all samples.
    make = lambda key: eqx.nn.Linear(SIZE, SIZE, dtype=jnp.float32, key=key)
    layers = eqx.filter_vmap(make)(jr.split(jr.PRNGKey(0), 2))
    y0 = jr.normal(jr.PRNGKey(1), (3, SIZE), jnp.float32)
    t0, end = jnp.zeros((), jnp.float32), jnp.asarray(t1, jnp.float32)
    dt0 = end / 4

    def loss(layers, y0):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def field(t, y, args):
            step = lambda y, x: (jnp.tanh(eqx.combine(x, static)(y)), None)
            return jax.lax.scan(step, y, arrays)[0]

        sol = nodegrad.odesolve(
            field, diffrax.Heun(), t0, end, dt0, y0, batched=True, max_steps=4
        )
        return jnp.sum(sol.ys**2, axis=(1, 2))

    _, _, curvature = nodegrad.value_grad_and_curvature(loss)(layers, y0)
    corners = curvature[""].input_factor[:, -1, -1]
    assert jnp.max(jnp.abs(corners / (3 * t1) - 1)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_exact_gauss_newton_factors_of_half_precision(dtype):
    model = eqx.nn.Linear(SIZE, 3, dtype=dtype, key=jr.PRNGKey(0))
    x = jr.normal(jr.PRNGKey(1), (8, SIZE))

    def factor(cast):
        fn = nodegrad.value_grad_and_curvature(
            lambda out, x: jnp.sum(out**4, axis=1),
            predict=lambda model, x: jax.vmap(model)(x),
            kind="ggn",
            num_draws="exact",
        )
        _, _, curvature = fn(jax.tree.map(cast, model), cast(x))
        return curvature[""].output_factor

    half, single = (
        factor(lambda a: a.astype(dtype)),
        factor(lambda a: a.astype(dtype).astype(jnp.float32)),
    )
    assert relative_error(half.astype(jnp.float32), single) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_trace_of_the_jacobian_uses_the_layer_again(mode):
    # One layer, y' = (W y + b, eps^T W eps): the second use has input eps, no bias, or,
    # in reverse, is transposed, with input eps and the cotangent of its result.
    layer = eqx.nn.Linear(SIZE, SIZE, key=jr.PRNGKey(0))
    y0 = jr.normal(jr.PRNGKey(1), (2, SIZE))
    eps = jr.normal(jr.PRNGKey(2), (SIZE,))

    def loss(layer, y0):
        def field(t, y__logp, args):
            y, _ = y__logp
            if mode == "forward":
                out, tangent = jax.jvp(layer, (y,), (eps,))
            else:
                out, pull = jax.vjp(layer, y)
                (tangent,) = pull(eps)
            return out, jnp.vdot(eps, tangent)

        zeros = jnp.zeros(len(y0))
        y1, logp = solve(field, (y0, zeros), batched=True, steps=4)
        return jnp.sum(y1[:, 0] ** 2, axis=1) + logp[:, 0] ** 2

    def without(layer, y0):
        y1 = solve(lambda t, y, args: layer(y), y0, batched=True, steps=4)
        return jnp.sum(y1[:, 0] ** 2, axis=1)

    _, grads, curvature = eqx.filter_jit(value_grad_and_curvature(loss))(layer, y0)
    _, plain, expected = eqx.filter_jit(value_grad_and_curvature(without))(layer, y0)
    # d/dlogp is the same at all times: 2 logp = 2 eps^T W eps.
    ct = 2 * jnp.vdot(eps, layer.weight @ eps)
    a_scale, b_scale = (1.0, ct) if mode == "forward" else (ct, 1.0)
    a = a_scale**2 * jnp.outer(jnp.append(eps, 0.0), jnp.append(eps, 0.0))
    b = b_scale**2 * jnp.outer(eps, eps)
    assert relative_error(grads.weight - plain.weight, ct * jnp.outer(eps, eps)) < 1e-10
    added = curvature[""].input_factor - expected[""].input_factor
    assert relative_error(added, len(y0) * a) < 1e-10
    added = curvature[""].output_factor - expected[""].output_factor
    assert relative_error(added, len(y0) * b) < 1e-10


@pytest.mark.rows(test=0, ci=1)
@pytest.mark.parametrize("padding", [1, "SAME"])
@pytest.mark.parametrize("inside", [True, False])
def test_convolution_matches_its_patches(inside, padding):
    conv = eqx.nn.Conv2d(2, 2, 3, padding=padding, key=jr.PRNGKey(0))
    images = jr.normal(jr.PRNGKey(1), (3, 2, 4, 5))

    def loss(conv, images):
        if inside:
            field = lambda t, y, args: conv(y)
            # One step of Euler: the cotangent at its start is the gradient.
            images = solve(field, images, batched=True, solver=diffrax.Euler(),
                           steps=1)[:, -1]  # fmt: skip
        else:
            images = jax.vmap(conv)(images)
        return jnp.sum(jnp.sin(images), axis=(1, 2, 3))

    def patches(x):
        out = jax.lax.conv_general_dilated_patches(
            x[None], (3, 3), (1, 1), [(1, 1), (1, 1)]
        )[0]
        out = out.reshape(18, -1).T
        return jnp.concatenate([out, jnp.ones((20, 1))], axis=1)

    rows = lambda g: jnp.moveaxis(g, 1, -1).reshape(-1, 2)
    both = lambda x: x.reshape(-1, x.shape[-1])
    value, grads, curvature = eqx.filter_jit(value_grad_and_curvature(loss))(
        conv, images
    )
    if inside:
        end = images + jax.vmap(conv)(images)
        ct1 = jnp.cos(end)
        transposed = lambda x, g: jax.vjp(conv, x)[1](g)[0]
        ct0 = ct1 + jax.vmap(transposed)(images, ct1)
        nodes = (images, ct0, 0.5), (end, ct1, 0.5)
    else:
        nodes = [(images, jnp.cos(jax.vmap(conv)(images)), 1.0)]
    a = sum(w * both(jax.vmap(patches)(x)).T @ both(jax.vmap(patches)(x))
            for x, _, w in nodes)  # fmt: skip
    b = sum(w * rows(g).T @ rows(g) for _, g, w in nodes)
    assert relative_error(curvature[""].input_factor, a) < 1e-12
    assert relative_error(curvature[""].output_factor, b) < 1e-12
    mean = lambda conv: jnp.mean(loss(conv, images))
    assert relative_error(grads, jax.grad(mean)(eqx.filter(conv, eqx.is_array))) < 1e-12


@pytest.mark.exhaustive
def test_recurrent_network_with_a_solve_between_observations():
    class Network(eqx.Module):
        cell: eqx.nn.GRUCell
        field: eqx.nn.Linear

    keys = jr.split(jr.PRNGKey(0), 2)
    network = Network(
        eqx.nn.GRUCell(2, 3, key=keys[0]), eqx.nn.Linear(3, 3, key=keys[1])
    )
    series = jr.normal(jr.PRNGKey(1), (4, 5, 2))

    def loss(network, series, scan):
        def step(h, x):
            field = lambda t, h, args: jnp.tanh(network.field(h))
            h = solve(field, h, batched=True, steps=2)[:, -1]
            return jax.vmap(network.cell)(x, h), None

        h, xs = jnp.zeros((4, 3)), jnp.moveaxis(series, 1, 0)
        if scan:
            h, _ = jax.lax.scan(step, h, xs)
        else:
            for x in xs:
                h, _ = step(h, x)
        return jnp.sum(h**2, axis=1)

    ours, expected = (
        eqx.filter_jit(value_grad_and_curvature(lambda *a, s=s: loss(*a, s)))(
            network, series
        )
        for s in (True, False)
    )
    assert relative_error(ours, expected) < 1e-11
    curvature = ours[2]
    assert set(curvature) == {".cell.weight_ih", ".cell.weight_hh", ".field"}
    a = curvature[".cell.weight_ih"].input_factor
    assert relative_error(a, jnp.einsum("bti,btj->ij", series, series)) < 1e-12


# Exact cases.


@pytest.mark.slow
def test_reductions_are_exact_where_nothing_changes_in_time():
    # y' = W a: input and gradient are constant.
    layer = eqx.nn.Linear(2, SIZE, use_bias=False, key=jr.PRNGKey(0))
    a, time, steps = jnp.array([0.4, -1.2]), 2.0, 4

    def loss(layer, reduction):
        field = lambda t, y, args: layer(a)
        y1 = solve(field, jnp.zeros(SIZE), t1=time, steps=steps)[-1]
        return jnp.sum(jnp.exp(y1))[None]

    products = {}
    for reduction in ("integral", "expand", "reduce"):
        fn = value_grad_and_curvature(loss, reduction=reduction)
        _, grads, curvature = fn(layer, reduction)
        factors = curvature[""]
        products[reduction] = jnp.kron(factors.output_factor, factors.input_factor)
    exact = jnp.outer(grads.weight.reshape(-1), grads.weight.reshape(-1))
    assert relative_error(products["integral"], exact) < 1e-12
    assert relative_error(products["reduce"], exact) < 1e-12
    assert relative_error(steps * products["expand"], exact) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["integral", "reduce"])
def test_a_solve_in_the_field_of_another_one(reduction):
    # z' = w z over a unit of time is the field of y, so that y' = e^w y. Everything
    # is an integral of exponentials over both times.
    layer = eqx.nn.Linear(1, 1, use_bias=False, key=jr.PRNGKey(0))
    w = 0.3
    layer = eqx.tree_at(lambda x: x.weight, layer, jnp.array([[w]]))

    def loss(layer, y0):
        inner = lambda s, z, args: layer(z)
        field = lambda t, y, args: solve(inner, y, steps=12)[-1]
        return jax.vmap(lambda y: jnp.sum(solve(field, y, steps=12)))(y0)

    fn = value_grad_and_curvature(loss, reduction=reduction)
    _, _, curvature = eqx.filter_jit(fn)(layer, jnp.array([[1.0], [0.5]]))
    a, b, *_ = curvature[""]
    rate = jnp.exp(w)
    mean = lambda rate: (jnp.exp(rate) - 1) / rate
    if reduction == "integral":
        one_a = one_b = mean(2 * w) * mean(2 * rate)
    else:
        one_a = one_b = (mean(w) * mean(rate)) ** 2
    # The input of a sample is proportional to its start, the gradient is not.
    assert relative_error(a[0, 0], 1.25 * one_a) < 5e-3
    assert relative_error(b[0, 0], 2 * one_b) < 5e-3


@pytest.mark.exhaustive
def test_reduce_is_the_gauss_newton_matrix_of_an_integrator():
    # y' = W c_b(t): every sample's Jacobian is the integral of its c.
    layer = eqx.nn.Linear(2, SIZE, use_bias=False, key=jr.PRNGKey(0))
    rates = 3 * jr.normal(jr.PRNGKey(1), (BATCH, 2))
    targets = jr.normal(jr.PRNGKey(2), (BATCH, SIZE))

    def predict(layer, rates, targets):
        def one_sample(rate):
            field = lambda t, y, args: layer(jnp.cos(rate * t))
            return solve(field, jnp.zeros(SIZE), steps=40)[-1]

        return jax.vmap(one_sample)(rates)

    square = lambda out, rates, targets: jnp.sum((out - targets) ** 2, axis=1) / 2
    j = jax.jacrev(
        lambda w: predict(eqx.tree_at(lambda x: x.weight, layer, w), rates, targets)
    )(layer.weight).reshape(BATCH, SIZE, -1)
    exact = jnp.einsum("bci,bcj->ij", j, j) / BATCH
    found = {}
    for reduction in ("reduce", "integral"):
        fn = value_grad_and_curvature(
            square, predict=predict, kind="ggn", num_draws="exact", reduction=reduction
        )
        _, _, curvature = eqx.filter_jit(fn)(layer, rates, targets)
        a, b, n, _ = curvature[""]
        found[reduction] = jnp.kron(b / n, a / n)
    # The trapezoidal rule is not that of the solver.
    assert relative_error(found["reduce"], exact) < 2e-2
    assert relative_error(found["integral"], exact) > 5e-2


# Gauss-Newton columns and moments, without a solve.


LINEAR = eqx.nn.Linear(2, 3, key=jr.PRNGKey(7))
LABELS = jnp.array([0, 2, 1, 0, 2])


def _predict(layer, x, labels):
    del labels
    return jax.vmap(layer)(x)


def _cross_entropy(out, x, labels):
    del x
    return optax.softmax_cross_entropy_with_integer_labels(out, labels)


def test_exact_gauss_newton_factors_of_cross_entropy():
    fn = value_grad_and_curvature(
        _cross_entropy, predict=_predict, kind="ggn", num_draws="exact"
    )
    value, grads, curvature = fn(LINEAR, X, LABELS)
    p = jax.nn.softmax(_predict(LINEAR, X, LABELS))
    hessian = jnp.einsum("bi,ij->bij", p, jnp.eye(3)) - p[:, :, None] * p[:, None, :]
    inputs = jax.vmap(one)(X)
    assert relative_error(curvature[""].output_factor, jnp.sum(hessian, 0)) < 1e-12
    assert relative_error(curvature[""].input_factor, inputs.T @ inputs) < 1e-12
    mean = lambda m: jnp.mean(_cross_entropy(_predict(m, X, LABELS), X, LABELS))
    expected = eqx.filter_value_and_grad(mean)(LINEAR)
    assert relative_error((value, grads), expected) < 1e-14


@pytest.mark.slow
def test_random_draws_converge_to_the_exact_factors_and_moments():
    kwargs = dict(predict=_predict, kind="ggn", moments=True)
    exact_fn = value_grad_and_curvature(_cross_entropy, num_draws="exact", **kwargs)
    key = jr.PRNGKey(0)
    _, _, exact = exact_fn(LINEAR, X, LABELS, key=key)
    fn = value_grad_and_curvature(_cross_entropy, num_draws=20000, **kwargs)
    _, _, drawn = eqx.filter_jit(fn)(LINEAR, X, LABELS, key=key)
    assert relative_error(drawn[""].output_factor, exact[""].output_factor) < 3e-2
    assert relative_error(drawn[""].input_factor, exact[""].input_factor) < 1e-12

    # Moments: the squares of each sample's gradients, columns of the exact root.
    p = jax.nn.softmax(_predict(LINEAR, X, LABELS))
    variances = p * (1 - p)
    inputs = jax.vmap(one)(X)
    moments = jnp.einsum("bo,bi->oi", variances, inputs**2)
    assert relative_error(jnp.sum(drawn[""].draws ** 2, 0), moments) < 3e-2


def test_one_draw_has_the_diagonal_of_a_weighted_sum_of_squares():
    # The Hessian of each loss is `2 diag(weights)`: a random sign for each output
    # leaves its diagonal as it is.
    weights = jr.uniform(jr.PRNGKey(1), (len(X), 3), minval=0.5)
    loss = lambda out, x, labels: jnp.sum(weights * (out - 1) ** 2, axis=1)
    fn = value_grad_and_curvature(loss, predict=_predict, kind="ggn")
    _, _, drawn = eqx.filter_jit(fn)(LINEAR, X, LABELS, key=jr.PRNGKey(0))
    expected = jnp.sum(2 * weights, axis=0)
    assert relative_error(jnp.diag(drawn[""].output_factor), expected) < 1e-12


def test_factors_outside_of_a_solve_need_no_matrix_for_each_sample():
    batch, width = 256, 32
    model, x = eqx.nn.MLP(width, 1, width, 1, key=jr.PRNGKey(0)), jnp.ones((batch, 32))
    fn = value_grad_and_curvature(lambda model, x: jax.vmap(model)(x)[:, 0] ** 2)
    compiled = eqx.filter_jit(fn).lower(model, x).compile()
    used = compiled.compiled.memory_analysis().temp_size_in_bytes
    assert used < batch * width**2 * x.dtype.itemsize


@pytest.mark.slow
def test_random_signs_give_the_moments_of_samples():
    losses = lambda m, x, labels: _cross_entropy(_predict(m, x, labels), x, labels)
    fn = value_grad_and_curvature(losses, moments=True, num_draws=20000)
    _, grads, drawn = eqx.filter_jit(fn)(LINEAR, X, LABELS, key=jr.PRNGKey(0))
    plain_fn = value_grad_and_curvature(losses)
    _, plain_grads, plain = plain_fn(LINEAR, X, LABELS)
    assert relative_error(grads, plain_grads) < 1e-12
    # Signs do not matter to the factors.
    assert relative_error(drawn[""][:2], plain[""][:2]) < 1e-12
    of_one = lambda x, label: jax.grad(lambda m: losses(m, x[None], label[None])[0])(
        LINEAR
    )
    per_sample = jax.vmap(of_one)(X, LABELS)
    squares = jnp.concatenate(
        [jnp.sum(per_sample.weight**2, 0), jnp.sum(per_sample.bias**2, 0)[:, None]], 1
    )
    assert relative_error(jnp.sum(drawn[""].draws ** 2, 0), squares) < 3e-2


@pytest.mark.slow
def test_layers_can_be_left_out_and_auxiliary_output_comes_along():
    loss = lambda *args: (batch_loss(*args), {"n": 3, "x": args[1][0]})
    fn = value_grad_and_curvature(
        loss, has_aux=True, layers=lambda key: key in (".inner", ".decode")
    )
    (value, aux), _, curvature = eqx.filter_jit(fn)(MODEL, X, TARGET)
    assert set(curvature) == {".inner", ".decode"}
    assert aux["n"] == 3 and jnp.array_equal(aux["x"], X[0])
    expected = curvature_of()
    assert relative_error(value, expected[0]) < 1e-13
    for key, factors in curvature.items():
        assert relative_error(factors, expected[2][key]) < 1e-12


def test_types_follow_the_weights():
    cast = lambda x, t: x.astype(t) if eqx.is_inexact_array(x) else x
    model = jax.tree.map(lambda x: cast(x, jnp.bfloat16), LINEAR)
    loss = lambda m, x: jnp.sum(jax.vmap(m)(x) ** 2, axis=1)
    _, grads, curvature = value_grad_and_curvature(loss)(model, X.astype(jnp.bfloat16))
    assert grads.weight.dtype == jnp.bfloat16
    assert curvature[""].input_factor.dtype == jnp.float32


@pytest.mark.slow
def test_parts_of_a_batch_add_up():
    halves = [
        eqx.filter_jit(value_grad_and_curvature(batch_loss))(MODEL, X[s], TARGET[s])
        for s in (slice(0, 2), slice(2, 5))
    ]
    total = jax.tree.map(jnp.add, halves[0][2], halves[1][2])
    assert relative_error(total, curvature_of()[2]) < 1e-12


def test_a_weight_times_many_matrices_is_that_for_each_of_them():
    # `@` broadcasts over the axes before the last two.
    x = jr.normal(jr.PRNGKey(1), (5, 4, 2, 6))

    def loss(model, x):
        h = jax.vmap(lambda x: model.weight @ x + model.bias[None, :, None])(x)
        return jnp.sum(h**3, axis=(1, 2, 3))

    rows = jnp.moveaxis(x, 2, -1).reshape(-1, 2)
    rows = jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=1)
    g = 3 * jax.vmap(LINEAR)(rows[:, :2]) ** 2
    _, grads, curvature = value_grad_and_curvature(loss)(LINEAR, x)
    assert relative_error(curvature[""].input_factor, rows.T @ rows) < 1e-12
    assert relative_error(curvature[""].output_factor, g.T @ g) < 1e-12
    expected = jax.grad(lambda model: jnp.mean(loss(model, x)))(LINEAR)
    assert relative_error(grads, expected) < 1e-12


@pytest.mark.parametrize(
    "biases, where, is_shared",
    [
        ((True, False), lambda layer: layer.weight, False),
        ((True, True), lambda layer: layer.weight, False),
        ((False, True), lambda layer: layer.weight, False),
        ((True, True), lambda layer: [layer.weight, layer.bias], True),
        ((True, True), lambda layer: layer, True),
    ],
)
def test_a_shared_weight_counts_the_bias_of_its_own_layer_alone(
    biases, where, is_shared
):
    first, second = (
        eqx.nn.Linear(2, 2, use_bias=bias, key=jr.PRNGKey(i))
        for i, bias in enumerate(biases)
    )
    model = eqx.nn.Shared(
        (first, second), lambda pair: where(pair[1]), lambda pair: where(pair[0])
    )

    def loss(model, x):
        first, second = model()
        h = jnp.tanh(jax.vmap(first)(x))
        return jnp.sum(jax.vmap(second)(h) ** 2, axis=1)

    h = jnp.tanh(jax.vmap(first)(X))
    rows = jnp.concatenate([X, h])
    if biases[0]:
        ones = jnp.concatenate([jnp.ones(len(X)), jnp.full(len(X), float(is_shared))])
        rows = jnp.concatenate([rows, ones[:, None]], axis=1)
    _, grads, curvature = value_grad_and_curvature(loss)(model, X)
    (factors,) = curvature.values()
    assert relative_error(factors.input_factor, rows.T @ rows) < 1e-12
    expected = eqx.filter_grad(lambda model: jnp.mean(loss(model, X)))(model)
    assert relative_error(grads, expected) < 1e-12


# Misuse.


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(kind="fisher"), "`kind` must be one of"),
        (dict(reduction="sum"), "`reduction` must be one of"),
        (dict(kind="ggn"), "`predict` goes with"),
        (dict(predict=_predict), "`predict` goes with"),
        (dict(num_draws=0), "`num_draws` must be .* or 'exact'; got 0"),
        (dict(num_draws="all"), "`num_draws` must be .* or 'exact'; got 'all'"),
        (dict(num_draws="exact"), "`num_draws='exact'` goes with"),
        (dict(batch_size=0), "`batch_size` must be a positive Python integer or None"),
        (dict(batch_size=2.5), "`batch_size` must be a positive Python integer"),
        (dict(batch_size="5"), "`batch_size` must be a positive Python integer"),
    ],
)
def test_wrong_options_are_refused(kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        value_grad_and_curvature(batch_loss, **kwargs)


def test_losses_that_are_none_are_refused():
    fn = lambda loss, **kwargs: value_grad_and_curvature(loss, **kwargs)
    scalar = lambda m, x: jnp.sum(jax.vmap(m)(x))
    with pytest.raises(ValueError, match="returned a scalar"):
        fn(scalar)(LINEAR, X)
    with pytest.raises(ValueError, match=r"shape `\(batch,\)`"):
        fn(lambda m, x: jax.vmap(m)(x))(LINEAR, X)
    with pytest.raises(ValueError, match="batch_size=3"):
        fn(lambda m, x: jax.vmap(m)(x)[:, 0], batch_size=3)(LINEAR, X)
    with pytest.raises(TypeError, match="array of real numbers"):
        fn(lambda m, x: None)(LINEAR, X)
    with pytest.raises(ValueError, match="pass `key`"):
        fn(lambda m, x: jax.vmap(m)(x)[:, 0], moments=True)(LINEAR, X)
    with pytest.raises(ValueError, match="one loss for each sample"):
        fn(lambda out, x: jnp.sum(out), predict=lambda m, x: jax.vmap(m)(x),
           kind="ggn", num_draws="exact")(LINEAR, X)  # fmt: skip
    with pytest.raises(ValueError, match="has no layer"):
        fn(lambda m, x: x[:, 0] * m)(jnp.array(1.0), X)


def test_statistics_of_stages_are_refused():
    def loss(model, x, target):
        def one_sample(x):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(model.field), diffrax.Tsit5(), 0.0, 1.0, 0.1,
                model.encode(x),
            ).ys[0]  # fmt: skip

        return jnp.sum(jax.vmap(one_sample)(x), axis=1)

    with pytest.raises(ValueError, match="would depend on the solver"):
        value_grad_and_curvature(loss)(MODEL, X, TARGET)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: X @ jnp.asarray(w).T,
        lambda w: w**2,
        lambda w: 2 * w,
        lambda w: -w,
        lambda w: np.ones((1, 1)) * w,
        lambda w: w.T,
    ],
)
def test_uses_that_nobody_sees_are_refused(use):
    loss = lambda m, x: jnp.sum(jax.vmap(m)(x), axis=1) + jnp.sum(use(m.weight))
    message = r"\(the model itself\) .* used other than by calling the layer"
    with pytest.raises((TypeError, AttributeError), match=message):
        value_grad_and_curvature(loss)(LINEAR, X)


def test_shape_and_length_of_a_weight_are_not_uses():
    loss = lambda m, x: jnp.sum(jax.vmap(m)(x) ** 2, axis=1) / len(m.weight)
    scaled = lambda m, x: jnp.sum(jax.vmap(m)(x) ** 2, axis=1) / m.weight.shape[0]
    value, grads, _ = value_grad_and_curvature(loss)(LINEAR, X)
    value_, grads_, _ = value_grad_and_curvature(scaled)(LINEAR, X)
    assert value == value_ == jnp.mean(loss(LINEAR, X))
    assert relative_error(grads, grads_) == 0


def test_sums_over_time_that_mix_samples_are_refused():
    with pytest.raises(ValueError, match="sample by sample"):
        curvature_of("inside", "reduce")


def test_stochastic_equations_are_refused():
    def loss(model, x):
        def one_sample(y):
            path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jr.PRNGKey(0))
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: model(y)),
                diffrax.ControlTerm(lambda t, y, args: 0.1 * y, path),
            )
            return nodegrad.odesolve(
                terms, diffrax.Heun(), 0.0, 1.0, 0.1, y, max_steps=16
            ).ys[0]

        return jnp.sum(jax.vmap(one_sample)(x), axis=1)

    layer = eqx.nn.Linear(2, 2, key=jr.PRNGKey(0))
    with pytest.raises(ValueError, match="no limit for small steps"):
        value_grad_and_curvature(loss)(layer, X)
