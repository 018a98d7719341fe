"""Data parallelism on eight forced host devices."""

import os
import subprocess
import sys

import pytest


_SCRIPT = """
import jax
jax.config.update("jax_enable_x64", True)
import diffrax, functools, jax.numpy as jnp, jax.random as jr, nodegrad
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = Mesh(jax.devices(), ("b",))
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


@pytest.mark.slow
def test_sharded_gradients_equal_those_of_one_device():
    flags = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all equal" in run.stdout
