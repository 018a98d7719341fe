"""Data parallelism on eight forced host devices."""

import os
import subprocess
import sys

import pytest


_PREAMBLE = """
import jax
jax.config.update("jax_enable_x64", True)
import diffrax, equinox as eqx, functools, jax.numpy as jnp, jax.random as jr, nodegrad
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = Mesh(jax.devices(), ("b",))
"""

_GRADIENTS = """
w = jr.normal(jr.PRNGKey(0), (4, 4)) / 2
ys = jr.normal(jr.PRNGKey(1), (16, 4)) * jnp.arange(1.0, 17.0)[:, None] / 4

def solve(w, y, solver, **kwargs):
    return solver(
        diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)), diffrax.Tsit5(), 0.0, 1.0,
        None, y, w, stepsize_controller=diffrax.PIDController(1e-5, 1e-7),
        adjoint=nodegrad.ACAAdjoint(), **kwargs,
    ).ys

def lanes(solver):
    return lambda w, ys: jnp.sum(jax.vmap(lambda y: solve(w, y, solver))(ys) ** 2)

def batched(w, ys):
    return jnp.sum(solve(w, ys, nodegrad.odesolve, batched=True) ** 2)

def check(ours, reference):
    for a, b in zip(ours, reference):
        assert jnp.max(jnp.abs(a - b)) < 1e-12 * jnp.max(jnp.abs(b)), (a, b)

sharded = jax.device_put(ys, NamedSharding(mesh, P("b")))
for loss in (lanes(nodegrad.odesolve), lanes(diffrax.diffeqsolve), batched):
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    reference = grad(w, ys)
    out = grad(w, sharded)
    check(out, reference)
    assert not out[1].sharding.is_fully_replicated

# Without the check of `shard_map`, the user sums the gradient of shared parameters.
loss = lanes(nodegrad.odesolve)
reference = jax.grad(loss, argnums=(0, 1))(w, ys)

@functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(P(), P("b")), out_specs=(P(), P("b")),
    check_vma=False,
)
def mapped(w, ys):
    grad_w, grad_ys = jax.grad(loss, argnums=(0, 1))(w, ys)
    return jax.lax.psum(grad_w, "b"), grad_ys

check(jax.jit(mapped)(w, sharded), reference)
print("all equal")
"""

# Every device solves one sample, with a rate of its own: steps differ in number.
_MAPPED = """
from jax.lax import psum

w = jr.normal(jr.PRNGKey(0), (2, 2)) / 2
ys = jr.normal(jr.PRNGKey(1), (8, 2))
rates = jnp.linspace(0.1, 2.0, 8)
at = w, ys, rates
tangents = jr.normal(jr.PRNGKey(2), (2, 2)), ys / 3, rates / 5
specs = P(), P("b"), P("b")
field = lambda t, y, args: jnp.tanh(args[0] @ y) - args[1] * y
pid = diffrax.PIDController(1e-5, 1e-7)
ts = jnp.linspace(0.1, 3.0, 4)

def mapped(fn, specs=specs, out_specs=P(), **kwargs):
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out_specs, **kwargs)

def solution(w, ys, rates, *, door=nodegrad.odesolve, closure=False, dt0=None,
             solver=diffrax.Tsit5(), adjoint=nodegrad.ACAAdjoint(), **kwargs):
    args = w, rates[0]
    # In a closure, the array that devices share and that of each must both be found.
    of_closure = lambda t, y, _: field(t, y, args)
    term = diffrax.ODETerm(of_closure if closure else field)
    controller = pid if dt0 is None else diffrax.ConstantStepSize()
    y0 = ys if kwargs.get("batched") else ys[0]
    return door(
        term, solver, 0.0, 3.0, dt0, y0, None if closure else args, adjoint=adjoint,
        stepsize_controller=controller, max_steps=512, **kwargs,
    )

def squares(*at, **kwargs):
    sol = solution(*at, **kwargs)
    out = jax.vmap(sol.evaluate)(ts) if sol.ys is None else sol.ys
    return jnp.sum(jnp.where(jnp.isfinite(out), out, 0) ** 2)

def losses(**kwargs):
    one = functools.partial(squares, **kwargs)
    on_one_device = lambda w, ys, rates: jnp.sum(
        jax.vmap(lambda y, rate: one(w, y[None], rate[None]))(ys, rates)
    )
    return one, on_one_device, mapped(lambda *at: psum(one(*at), "b"))

def check(ours, reference, tol=1e-12):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    for a, b in pairs:
        assert jnp.max(jnp.abs(a - b)) < tol * jnp.max(jnp.abs(b)), (a, b)
"""

