"""Compares derivatives of random solves with those of Diffrax's own adjoints.

A *structure* is what a program is compiled for: vector field, solver, controller,
outputs, direction, dtype, pytree, adjoint, door and mode. Each is compiled once and run
for many random *draws* of parameters, times, save times and tolerances. The reference
is `diffrax.RecursiveCheckpointAdjoint` (for forward mode `diffrax.DirectAdjoint`) in
`diffrax.diffeqsolve`. A mismatch is made smaller, one choice after the other, as long
as it remains, and is printed as a command that repeats it.
"""

import argparse
import functools as ft
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


# Most of the time is compilation. JAX reads these flags of .ci/run when it is imported.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import nodegrad


jax.config.update("jax_enable_x64", True)

MAX_STEPS, BATCH = 100, 2
# How far the inputs are moved to measure what rounding can do, in units of rounding,
# and how many times that effect two correct programs may differ: they round differently
# in every operation, and a gradient sums over all steps.
ULPS, ROUNDINGS = 4, 1e3
# Differences below these are never a mismatch. Nonlinear solves end at a tolerance of
# 1e-10, reconstructed states carry the rounding of the whole solve.
FLOOR = {"float64": 1e-9, "float32": 1e-3}
FLOOR_INEXACT = 1e-6
# Where rounding makes more than this, there is nothing to compare.
UNSTABLE = 0.5
# `ReversibleAdjoint` refuses a gradient from this error of the reconstruction on.
REFUSED = 1e-3

# Vector fields of a state of three numbers and parameters of three numbers. The fourth
# argument is an integer parameter, 2.


def _linear(t: Any, y: Any, k: Any, n: Any) -> Any:
    del t, n
    return jnp.stack([-k[0] * y[0], k[1] * y[2], -k[2] * y[1]])


def _oscillator(t: Any, y: Any, k: Any, n: Any) -> Any:
    pull = k[0] * (1 - y[0] ** n) * y[1] - y[0]
    return jnp.stack([y[1], pull, k[1] * jnp.cos(t) - k[2] * y[2]])


def _network(t: Any, y: Any, k: Any, n: Any) -> Any:
    return jnp.tanh(k * jnp.roll(y, 1) + jnp.sin(n * t)) - y / n


def _predators(t: Any, y: Any, k: Any, n: Any) -> Any:
    del t
    eaten = y[0] * y[1]
    return jnp.stack([k[0] * y[0] - eaten, eaten - k[1] * y[1], -k[2] * y[2] ** n])


def _forcing(t: Any, y: Any, k: Any, n: Any) -> Any:
    return -5 * k * (y - jnp.cos(n * t))


FIELDS: dict[str, Callable] = {
    "linear": _linear,
    "oscillator": _oscillator,
    "network": _network,
    "predators": _predators,
    "forcing": _forcing,
}

_ROOT = diffrax.VeryChord(rtol=1e-10, atol=1e-10)
SOLVERS: dict[str, Any] = {
    "Heun": diffrax.Heun(),
    "Tsit5": diffrax.Tsit5(),
    "Euler": diffrax.Euler(),
    "Midpoint": diffrax.Midpoint(),
    "Ralston": diffrax.Ralston(),
    "Bosh3": diffrax.Bosh3(),
    "Dopri5": diffrax.Dopri5(),
    "Dopri8": diffrax.Dopri8(),
    "HalfSolver": diffrax.HalfSolver(diffrax.Midpoint()),
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "ImplicitEuler": diffrax.ImplicitEuler(root_finder=_ROOT),
    "Kvaerno3": diffrax.Kvaerno3(root_finder=_ROOT),
    "Kvaerno5": diffrax.Kvaerno5(root_finder=_ROOT),
    "RK4": nodegrad.RK4(),
    "Reversible": nodegrad.Reversible(diffrax.Bosh3(), resync_every=5),
    "ALF": nodegrad.ALF(),
}
_IMPLICIT = {"ImplicitEuler", "Kvaerno3", "Kvaerno5"}
_UNDONE = {"LeapfrogMidpoint", "ReversibleHeun", "Reversible", "ALF"}
_NO_ERROR_ESTIMATE = {"Euler", "LeapfrogMidpoint", "RK4"}

