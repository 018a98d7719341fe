"""The settings that every adjoint is held to: controllers, outputs, directions."""

import diffrax
import jax
import jax.numpy as jnp

import nodegrad

from .problems import forced_pair, PAIR_ARGS, PAIR_Y0


DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}
TS = jnp.array([0.0, 0.01, 0.02, 0.3, 0.9, 1.0, 1.5, 1.5])
PID = diffrax.PIDController(1e-4, 1e-6)

CONTROLLERS = {
    "constant": (lambda t0, t1: diffrax.ConstantStepSize(), 0.13),
    "pid": (lambda t0, t1: PID, None),
    "pid, dt0 far too large": (lambda t0, t1: PID, 50.0),
    "step_to": (
        lambda t0, t1: diffrax.StepTo(
            t0 + (t1 - t0) * jnp.array([0.0, 0.1, 0.15, 0.4, 0.7, 1.0])
        ),
        None,
    ),
    "clip": (
        lambda t0, t1: diffrax.ClipStepSizeController(
            PID, step_ts=jnp.array([0.5, 0.9]), jump_ts=jnp.array([0.3, 1.2])
        ),
        5.0,
    ),
}

SAVEATS = {
    "t1": lambda ts: diffrax.SaveAt(t1=True),
    "ts": lambda ts: diffrax.SaveAt(ts=ts),
    "all": lambda ts: diffrax.SaveAt(t0=True, ts=ts, steps=2, t1=True),
    "fn": lambda ts: diffrax.SaveAt(
        steps=True, fn=lambda t, y, args: t * y["u"] * args["a"]
    ),
    "dense": lambda ts: diffrax.SaveAt(dense=True),
}


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0.0)


def _everything(sol, t0, t1):
    """A scalar that depends on all that was saved, times included."""
    out = jnp.array(0.0)
    for i, ys in enumerate(jax.tree.leaves(sol.ys)):
        weights = jnp.arange(1.0, len(ys) + 1).reshape((-1,) + (1,) * (ys.ndim - 1))
        out = out + jnp.sum(jnp.sin(_finite(ys) + i) * weights)
    if sol.ts is not None:
        out = out + jnp.sum(_finite(sol.ts) ** 2)
    if sol.interpolation is not None:
        for fraction in (0.31, 0.77):
            y = sol.evaluate(t0 + fraction * (t1 - t0))
            out = out + jnp.sum(y["u"] ** 2) + y["v"][0]
    return out


def value_and_grad(solve, adjoint, solver, controller, saveat, backwards=False):
    """Of everything saved, for the state, the arguments, `t0`, `t1` and `ts`."""
    make_controller, dt0 = CONTROLLERS[controller]
    sign = -1.0 if backwards else 1.0

    def run(y0, args, t0, t1, ts):
        sol = solve(
            diffrax.ODETerm(forced_pair),
            solver,
            t0,
            t1,
            None if dt0 is None else sign * dt0,
            y0,
            args,
            saveat=SAVEATS[saveat](ts),
            stepsize_controller=make_controller(t0, t1),
            adjoint=adjoint,
            max_steps=256,
        )
        return _everything(sol, t0, t1)

    t0, t1, ts = jnp.array(0.0), jnp.array(1.5), TS
    if backwards:
        t0, t1, ts = t1, t0, ts[::-1]
    differentiated = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4)))
    return differentiated(PAIR_Y0, PAIR_ARGS, t0, t1, ts)