_DERIVATIVES = """
number = lambda *at: solution(*at).stats["num_steps"][None]
steps = jax.jit(mapped(number, out_specs=P("b")))(*at)
assert len(set(steps.tolist())) > 4, steps

gradient = lambda f: jax.value_and_grad(f, argnums=(0, 1, 2))
first = lambda f: lambda *at: [gradient(f)(*at)]
both = lambda f: lambda *at__v: jax.jvp(gradient(f), at__v[:3], at__v[3:])

def inside(fn, *at):
    pairs = fn(*at)
    return [(psum(value, "b"), grads) for value, grads in pairs]

for kwargs, derivatives, operands in (
    # First and second derivatives.
    (dict(closure=True), both, (*at, *tangents)),
    (dict(door=diffrax.diffeqsolve, throw=False), first, at),
):
    one, on_one_device, on_all = losses(**kwargs)
    reference = jax.jit(derivatives(on_one_device))(*operands)
    # Those of the whole, and those of what each device does. Adaptive solves differ
    # by up to 1.2e-12; it was not found out whether rounding moves their steps.
    check(jax.jit(derivatives(on_all))(*operands), reference, 1e-11)
    of_one = functools.partial(inside, derivatives(one))
    of_all = mapped(
        of_one, specs * (len(operands) // 3), [(P(), specs)] * len(reference)
    )
    check(jax.jit(of_all)(*operands), reference, 1e-11)
print("all equal")
"""

_PROGRAM = """
# No step is made twice, and the only collective is outside of all loops.
for kwargs in (dict(), dict(door=diffrax.diffeqsolve, throw=False)):
    one = functools.partial(squares, **kwargs)
    unchecked = mapped(lambda *at: psum(jax.grad(one)(*at), "b"), check_vma=False)
    checked = jax.grad(losses(**kwargs)[2])
    texts = [jax.jit(f).lower(*at).as_text() for f in (unchecked, checked)]
    loops = [text.count("stablehlo.while") for text in texts]
    assert loops[0] == loops[1], loops
    assert [text.count("stablehlo.all_reduce") for text in texts] == [1, 1]

def refuses(fn, *words):
    try:
        jax.jit(fn).lower(*at)
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

def total(field, args=True):
    def one(w, ys, rates):
        term = diffrax.ODETerm(field(rates))
        of_args = (w, rates[0]) if args else None
        return psum(jnp.sum(nodegrad.odesolve(
            term, diffrax.Tsit5(), 0.0, 1.0, None, ys[0], of_args,
            stepsize_controller=pid,
        ).ys), "b")
    return mapped(one)

# Communication in a vector field, and in a custom derivative of it.
refuses(total(lambda _: lambda t, y, args: field(t, psum(y, "b"), args)), "collective")
index = lambda: 1.0 + jax.lax.axis_index("b")
refuses(total(lambda _: lambda t, y, args: index() * field(t, y, args)), "collective")
layer = jax.custom_vjp(lambda w, y: w @ y)
layer.defvjp(
    lambda w, y: (w @ y, (w, y)),
    lambda res, ct: (psum(jnp.outer(ct, res[1]), "b"), res[0].T @ ct),
)
summed = total(lambda _: lambda t, y, args: layer(args[0], y))
refuses(jax.grad(summed), "collective")
# Closures that are not found, and what fails in Equinox.
hidden = lambda rates: jax.jit(lambda t, y, args: -rates[0] * y)
refuses(total(hidden, args=False), "closes over", "{V:b}")
thrown = functools.partial(squares, door=diffrax.diffeqsolve)
refuses(mapped(lambda *at: psum(thrown(*at), "b")), "throw=False")
print("all equal")
"""