# Each makes a controller and the first step from the inputs. Times are fractions of the
# span, so that they work in both directions.
CONTROLLERS: dict[str, Callable] = {
    "constant": lambda x: (diffrax.ConstantStepSize(), x["span"] * x["part"]),
    "pid": lambda x: (_pid(x), None),
    "pid, dt0": lambda x: (_pid(x), x["span"] * 2.0),
    "step_to": lambda x: (diffrax.StepTo(_times(x, [0, 0.1, 0.15, 0.4, 0.7, 1])), None),
    "step_ts": lambda x: (
        diffrax.ClipStepSizeController(_pid(x), step_ts=_times(x, [0.3, 0.6])),
        None,
    ),
    "jump_ts": lambda x: (
        diffrax.ClipStepSizeController(_pid(x), jump_ts=_times(x, [0.25, 0.8])),
        None,
    ),
}


def _output(t: Any, y: Any, args: Any) -> Any:
    return [t * args["k"], jax.tree.leaves(y)[0]]


SAVEATS: dict[str, Callable] = {
    "t1": lambda _: diffrax.SaveAt(t1=True),
    "ts": lambda x: diffrax.SaveAt(ts=x["ts"]),
    "steps": lambda _: diffrax.SaveAt(steps=True),
    "all": lambda x: diffrax.SaveAt(t0=True, ts=x["ts"], steps=2, t1=True),
    "fn": lambda x: diffrax.SaveAt(ts=x["ts"], fn=_output),
    "subs": lambda x: diffrax.SaveAt(
        subs={"a": diffrax.SubSaveAt(ts=x["ts"]), "b": diffrax.SubSaveAt(t1=True)}
    ),
    "dense": lambda _: diffrax.SaveAt(dense=True),
}

# From the three numbers to a pytree, and back.
TREES: dict[str, tuple[Callable, Callable]] = {
    "array": (lambda v: v, lambda y: y),
    "dict": (
        lambda v: {"u": v[:2], "v": v[2]},
        lambda y: jnp.append(y["u"], y["v"]),
    ),
    "nested": (
        lambda v: (v[:1], None, [v[1:][None], jnp.zeros(0, v.dtype)]),
        lambda y: jnp.append(y[0], y[2][0][0]),
    ),
}

ADJOINTS: dict[str, Any] = {
    "ACAAdjoint()": nodegrad.ACAAdjoint(),
    "ACAAdjoint(3)": nodegrad.ACAAdjoint(3),
    "ACAAdjoint('all')": nodegrad.ACAAdjoint("all"),
    "ReversibleAdjoint()": nodegrad.ReversibleAdjoint(check=True),
}

# The simplest choice of each kind comes first: a mismatch is reduced to it if possible.
CHOICES: dict[str, list[str]] = {
    "field": list(FIELDS),
    "solver": list(SOLVERS),
    "controller": list(CONTROLLERS),
    "saveat": list(SAVEATS),
    "direction": ["forwards", "backwards"],
    "dtype": ["float64", "float32"],
    "tree": list(TREES),
    "adjoint": list(ADJOINTS),
    "door": ["native", "diffrax"],
    "mode": ["grad", "jvp", "vmap"],
}
DOORS = {"native": nodegrad.odesolve, "diffrax": diffrax.diffeqsolve}


class Structure(NamedTuple):
    """One choice of each kind: what a program is compiled for."""

    field: str
    solver: str
    controller: str
    saveat: str
    direction: str
    dtype: str
    tree: str
    adjoint: str
    door: str
    mode: str

    @property
    def is_possible(self) -> bool:
        """Whether the choices fit together."""
        fixed = self.controller in ("constant", "step_to")
        return (
            (fixed or self.solver not in _NO_ERROR_ESTIMATE)
            # Their iterations end at 1e-10, which float32 cannot reach.
            and (self.dtype == "float64" or self.solver not in _IMPLICIT)
            and (self.adjoint != "ReversibleAdjoint()" or self.solver in _UNDONE)
            # Diffrax's own forward mode raises for it: there is no reference.
            and (self.mode != "jvp" or self.solver != "HalfSolver")
        )

    @property
    def floor(self) -> float:
        """The relative difference below which nothing is a mismatch."""
        inexact = self.solver in _IMPLICIT or self.adjoint == "ReversibleAdjoint()"
        return max(FLOOR[self.dtype], FLOOR_INEXACT if inexact else 0)


