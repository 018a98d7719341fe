"""The main calls with the types of all arguments checked when the program runs.

A user of jaxtyping and beartype may check Diffrax and nodegrad as well. The hook has to
be installed before the modules are imported, so this is a process of its own.
"""

import subprocess
import sys
import textwrap

import pytest


_CALLS = """
    import jaxtyping

    with jaxtyping.install_import_hook(["nodegrad", "diffrax"], "beartype.beartype"):
        import diffrax
        import nodegrad

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    pid, constant = diffrax.PIDController(1e-4, 1e-4), diffrax.ConstantStepSize()
    saveat = diffrax.SaveAt(ts=[0.2, 0.5], steps=2, t1=True, dense=True)
    aca = diffrax.Tsit5(), nodegrad.ACAAdjoint()
    reversible = (
        nodegrad.Reversible(diffrax.Bosh3()), nodegrad.ReversibleAdjoint(check=True)
    )

    def loss(k, door, method, controller, **settings):
        solver, adjoint = method
        dt0 = 0.1 if controller is constant else None
        sol = door(
            diffrax.ODETerm(lambda t, y, k: -k * y), solver, 0.0, 1.0, dt0,
            jnp.ones(2), k, stepsize_controller=controller, adjoint=adjoint,
            saveat=saveat, max_steps=64, **settings,
        )
        return jnp.sum(sol.ys[0]) + jnp.sum(sol.evaluate(0.3))

    # Types are checked while a program is traced. One is run, too.
    k = jnp.array(0.7)
    f = lambda k: loss(k, nodegrad.odesolve, aca, constant)
    assert jnp.isfinite(f(k))
    jax.eval_shape(jax.grad(f), k)
    for door, method, controller in [
        (nodegrad.odesolve, aca, pid),
        (nodegrad.odesolve, reversible, constant),
        (diffrax.diffeqsolve, aca, constant),
        (diffrax.diffeqsolve, aca, pid),
    ]:
        g = lambda k: loss(k, door, method, controller)
        jax.eval_shape(jax.grad(g), k)
        jax.eval_shape(lambda k: jax.jvp(g, (k,), (k,)), k)
    jax.eval_shape(jax.grad(lambda k: jnp.sum(jax.vmap(f)(k))), jnp.ones(2))
    jax.eval_shape(lambda k: nodegrad.hvp(f, k, k), k)
    blocks = lambda k: nodegrad.hessian_blocks(
        lambda t, y, k: -k * y, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.ones(2), k,
        terminal_cost=lambda y: jnp.sum(y), exact=True, ts=[0.0, 0.5],
    )
    assert jax.eval_shape(blocks, k).value.shape == (2,)

    x, model = jnp.ones((4, 2)), eqx.nn.Linear(2, 2, key=jax.random.PRNGKey(0))
    field = lambda t, y, model: model(y)

    def losses(model, x):
        sol = nodegrad.odesolve(
            field, diffrax.Heun(), 0.0, 1.0, 0.25, x, model, batched=True, max_steps=8
        )
        return jnp.sum(sol.ys**2, axis=(1, 2))

    optim = optax.chain(nodegrad.scale_by_snopt("paper"), optax.scale(-0.1))
    steps = nodegrad.make_steps(optim, losses)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    refresh = eqx.Partial(steps.refresh, key=jax.random.PRNGKey(1))
    _, _, value = eqx.filter_eval_shape(refresh, model, state, x)
    print("checked", value.shape == ())
"""


@pytest.mark.slow
def test_arguments_have_the_types_that_are_annotated():
    pytest.importorskip("beartype")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_CALLS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "checked True\n", run.stderr[-3000:]