_VARIANTS = """
SaveAt = diffrax.SaveAt
reverses = nodegrad.ReversibleAdjoint()
for kwargs in (
    dict(dt0=0.1, saveat=SaveAt(ts=ts), adjoint=nodegrad.ACAAdjoint(4)),
    dict(dt0=0.1, saveat=SaveAt(steps=True), adjoint=nodegrad.ACAAdjoint("all")),
    dict(dt0=0.1, saveat=SaveAt(dense=True)),
    dict(solver=nodegrad.Reversible(diffrax.Tsit5()), dt0=0.1, adjoint=reverses),
    dict(solver=nodegrad.ALF(resync_every=5), dt0=0.05, adjoint=reverses),
    dict(dt0=0.1, batched=True, closure=True),
    dict(door=diffrax.diffeqsolve, throw=False, saveat=SaveAt(ts=ts), dt0=0.1),
):
    _, on_one_device, on_all = losses(**kwargs)
    gradient = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))
    check(gradient(on_all)(*at), gradient(on_one_device)(*at))
print("all equal")
"""

_BLOCKS = """
field = lambda t, y, u: -u * y**2
problem = field, diffrax.Heun(), 0.0, 1.0, 0.25
u, starts = jnp.array([0.5, 0.7]), jnp.linspace(0.5, 1.2, 16).reshape(8, 2)
terminal = dict(terminal_cost=lambda y: jnp.sum(y**2), max_steps=4)
for fn in (
    lambda y, u: nodegrad.hessian_blocks(*problem, y, u, exact=True, **terminal),
    lambda y, u: nodegrad.hessian_blocks(
        *problem, y, u, running_cost=lambda t, y, u: jnp.sum(u * y), **terminal
    ),
    lambda y, u: nodegrad.low_rank_blocks(
        *problem, y, u, columns=jnp.eye(2), max_steps=4
    ),
):
    on_each = lambda u, y: jax.tree.map(lambda x: x[None], fn(y[0], u))
    on_all = jax.shard_map(on_each, mesh=mesh, in_specs=(P(), P("b")), out_specs=P("b"))
    check(jax.jit(on_all)(u, starts), jax.vmap(lambda y: fn(y, u))(starts))
print("all equal")
"""

_CHAINS = """
import numpy as np, numpyro

ts = jnp.linspace(0.2, 2.0, 8)
data = 1.5 * jnp.exp(-0.7 * ts)
closed_form = lambda p: p[0] * jnp.exp(-p[1] * ts)
solved = lambda p: nodegrad.odesolve(
    lambda t, y, rate: -rate * y, diffrax.Tsit5(), 0.0, 2.0, None, p[0], p[1],
    stepsize_controller=diffrax.PIDController(1e-9, 1e-9),
    # The first proposals of a chain can have very large rates.
    adjoint=nodegrad.ACAAdjoint(max_recorded_steps=4096),
    saveat=diffrax.SaveAt(ts=ts), throw=False,
).ys

def chain(decay, key):
    def model():
        normal = numpyro.distributions.Normal
        p = numpyro.sample("p", normal(jnp.ones(2), 0.5).to_event(1))
        numpyro.sample("data", normal(decay(p), 0.05), obs=data)

    kernel = numpyro.infer.NUTS(model, max_tree_depth=4)
    mcmc = numpyro.infer.MCMC(
        kernel, num_warmup=40, num_samples=20, progress_bar=False
    )
    mcmc.run(key[0])
    return mcmc.get_samples()["p"]

keys = jr.split(jr.PRNGKey(0), 8)
# NumPyro's own loops do not pass the check.
chains = lambda decay: jax.jit(jax.shard_map(
    functools.partial(chain, decay), mesh=mesh, in_specs=P("b"), out_specs=P("b"),
    check_vma=False,
))(keys)
ours, reference = np.asarray(chains(solved)), np.asarray(chains(closed_form))
assert ours.shape == (160, 2)
assert np.max(np.abs(ours - reference)) < 1e-4, (ours, reference)
print("all equal")
"""

