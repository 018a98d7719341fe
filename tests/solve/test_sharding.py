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
    jax.shard_map, mesh=mesh, in_specs=(P(), P("b")), out_specs=P(), check_vma=False
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