def _pid(x: dict[str, Any]) -> diffrax.PIDController:
    return diffrax.PIDController(x["tol"], x["tol"])


def _times(x: dict[str, Any], fractions: list[float]) -> jax.Array:
    fractions_ = jnp.asarray(sorted(fractions), x["t0"].dtype)
    # The first and the last one have to be `t0` and `t0 + span` exactly.
    return x["t0"] + x["span"] * fractions_


def draw(structure: Structure, rng: np.random.Generator) -> dict[str, Any]:
    """Returns random inputs: the differentiated ones and the others."""
    sign = 1.0 if structure.direction == "forwards" else -1.0
    span = sign * rng.uniform(0.5, 2.0)
    ts = np.sort(rng.uniform(0.0, 1.0, 4))
    t0 = rng.uniform(-1.0, 1.0)
    numbers = dict(
        y0=rng.uniform(0.3, 1.5, 3),
        k=rng.uniform(0.3, 1.5, 3),
        t0=t0,
        span=span,
        ts=t0 + span * np.clip(ts, 0.01, 0.99),
        part=1 / rng.uniform(4, 40),
        # Tolerances that float32 can meet.
        tol=10.0 ** rng.uniform(-4.0, -2.0),
    )
    return {name: np.asarray(x, structure.dtype) for name, x in numbers.items()}


def loss(structure: Structure, reference: bool, x: dict[str, Any]) -> tuple[Any, Any]:
    """Returns a number that depends on all that was saved, and how the solve ended."""
    field, (pack, unpack) = FIELDS[structure.field], TREES[structure.tree]
    x = {**x, "tol": jax.lax.stop_gradient(x["tol"])}
    controller, dt0 = CONTROLLERS[structure.controller](x)
    if structure.controller == "pid, dt0":
        dt0 = jax.lax.stop_gradient(dt0)
    t0, t1 = x["t0"], x["t0"] + x["span"]
    args = {"k": x["k"], "n": jnp.array(2), "none": None, "unused": jnp.ones(2)}

    def vector_field(t: Any, y: Any, args: Any) -> Any:
        n = args["n"].astype(t.dtype)
        return pack(field(t, unpack(y), args["k"], n))

    adjoint = ADJOINTS[structure.adjoint]
    if reference and structure.mode == "jvp":
        adjoint = diffrax.DirectAdjoint()
    elif reference:
        adjoint = diffrax.RecursiveCheckpointAdjoint()
    sol = DOORS["diffrax" if reference else structure.door](
        diffrax.ODETerm(vector_field),
        SOLVERS[structure.solver],
        t0,
        t1,
        dt0,
        pack(x["y0"]),
        args,
        saveat=SAVEATS[structure.saveat](x),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=MAX_STEPS,
        throw=False,
    )
    okay = sol.result == diffrax.RESULTS.successful
    # The time that a failed solve reached moves with `t0` alone in nodegrad.
    fixed = lambda ts: jnp.where(okay, ts, jax.lax.stop_gradient(ts))
    saved = [*jax.tree.leaves((jax.tree.map(fixed, sol.ts), sol.ys))]
    if sol.interpolation is not None:
        inside = t0 + x["span"] * jnp.array([0.31, 0.77], t0.dtype)
        saved += [unpack(sol.evaluate(t)) for t in inside]
    # With steps that no controller rejects, Diffrax calls NaNs successful.
    okay = okay & ~jnp.any(jnp.stack([jnp.any(jnp.isnan(rows)) for rows in saved]))
    total = jnp.zeros((), t0.dtype)
    for i, rows in enumerate(saved):
        # Rows that were not written are infinite.
        rows = jnp.where(jnp.isfinite(rows), rows, 0)
        weights = jnp.cos(jnp.arange(rows.size) + i).reshape(rows.shape)
        total = total + jnp.sum(weights.astype(rows.dtype) * jnp.sin(rows))
    error = sol.stats.get("reconstruction_error", jnp.zeros(()))
    return total, (okay, sol.stats["num_accepted_steps"], error)


