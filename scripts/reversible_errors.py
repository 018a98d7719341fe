"""How often `Reversible` is wrong, or says that it failed, on 320 random problems.

Writes a JSON file, from which the documentation makes a table. A solve counts as wrong
if it is called successful, and its error at the end time exceeds that of the base
solver alone by more than ten tolerances, and by more than ten times the error of the
base solver: problems that amplify perturbations amplify those of the coupling as well.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

import nodegrad


NUM_PROBLEMS = 40  # of each kind
TOLERANCES = 1e-9, 1e-3
MAX_STEPS = 20_000


class Kind(NamedTuple):
    """A kind of problems: `sample(key)` returns `(args, y0)` of a random one."""

    sample: Callable[[Array], tuple[PyTree[Array], Array]]
    field: Callable[[Array, Array, Any], Array]
    t1: float


def _log_uniform(key: Array, low: float, high: float, shape: tuple[int, ...]) -> Array:
    return jnp.exp(jr.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high)))


def _linear(key: Array) -> tuple[PyTree[Array], Array]:
    keys = jr.split(key, 3)
    basis, _ = jnp.linalg.qr(jr.normal(keys[0], (4, 4)))
    decay = basis @ jnp.diag(_log_uniform(keys[1], 0.05, 15.0, (4,))) @ basis.T
    turn = jnp.kron(jnp.eye(2), jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
    return 3 * jr.normal(keys[2]) * turn - decay, jr.normal(keys[0], (4,))


def _forced(key: Array) -> tuple[PyTree[Array], Array]:
    return _log_uniform(key, 0.4, 20.0, (3,)), jr.normal(key, (3,))


def _pendulum(key: Array) -> tuple[PyTree[Array], Array]:
    return jnp.exp(0.7 * jr.normal(key, (3,))), 1.5 * jr.normal(key, (2,))


def _lorenz(key: Array) -> tuple[PyTree[Array], Array]:
    factors = 1 + 0.2 * jr.normal(key, (3,))
    y0 = 5 * jr.normal(key, (3,)) + jnp.array([0.0, 0.0, 20.0])
    return jnp.array([10.0, 28.0, 8 / 3]) * factors, y0


def _predators(key: Array) -> tuple[PyTree[Array], Array]:
    rates = jnp.array([1.5, 1.0, 3.0, 1.0]) * jnp.exp(0.3 * jr.normal(key, (4,)))
    return rates, jnp.exp(0.3 * jr.normal(key, (2,)))


def _relaxation(key: Array) -> tuple[PyTree[Array], Array]:
    return _log_uniform(key, 0.4, 12.0, ()), 2 * jr.normal(key, (2,))


def _network(key: Array) -> tuple[PyTree[Array], Array]:
    keys = jr.split(key, 4)
    gain = _log_uniform(keys[0], 0.6, 4.5, ())
    inner = gain / 2 * jr.normal(keys[1], (16, 4))
    outer = gain / 4 * jr.normal(keys[2], (4, 16))
    decay = _log_uniform(keys[3], 0.05, 4.5, ())
    return (inner, outer, decay), jr.normal(keys[3], (4,))


def _autonomous(field: Callable[[Array, Any], Array]) -> Callable[..., Array]:
    def with_time(t: Array, y: Array, args: Any) -> Array:
        del t
        return field(y, args)

    return with_time


def _predation(y: Array, a: Array, growth: ArrayLike) -> Array:
    met = growth * y[0] * y[1]
    return jnp.stack([a[0] * y[0] - a[1] * met, a[3] * met - a[2] * y[1]])


def _network_field(y: Array, p: tuple[Array, Array, Array]) -> Array:
    return p[1] @ jnp.tanh(p[0] @ y) - p[2] * y


KINDS = {
    "linear": Kind(_linear, _autonomous(lambda y, a: a @ y), 5.0),
    "decaying": Kind(_forced, lambda t, y, a: -a * (y - jnp.cos(t)), 5.0),
    "oscillating": Kind(
        _pendulum,
        lambda t, y, a: jnp.stack(
            [y[1], -(a[0] ** 2) * jnp.sin(y[0]) + 0.1 * a[1] * jnp.cos(a[2] * t)]
        ),
        20.0,
    ),
    "chaotic": Kind(
        _lorenz,
        _autonomous(
            lambda y, a: jnp.stack(
                [
                    a[0] * (y[1] - y[0]),
                    y[0] * (a[1] - y[2]) - y[1],
                    y[0] * y[1] - a[2] * y[2],
                ]
            )
        ),
        5.0,
    ),
    "periodic": Kind(_predators, _autonomous(lambda y, a: _predation(y, a, 1.0)), 10.0),
    "stiffening": Kind(_predators, lambda t, y, a: _predation(y, a, t), 10.0),
    "relaxing": Kind(
        _relaxation,
        _autonomous(
            lambda y, mu: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])
        ),
        10.0,
    ),
    "network": Kind(_network, _autonomous(_network_field), 5.0),
}
SOLVERS = {
    "Reversible(Tsit5())": nodegrad.Reversible(diffrax.Tsit5()),
    "Reversible(Bosh3())": nodegrad.Reversible(diffrax.Bosh3()),
    "Reversible(Tsit5(), resync_every=None)": nodegrad.Reversible(
        diffrax.Tsit5(), resync_every=None
    ),
    "Reversible(Tsit5(), coupling_parameter=0.9, resync_every=None)": (
        nodegrad.Reversible(diffrax.Tsit5(), 0.9, resync_every=None)
    ),
    "Reversible(Tsit5(), resync_every=10)": nodegrad.Reversible(
        diffrax.Tsit5(), resync_every=10
    ),
    "Reversible(Bosh3(), resync_every=10)": nodegrad.Reversible(
        diffrax.Bosh3(), resync_every=10
    ),
}


class Outcome(NamedTuple):
    """What came of the problems of a kind; arrays of shape `(problems,)`."""

    y1: Float[Array, "problems d"]
    successful: Array
    lost: Array
    steps: Array
    resyncs: Array


def solve(
    kind: Kind, solver: diffrax.AbstractSolver, args: PyTree, y0: Array, tol: Array
) -> Outcome:
    """Solves all problems of a kind in one batch, each with its tolerance."""

    def one(args: PyTree, y0: Array, tol: Array) -> Outcome:
        sol = nodegrad.odesolve(
            kind.field,
            solver,
            0.0,
            kind.t1,
            None,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=MAX_STEPS,
            throw=False,
        )
        successful = sol.result == nodegrad.RESULTS.successful
        lost = sol.result == nodegrad.RESULTS.coupling_lost
        assert sol.ys is not None
        steps = sol.stats["num_steps"]
        resyncs = sol.stats.get("num_resyncs", jnp.zeros_like(steps))
        return Outcome(sol.ys[0], successful, lost, steps, resyncs)

    return jax.jit(jax.vmap(one))(args, y0, tol)


def measure() -> dict[str, dict[str, float]]:
    """Returns the counts and medians for every solver."""
    low, high = np.log(TOLERANCES)
    tol = jnp.exp(jr.uniform(jr.PRNGKey(7), (NUM_PROBLEMS,), minval=low, maxval=high))
    found = {name: [] for name in SOLVERS}
    for seed, kind in enumerate(KINDS.values()):
        keys = jr.split(jr.PRNGKey(seed), NUM_PROBLEMS)
        problems = jax.vmap(kind.sample)(keys)
        truth = solve(kind, diffrax.Dopri8(), *problems, jnp.full_like(tol, 1e-12)).y1

        def error(outcome: Outcome, truth: Array = truth) -> np.ndarray:
            scaled = (outcome.y1 - truth) / (tol[:, None] * (1 + jnp.abs(truth)))
            return np.asarray(jnp.sqrt(jnp.mean(scaled**2, axis=1)))

        bases = {type(solver.solver): solver.solver for solver in SOLVERS.values()}
        of_base = {cls: solve(kind, bases[cls], *problems, tol) for cls in bases}
        for name, solver in SOLVERS.items():
            base = of_base[type(solver.solver)]
            ours = solve(kind, solver, *problems, tol)
            beyond = error(ours) - error(base)
            ok = np.asarray(ours.successful)
            found[name].append(
                dict(
                    problems=len(ok),
                    wrong=ok & ~(beyond <= np.maximum(10, 10 * error(base))),
                    beyond=ok & ~(beyond <= 10),
                    lost=np.asarray(ours.lost),
                    failed=~ok & ~np.asarray(ours.lost),
                    steps=np.asarray(ours.steps / base.steps)[ok],
                    resyncs=np.asarray(ours.resyncs)[ok],
                )
            )
            print(f"{name}, kind {seed + 1} of {len(KINDS)}", flush=True)
    return {name: _summary(rows) for name, rows in found.items()}


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    count = lambda key: int(sum(np.sum(row[key]) for row in rows))
    keys = "problems", "wrong", "beyond", "lost", "failed"
    steps = np.median(np.concatenate([row["steps"] for row in rows]))
    resyncs = np.concatenate([row["resyncs"] for row in rows])
    return {
        **{key: count(key) for key in keys},
        "steps": float(steps),
        "resyncs": float(np.median(resyncs)),
        "many_resyncs": float(np.quantile(resyncs, 0.9)),
    }


def main() -> None:
    """Measures, and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path("docs") / "benchmarks" / "reversible_errors.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    text = json.dumps(measure(), indent=1)
    arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