_TRAINING = """
rows, whole = NamedSharding(mesh, P("b")), NamedSharding(mesh, P())
model = eqx.nn.MLP(8, 8, 16, 1, jnp.tanh, key=jr.PRNGKey(0))
xs = jr.normal(jr.PRNGKey(1), (16, 8))

def loss(model, xs):
    ys = nodegrad.odesolve(
        lambda t, y, args: model(y), diffrax.Heun(), 0.0, 1.0, 0.25, xs, batched=True,
    ).ys[:, 0]
    return jnp.sum(ys**2, axis=1)

def split(tree):
    # Every array over its first axis, if that can be divided.
    divides = lambda x: x.ndim > 0 and len(x) % 8 == 0
    place = lambda x: jax.device_put(x, rows if divides(x) else whole)
    return jax.tree.map(lambda x: place(x) if eqx.is_array(x) else x, tree)

def check(ours, reference):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    for a, b in pairs:
        if eqx.is_array(a):
            scale = 1 + jnp.max(jnp.abs(b))
            assert jnp.max(jnp.abs(a - b)) < 1e-10 * scale, (a, b)

# Factors of devices add up to those of the batch.
curvature = nodegrad.value_grad_and_curvature(loss)
of_devices = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(P(), P("b")), out_specs=P()
)(lambda params, xs: jax.lax.psum(
    curvature(eqx.combine(params, static), xs)[2], "b"
))
params, static = eqx.partition(model, eqx.is_array)
reference = eqx.filter_jit(curvature)(model, xs)[2]
check(jax.jit(of_devices)(params, jax.device_put(xs, rows)), reference)

# A model and a state in pieces are trained as whole ones are.
optim = nodegrad.snopt(0.05, momentum=0.9)
step, refresh = nodegrad.make_steps(optim, loss, moments=True)

def train(place):
    trained = place(model)
    state = place(optim.init(eqx.filter(trained, eqx.is_inexact_array)))
    for i, run in enumerate((refresh, step, step)):
        trained, state, _ = run(trained, state, place(xs), key=jr.PRNGKey(i))
        trained, state = place(trained), place(state)
    return trained, state

trained, state = train(split)
assert not trained.layers[0].weight.sharding.is_fully_replicated
bases = [x.output_basis for x in state[0].layers.values()]
assert not any(basis.sharding.is_fully_replicated for basis in bases)
check(trained, train(lambda tree: tree)[0])
print("all equal")
"""


def run_on_eight_devices(script):
    flags = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + script],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all equal" in run.stdout


@pytest.mark.slow
def test_sharded_gradients_equal_those_of_one_device():
    run_on_eight_devices(_GRADIENTS)


@pytest.mark.slow
def test_sharded_training_with_curvature_equals_that_of_one_device():
    run_on_eight_devices(_TRAINING)


@pytest.mark.exhaustive
def test_derivatives_in_shard_map_equal_those_of_one_device():
    run_on_eight_devices(_MAPPED + _DERIVATIVES)


@pytest.mark.slow
def test_blocks_in_shard_map_equal_those_of_one_device():
    run_on_eight_devices(_MAPPED + _BLOCKS)


@pytest.mark.slow
def test_shard_map_repeats_no_step_and_refuses_what_would_deadlock():
    run_on_eight_devices(_MAPPED + _PROGRAM)


@pytest.mark.exhaustive
def test_gradients_of_every_kind_of_solve_in_shard_map():
    run_on_eight_devices(_MAPPED + _VARIANTS)


@pytest.mark.exhaustive
def test_nuts_in_shard_map_samples_as_with_the_closed_form():
    pytest.importorskip("numpyro")
    run_on_eight_devices(_CHAINS)