def program(structure: Structure, reference: bool) -> Callable:
    """Returns the jitted function of inputs and a direction to value and derivative."""
    run = ft.partial(loss, structure, reference)

    def grad(x: dict[str, Any], v: dict[str, Any]) -> Any:
        del v
        (value, aux), cotangent = jax.value_and_grad(run, has_aux=True)(x)
        return (value, cotangent), aux

    def jvp(x: dict[str, Any], v: dict[str, Any]) -> Any:
        value, tangent, aux = jax.jvp(run, (x,), (v,), has_aux=True)
        return (value, tangent), aux

    modes = {"grad": grad, "jvp": jvp, "vmap": jax.vmap(grad)}
    return jax.jit(modes[structure.mode])


class Pair(NamedTuple):
    """The two programs of a structure."""

    ours: Callable
    reference: Callable


def make_pair(structure: Structure) -> Pair:
    """Returns both programs, which compile at their first call."""
    return Pair(program(structure, False), program(structure, True))


def _apart(left: Any, right: Any) -> float:
    """The largest difference, relative to the largest number of the same kind.

    That is the value, or the derivatives in all inputs together: one may vanish. It is
    infinite if anything is not finite.
    """
    largest = 0.0
    for a, b in zip(left, right, strict=True):
        a, b = (np.hstack([np.ravel(x) for x in jax.tree.leaves(y)]) for y in (a, b))
        if not np.all(np.isfinite(a - b)):
            return float("inf")
        scale = max(np.max(np.abs(b)), 1.0)
        largest = max(largest, float(np.max(np.abs(a - b)) / scale))
    return largest


class Outcome(NamedTuple):
    """What a comparison found: its kind, the size of the difference, what was allowed.

    The kinds are "same", "other steps" (rounding decided about a step), "failed" (both
    solves), "refused" (the states could not be reconstructed), "unstable" (rounding
    changes the reference itself as much) and "mismatch".
    """

    kind: str
    difference: float
    allowed: float
    solves: int


def compare(structure: Structure, pair: Pair, rng: np.random.Generator) -> Outcome:
    """Compares both programs for one draw of the inputs."""
    num = BATCH if structure.mode == "vmap" else 1
    draws = [draw(structure, rng) for _ in range(num)]
    x = draws[0] if num == 1 else jax.tree.map(lambda *a: np.stack(a), *draws)
    v = {name: np.asarray(rng.normal(size=a.shape), a.dtype) for name, a in x.items()}
    # Tolerances have no derivative in nodegrad.
    v["tol"] = np.zeros_like(v["tol"])
    ours, (okay, steps, error) = pair.ours(x, v)
    theirs, (their_okay, their_steps, _) = pair.reference(x, v)
    error = float(np.max(error))
    if not np.array_equal(okay, their_okay):
        return Outcome("mismatch", float("inf"), 0.0, num)
    difference, kind = _apart(ours, theirs), "same"
    if not np.all(okay):
        if not np.isfinite(difference):
            # The native door keeps the solution finite, and Diffrax does not.
            return Outcome("failed", 0.0, 0.0, num)
        # Both must be the derivative of the part that was solved.
        kind = "failed"
    if not error < REFUSED:
        # The gradient is NaN, as documented.
        return Outcome("refused", 0.0, 0.0, num)
    # What rounding of the inputs makes of the reference, also with other step counts.
    eps = ULPS * np.finfo(structure.dtype).eps
    moved = {
        name: (a * (1 + eps * rng.choice([-1, 1], a.shape))).astype(a.dtype)
        for name, a in x.items()
    }
    # Save times must stay inside of the interval.
    moved = {**moved, "t0": x["t0"], "span": x["span"], "ts": x["ts"]}
    sensitivity = _apart(pair.reference(moved, v)[0], theirs)
    allowed = max(structure.floor, ROUNDINGS * sensitivity, 100 * error)
    if not np.array_equal(steps, their_steps):
        kind = "other steps"
        # Rounding decided whether a step was accepted. Both solutions are then correct
        # to the tolerance of the solve, and so are their derivatives.
        allowed = max(allowed, 100 * float(np.max(x["tol"])))
    if allowed > UNSTABLE:
        kind = "unstable"
    elif difference > allowed:
        kind = "mismatch"
    return Outcome(kind, difference, allowed, num)


