"""A program that `test_processes.py` runs on one device, and on several in processes.

    python -m tests.solve.on_devices folder port num_processes process case...

It runs the cases, and writes their numbers and facts about the compiled programs.
"""

import collections
import json
import pathlib
import re
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import nodegrad


BATCH = 8 * 23  # No other axis has this size.
TIMES = 11
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "batches_and_devices.md"
_ADJOINTS = {
    "aca": (nodegrad.ACAAdjoint(), diffrax.Bosh3()),
    "reversible": (
        nodegrad.ReversibleAdjoint(),
        nodegrad.Reversible(diffrax.Heun(), resync_every=16),
    ),
}


# What is compiled.


_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
)


def facts(compiled) -> dict:
    """What one device does: its memory, its work, and what it sends to others."""
    text = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    sent = collections.Counter()
    for shapes, kind in _COLLECTIVE.findall(text):
        sent.update(f"{kind} {s}" for s in re.findall(r"\w+\[[\d,]*\]", shapes))
    shapes = set(re.findall(r"\w+\[[\d,]*\]", text))
    return {
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"],
        "sent": dict(sent),
        "whole_batch": sorted(s for s in shapes if re.search(rf"\b{BATCH}\b", s[3:])),
    }


# Problems.


def _network():
    net = eqx.nn.MLP(4, 4, 12, 1, jnp.tanh, key=jr.PRNGKey(0))
    return eqx.partition(net, eqx.is_inexact_array)


def _samples(rows):
    # The samples take different numbers of steps.
    x = np.random.default_rng(0).normal(size=(BATCH, 4))
    x = x * np.linspace(0.2, 4, BATCH)[:, None]
    own = np.array_split(x, jax.process_count())[jax.process_index()]
    return jax.make_array_from_process_local_data(rows, own)


def _loss(how, adjoint):
    """A sum over samples of a loss at several times."""
    adjoint, solver = _ADJOINTS[adjoint]
    solve = diffrax.diffeqsolve if how == "diffeqsolve" else nodegrad.odesolve
    # With `throw=True` Diffrax gathers the solution on one device if a solve fails.
    options = {"throw": False} if how == "diffeqsolve" else {}
    _, static = _network()

    def values(model, y0, **batched):
        net = eqx.combine(model, static)
        return solve(
            diffrax.ODETerm(lambda t, y, args: net(y)),
            solver,
            0.0,
            1.0,
            None,
            y0,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, TIMES)),
            stepsize_controller=diffrax.PIDController(1e-4, 1e-6),
            adjoint=adjoint,
            max_steps=256,
            **batched,
            **options,
        ).ys

    def loss(model, x):
        if how == "batched":
            ys = values(model, x, batched=True)
        else:
            ys = jax.vmap(lambda y0: values(model, y0))(x)
        return jnp.sum(jnp.sin(ys) ** 2)

    return loss


def gradient(mesh, how, adjoint, parallel):
    """The gradients of a batch, in shared parameters and in the samples."""
    rows, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    model = jax.device_put(_network()[0], whole)
    grad = on_one = jax.grad(_loss(how, adjoint), argnums=(0, 1))

    def mapped(model, x):
        ct_model, ct_x = on_one(model, x)
        return jax.lax.psum(ct_model, "batch"), ct_x

    if parallel == "shard_map":
        specs = (P(), P("batch"))
        grad = jax.shard_map(
            mapped, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
        )
    x = _samples(rows)
    compiled = jax.jit(grad).lower(model, x).compile()
    ct_model, ct_x = compiled(model, x)
    assert ct_x.sharding.is_equivalent_to(rows, 2)
    total = jax.jit(lambda x: jnp.sum(x * jnp.arange(1.0, 5.0), axis=0))(ct_x)
    return (ct_model, total), {"gradient": facts(compiled)}


def _losses(net, x):
    """A loss for every sample, from one solve of the whole batch."""
    field = lambda t, y, args: net(y)
    sol = nodegrad.odesolve(
        field, diffrax.Heun(), 0.0, 1.0, 0.25, x, batched=True, max_steps=4
    )
    return jnp.sum((sol.ys[:, 0] + x) ** 2, axis=1)


def curvature(mesh):
    """Loss, gradient and factors of a batch, summed over devices."""
    model, static = _network()
    curvature_fn = nodegrad.value_grad_and_curvature(_losses)

    def total(model, x):
        value, grads, factors = curvature_fn(eqx.combine(model, static), x)
        grads = eqx.filter(grads, eqx.is_inexact_array)
        means = jax.lax.pmean((value, grads), "batch")
        return means, jax.lax.psum(factors, "batch")

    total = jax.shard_map(
        total, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=False
    )
    x = _samples(NamedSharding(mesh, P("batch")))
    model = jax.device_put(model, NamedSharding(mesh, P()))
    compiled = jax.jit(total).lower(model, x).compile()
    return compiled(model, x), {"curvature": facts(compiled)}


def make_steps(mesh):
    """SNOpt on a sharded batch, with the curvature of the whole batch."""
    rows, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    model, static = _network()
    optim = nodegrad.snopt(0.1, momentum=0.5)
    _, refresh = nodegrad.make_steps(optim, _losses, moments=True)
    x, state = _samples(rows), optim.init(model)
    net = eqx.combine(jax.device_put(model, whole), static)
    state = jax.device_put(state, whole)
    compiled = refresh.lower(net, state, x, key=jr.PRNGKey(0)).compile()
    values = []
    for i in range(3):
        net, state, value = compiled(net, state, x, key=jr.PRNGKey(i))
        values.append(value)
    arrays = eqx.filter(net, eqx.is_array), state, values
    return arrays, {"refresh": facts(compiled.compiled)}


def guide():
    """The program of the guide, with more digits."""
    code, _ = re.findall(
        r"```python\n((?:(?!```).)*jax\.shard_map.*?)```", PAGE.read_text(), re.S
    )
    found, marker = {}, "    @jax.jit\n    def step("
    assert marker in code

    def recorded(fn):
        compiled = []

        def run(*args):
            if not compiled:
                compiled.append(jax.jit(fn).lower(*args).compile())
                found["refresh" if len(found) == 0 else "step"] = facts(compiled[0])
            return compiled[0](*args)

        return run

    names = {"recorded": recorded}
    exec(code.replace(marker, marker.replace("jax.jit", "recorded")), names)
    return (names["model"], names["state"], names["value"]), found


# The command.


def main(folder, port, num_processes, process, *cases):
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60
        )
        assert jax.process_count() == num_processes
    mesh = Mesh(jax.devices(), ("batch",))
    found = {"devices": jax.device_count()}
    for case in cases:
        name, *options = case.split(":")
        if name == "guide":
            arrays, found[case] = guide()
        elif name == "curvature":
            arrays, found[case] = curvature(mesh)
        elif name == "make_steps":
            arrays, found[case] = make_steps(mesh)
        else:
            arrays, found[case] = gradient(mesh, *options)
        # All devices have these arrays, so any of them can be read.
        found[case]["arrays"] = [
            np.asarray(x.addressable_data(0)).ravel().tolist()
            for x in jax.tree.leaves(arrays)
        ]
    path = pathlib.Path(folder) / f"{num_processes}_{process}.json"
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    folder, port, num_processes, process, *cases = sys.argv[1:]
    main(folder, int(port), int(num_processes), int(process), *cases)
