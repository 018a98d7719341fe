"""Solves as functions of all that moves them, and their derivatives by Diffrax."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jax.flatten_util import ravel_pytree

import nodegrad

from .matrix import DOORS
from .problems import Field, forced_pair, PAIR_ARGS, PAIR_Y0


MAX_STEPS = 64
# Of the four outputs, where a scalar is wanted.
WEIGHTS = jnp.array([1.0, -0.6, 0.3, 0.8])

# `(adjoint, solver, tolerance)`; adaptive solves take between 5 and 70 steps.
_REVERSIBLE = nodegrad.ReversibleAdjoint()
METHODS = {
    "aca": (nodegrad.ACAAdjoint(), diffrax.Tsit5(), 1e-4),
    "aca(4)": (nodegrad.ACAAdjoint(4), diffrax.Bosh3(), 1e-3),
    "aca(all)": (nodegrad.ACAAdjoint("all"), diffrax.Tsit5(), 1e-4),
    "bosh3": (_REVERSIBLE, nodegrad.Reversible(diffrax.Bosh3(), resync_every=5), 1e-3),
    "tsit5": (_REVERSIBLE, nodegrad.Reversible(diffrax.Tsit5(), resync_every=3), 1e-4),
    "alf": (_REVERSIBLE, nodegrad.ALF(), 1e-2),
    "heun": (_REVERSIBLE, diffrax.ReversibleHeun(), 1e-2),
}


def _coarse_norm(y):
    """The default norm to three digits, so that rounding does not move the steps.

    Programs that compute the same round differently. A derivative with constant step
    sizes is a function of these, so it would differ by much more than rounding.
    """
    exact = optx.rms_norm(y)
    return jax.lax.reduce_precision(exact, exponent_bits=11, mantissa_bits=8)


def _pid(tol, t0, t1, times):
    return diffrax.PIDController(tol, 0.1 * tol, norm=_coarse_norm)


def _step_to(tol, t0, t1, times):
    # Three steps from each of the times to the next.
    nodes = jnp.concatenate([t0[None], times, t1[None]])
    fractions = jnp.arange(3) / 3
    inner = nodes[:-1, None] + jnp.outer(jnp.diff(nodes), fractions)
    return diffrax.StepTo(jnp.append(inner.ravel(), t1))


def _clip(tol, t0, t1, times):
    pid = _pid(tol, t0, t1, times)
    return diffrax.ClipStepSizeController(pid, step_ts=times[:2], jump_ts=times[2:])


# Controllers `(tolerance, t0, t1, times) -> controller`, of three times, and `dt0`.
CONTROLLERS = {
    "constant": (lambda *_: diffrax.ConstantStepSize(), 0.26),
    "pid": (_pid, 0.1),
    "step_to": (_step_to, None),
    "clip": (_clip, 0.8),
}


def _scaled(scale):
    return lambda t, y, args: jax.tree.map(lambda x: scale * t * x**2, y)


SAVEATS = {
    "t1": lambda ts, scale: diffrax.SaveAt(t1=True),
    "ts": lambda ts, scale: diffrax.SaveAt(ts=ts),
    "steps": lambda ts, scale: diffrax.SaveAt(t0=True, ts=ts, steps=2),
    "fn": lambda ts, scale: diffrax.SaveAt(ts=ts, t1=True, fn=_scaled(scale)),
    "dense": lambda ts, scale: diffrax.SaveAt(dense=True),
}


def _perceptron(params):
    """Parameters inside the term, and an array that is closed over."""
    field, shift = params
    return diffrax.ODETerm(lambda t, y, args: field(t, y, args) + shift * jnp.sin(t))


# `(state, parameters, parameters -> (terms, args))`.
PROBLEMS = {
    "pair": (PAIR_Y0, PAIR_ARGS, lambda args: (diffrax.ODETerm(forced_pair), args)),
    "perceptron": (
        jnp.array([0.4, -0.8]),
        (Field(2, 2, jr.PRNGKey(0)), jnp.array([0.3, 0.5])),
        lambda params: (_perceptron(params), None),
    ),
}


class Setting(NamedTuple):
    """What a solve is made of, besides numbers."""

    problem: str
    method: str
    controller: str
    saveat: str
    door: str
    backwards: bool = False

    def __str__(self):
        direction = ["backwards"] if self.backwards else []
        return ", ".join([*self[:-1], *direction])


def inputs(setting: Setting) -> dict[str, Any]:
    """Everything that a solve is differentiated for."""
    y0, params, _ = PROBLEMS[setting.problem]
    _, dt0 = CONTROLLERS[setting.controller]
    flip = (lambda t: 3.0 - t) if setting.backwards else (lambda t: t)
    x = {
        "y0": y0,
        "params": params,
        "scale": jnp.array(0.7),
        "t0": flip(jnp.array(0.0)),
        "t1": flip(jnp.array(3.0)),
        "ts": flip(jnp.array([0.3, 1.04, 2.2])),
        # In this order in both directions: controllers want them sorted.
        "times": jnp.array([0.74, 1.6, 2.4]),
    }
    if setting.controller == "step_to":
        x["times"] = flip(x["times"])
    if dt0 is not None:
        x["dt0"] = jnp.array(-dt0 if setting.backwards else dt0)
    return x


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0.0)


def _saved(sol: diffrax.Solution, t0, t1) -> list:
    """All numbers of a solution, the times included."""
    saved = [_finite(x) for x in jax.tree.leaves((sol.ts, sol.ys))]
    if sol.interpolation is not None:
        for fraction in (0.31, 0.77):
            saved += jax.tree.leaves(sol.evaluate(t0 + fraction * (t1 - t0)))
    return saved


def succeeded(sol: diffrax.Solution) -> jax.Array:
    """One, or a NaN if the solve failed (JAX may drop the error that it raises)."""
    return jnp.where(diffrax.is_okay(sol.result), 1.0, jnp.nan)


def _summed(saved: list):
    """Four different numbers that depend on all there is."""
    numbers, _ = ravel_pytree(saved)
    weights = jnp.add.outer(jnp.arange(4.0), jnp.arange(1.0 * numbers.size))
    return jnp.cos(weights) @ jnp.sin(numbers)


def outputs(setting: Setting, adjoint=None) -> Callable[[dict], jax.Array]:
    """Four numbers of a solve, as a function of `inputs(setting)`.

    With an `adjoint`, through Diffrax's door with this one.
    """
    ours, solver, tol = METHODS[setting.method]
    solve = DOORS[setting.door] if adjoint is None else diffrax.diffeqsolve
    make_controller, _ = CONTROLLERS[setting.controller]
    _, _, make_terms = PROBLEMS[setting.problem]

    def run(x):
        terms, args = make_terms(x["params"])
        sol = solve(
            terms,
            solver,
            x["t0"],
            x["t1"],
            x.get("dt0"),
            x["y0"],
            args,
            saveat=SAVEATS[setting.saveat](x["ts"], x["scale"]),
            stepsize_controller=make_controller(tol, x["t0"], x["t1"], x["times"]),
            adjoint=ours if adjoint is None else adjoint,
            max_steps=MAX_STEPS,
        )
        return _summed(_saved(sol, x["t0"], x["t1"])) * succeeded(sol)

    return run


class Flat(NamedTuple):
    """The same as a function of one vector, and where that is differentiated."""

    run: Callable[[jax.Array], jax.Array]
    point: jax.Array
    unravel: Callable[[jax.Array], dict]

    def points(self, count: int) -> jax.Array:
        """Some points near by, whose solves differ in their numbers of steps."""
        noise = jr.normal(jr.PRNGKey(7), (count, self.point.size))
        return (1 + 0.02 * noise) * self.point[None]


def flat(setting: Setting, adjoint=None) -> Flat:
    """`outputs(setting)` as a function of one vector."""
    point, unravel = ravel_pytree(inputs(setting))
    run = outputs(setting, adjoint)
    return Flat(lambda x: run(unravel(x)), point, unravel)


@ft.cache
def oracle(setting: Setting) -> tuple[Callable, Callable]:
    """The Jacobian of the outputs, and the Hessian of their weighted sum.

    `diffrax.ForwardMode` differentiates the very loop of Diffrax, step sizes constant,
    and that twice if need be; `test_oracles_agree` holds it against the reverse mode of
    `diffrax.DirectAdjoint`, which takes several times as long to compile.
    """
    run = flat(setting, diffrax.ForwardMode()).run
    second = jax.jacfwd(jax.jacfwd(lambda x: WEIGHTS @ run(x)))
    return jax.jit(jax.jacfwd(run)), jax.jit(second)