def structures(seed: int) -> Iterator[Structure]:
    """Returns an endless stream of random structures without repetition."""
    rng, seen = random.Random(seed), set()
    while True:
        structure = Structure(**{k: rng.choice(v) for k, v in CHOICES.items()})
        if structure.is_possible and structure not in seen:
            seen.add(structure)
            yield structure


def shrink(structure: Structure, seed: list[int]) -> Structure:
    """Returns the simplest structure found that still has a mismatch for the draw."""

    def is_mismatch(other: Structure) -> bool:
        rng = np.random.default_rng(seed)
        return compare(other, make_pair(other), rng).kind == "mismatch"

    changed = True
    while changed:
        changed = False
        for kind, options in CHOICES.items():
            simpler = options[: options.index(getattr(structure, kind))]
            for option in simpler:
                other = structure._replace(**{kind: option})
                if other.is_possible and is_mismatch(other):
                    structure, changed = other, True
                    break
    return structure


def report(structure: Structure, seed: list[int], outcome: Outcome) -> dict[str, Any]:
    """Prints a mismatch and its reduced form; returns both for the summary."""
    print(f"\nMISMATCH {outcome.difference:.3g}, allowed {outcome.allowed:.3g}")
    print(json.dumps(structure._asdict()))
    small = shrink(structure, seed)
    text = json.dumps(small._asdict())
    draw_ = ",".join(map(str, seed))
    print(f"Repeat its reduced form:\n  scripts/fuzz --repeat '{text}' --draw {draw_}")
    return dict(
        structure=structure._asdict(),
        reduced=small._asdict(),
        draw=seed,
        difference=outcome.difference,
        allowed=outcome.allowed,
    )


def fuzz(num_solves: int, draws: int, seed: int) -> dict[str, Any]:
    """Compares at least `num_solves` solves; returns the summary."""
    start, used = time.time(), 0
    solves: dict[str, int] = {}
    mismatches: list[dict[str, Any]] = []
    largest = dict.fromkeys(CHOICES["dtype"], 0.0)
    for structure in structures(seed):
        if sum(solves.values()) >= num_solves:
            break
        pair = make_pair(structure)
        for i in range(draws):
            key = [seed, used, i]
            outcome = compare(structure, pair, np.random.default_rng(key))
            solves[outcome.kind] = solves.get(outcome.kind, 0) + outcome.solves
            if outcome.kind == "mismatch":
                mismatches.append(report(structure, key, outcome))
                break
            if outcome.kind == "same":
                sizes = largest[structure.dtype], outcome.difference
                largest[structure.dtype] = max(sizes)
            if sum(solves.values()) >= num_solves:
                break
        used += 1
        print(
            f"[{time.time() - start:5.0f} s] {sum(solves.values())} of {num_solves} "
            f"solves, {used} structures, {len(mismatches)} mismatches; "
            f"{', '.join(structure)}",
            flush=True,
        )
        # Programs are not used again, and a process may have only so many.
        if used % 20 == 0:
            jax.clear_caches()
    return dict(
        seed=seed,
        solves=sum(solves.values()),
        structures=used,
        mismatches=mismatches,
        outcomes=solves,
        largest_difference=largest,
        seconds=round(time.time() - start),
    )


def main() -> int:
    """Reads the arguments, runs, and returns 1 if there was a mismatch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solves", type=int, default=200, help="how many solves")
    parser.add_argument("--draws", type=int, default=20, help="draws a structure")
    parser.add_argument("--seed", type=int, help="of everything; random if not given")
    parser.add_argument("--output", help="a JSON file for the summary")
    parser.add_argument("--repeat", help="one structure, as JSON")
    parser.add_argument("--draw", default="0,0,0", help="the draw to repeat it with")
    options = parser.parse_args()
    if options.repeat:
        structure = Structure(**json.loads(options.repeat))
        rng = np.random.default_rng([int(i) for i in options.draw.split(",")])
        outcome = compare(structure, make_pair(structure), rng)
        print(outcome)
        return int(outcome.kind == "mismatch")
    seed = random.randrange(2**31) if options.seed is None else options.seed
    print(f"Seed {seed}")
    summary = fuzz(options.solves, options.draws, seed)
    print(json.dumps(summary, indent=2))
    if options.output:
        with open(options.output, "w") as file:
            json.dump(summary, file, indent=2)
    return int(bool(summary["mismatches"]))


if __name__ == "__main__":
    sys.exit(main())
