"""Time and memory of a gradient against the number of steps.

The problem is that of the published figure: a network with one input, ten units and
one output, solved by the midpoint method with steps of 0.01.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from benchmarks.measure import EvaluationCounter
from matplotlib.axes import Axes

from . import adjoints
from .experiment import Claim, Experiment, number, Report, Result, Setting, Table


SIZE = 0.01
METHODS: dict[str, adjoints.Solve] = {
    "reversible": adjoints.reversible(diffrax.Midpoint()),
    "2 checkpoints": adjoints.checkpointed(diffrax.Midpoint(), 2),
    "4 checkpoints": adjoints.checkpointed(diffrax.Midpoint(), 4),
    "8 checkpoints": adjoints.checkpointed(diffrax.Midpoint(), 8),
    "Diffrax's default": adjoints.checkpointed(diffrax.Midpoint()),
    "ACAAdjoint": adjoints.aca(diffrax.Midpoint()),
}
#: Seconds of the authors' runs in 1000 steps. They label the fourth with 1 checkpoint,
#: but at other times their script ran Diffrax's default under that label.
PUBLISHED = {
    "reversible": 0.0726,
    "2 checkpoints": 15.04,
    "4 checkpoints": 1.676,
    "8 checkpoints": 0.632,
    "Diffrax's default": 0.296,
}
PUBLISHED_STEPS = 1000
#: The methods whose evaluations are counted.
COUNTED = "reversible", "Diffrax's default"
#: Seconds of the authors' reversible run in 100 steps.
PUBLISHED_SHORT = 0.0117


def gradient(solve: adjoints.Solve, steps: int, counter: Any = None) -> Any:
    """`(params, y0) -> (loss, gradients)` in so many steps, counted if wished."""
    static = eqx.partition(network(), eqx.is_array)[1]

    def loss(params__y0: Any) -> Any:
        params, y0 = params__y0
        model = eqx.combine(params, static)

        def field(t: Any, y: Any, args: Any) -> Any:
            del t, args
            return model(y)

        counted = field if counter is None else counter.instrument(field)
        term = diffrax.ODETerm(counted)
        sol = solve(term, 0.0, SIZE * steps, SIZE, y0, max_steps=steps)
        return jnp.sum(sol.ys**2)

    return lambda *params__y0: jax.value_and_grad(loss)(params__y0)


def network() -> eqx.nn.MLP:
    """One input, ten units, one output."""
    return eqx.nn.MLP(1, 1, 10, 1, jnp.tanh, key=jr.PRNGKey(0))


def measure(steps: int, methods: Sequence[str], seconds: float) -> Result:
    """Seconds and temporary memory of each method in so many steps."""
    args = eqx.filter(network(), eqx.is_array), jnp.array([1.0])
    programs = {
        method: adjoints.compiled(gradient(METHODS[method], steps), *args)
        for method in methods
    }
    return {
        "seconds": adjoints.seconds_per_call(programs, args, seconds, once_above=1.0),
        "bytes": {method: p.temp_bytes for method, p in programs.items()},
    }


def count(steps: int) -> Result:
    """How often a gradient evaluates the vector field in a step; pullbacks are none."""
    args, out = (eqx.filter(network(), eqx.is_array), jnp.array([1.0])), {}
    for method in COUNTED:
        counter = EvaluationCounter()
        program = adjoints.compiled(gradient(METHODS[method], steps, counter), *args)
        out[method] = counter.count(lambda p=program: p.run(*args)) / steps
    return out


def numbers_of_steps(setting: Setting) -> Sequence[int]:
    """The numbers of steps of a size."""
    published = tuple(range(100, 1001, 100))
    return setting.pick((5, 20), (100, 300, 1000), published)


def tasks(setting: Setting) -> dict[str, Any]:
    """One for each number of steps."""
    methods = tuple(METHODS)
    methods = setting.pick(methods[:1], methods, methods)
    seconds = setting.pick(0.01, 2.0, 10.0)
    numbers = numbers_of_steps(setting)
    out: dict[str, Any] = {
        f"{steps}-steps": partial(measure, steps, methods, seconds) for steps in numbers
    }
    if setting.size != "smoke":
        out["evaluations"] = partial(count, numbers[-1])
    return out


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """How time and memory grow, and ratios in the largest number of steps."""
    steps = numbers_of_steps(setting)
    by_steps = [results[f"{n}-steps"] for n in steps]
    methods = list(by_steps[0]["seconds"])
    seconds = {m: [r["seconds"][m] for r in by_steps] for m in methods}
    memory = {m: [r["bytes"][m] for r in by_steps] for m in methods}
    rows = []
    for method in methods:
        published = PUBLISHED.get(method)
        theirs = None if published is None else published / PUBLISHED["reversible"]
        ours = seconds[method][-1] / seconds["reversible"][-1]
        rows.append(
            [
                method,
                *(number(1e3 * s) for s in seconds[method]),
                f"{exponent(steps, seconds[method]):.2f}",
                None if theirs is None else f"{theirs:.1f}",
                f"{ours:.2f}" if ours < 10 else f"{ours:.1f}",
                memory[method][0],
                memory[method][-1],
            ]
        )
    columns = [
        "gradient",
        *(f"ms, {n} steps" for n in steps),
        "exponent of the number of steps",
        "time to reversible, paper",
        f"time to reversible, {steps[-1]} steps, ours",
        f"bytes, {steps[0]} steps",
        f"bytes, {steps[-1]} steps",
    ]
    table = Table("Time and temporary memory of a gradient", columns, rows)
    notes = (
        "Computing time of the compiled gradient, median of repeated calls. The "
        "published script calls Diffrax without compiling the gradient around it, so "
        "that each call does some work in Python too.",
        "As in the published runs, checkpoints are those of Diffrax on the base "
        "method. `ACAAdjoint` is on the base method as well, and not in the paper.",
        "The published numbers labelled with 1 checkpoint are compared with Diffrax's "
        "default, which for 1000 steps is 44: with one they could not be so small.",
        "On an NVIDIA H100, where a step costs launches of kernels, the published "
        "ratios are there: in 300 steps 2 checkpoints take 329 times as long as "
        "reversible and Diffrax's default 3.2 times, in 1000 steps the latter 3.0 "
        "times (docs/benchmarks/reversible-gpu.json; other programs ran beside it).",
    )
    figures = {
        "time (s)": partial(draw, steps, seconds),
        "temporary memory (bytes)": partial(draw, steps, memory),
    }
    claims = _growth_claims(steps, seconds["reversible"], memory["reversible"])
    if steps[-1] == PUBLISHED_STEPS:
        last = {m: s[-1] for m, s in seconds.items()}
        claims += _ratio_claims(last, results["evaluations"])
    return Report((table,), tuple(claims), figures, notes)


def exponent(steps: Sequence[int], values: Sequence[float]) -> float:
    """Of the power law through all points."""
    return float(np.polyfit(np.log(steps), np.log(values), 1)[0])


def _growth_claims(
    steps: Sequence[int], seconds: Sequence[float], memory: Sequence[int]
) -> list[Claim]:
    grown, published = memory[-1] / memory[0], PUBLISHED["reversible"] / PUBLISHED_SHORT
    power = exponent(steps, seconds)
    return [
        Claim(
            "the time of the reversible method is linear in the number of steps",
            f"{published:.1f} times as long in ten times as many",
            f"{seconds[-1] / seconds[0]:.1f} times as long in "
            f"{steps[-1] / steps[0]:.0f} times as many (exponent {power:.2f})",
            power < 1.1,
            "" if power < 1.1 else "the time grows faster than the number of steps",
        ),
        Claim(
            "the memory of the reversible method does not grow with the steps",
            "two states",
            f"{memory[0]} bytes in {steps[0]} steps, {memory[-1]} in {steps[-1]}",
            grown < 1.05,
            "" if grown < 1.05 else f"it grows by a factor of {grown:.2f}",
        ),
    ]


def _ratio_claims(
    seconds: Mapping[str, float], evaluations: Mapping[str, float]
) -> list[Claim]:
    """That reversible is faster than checkpoints, by at least some factors."""
    claims = []
    counts = " and ".join(f"{evaluations[m]:.1f} ({m})" for m in COUNTED)
    step = number(1e6 * seconds["reversible"] / PUBLISHED_STEPS)
    reason = (
        f"a step takes {step} μs here and took 73 μs there. By evaluations of the "
        f"vector field, {counts} a step, there is little to be gained: the published "
        "ratio is one of the cost of loops on the authors' machine"
    )
    limits = {"2 checkpoints": 100.0, "Diffrax's default": 2.5}
    for method, limit in limits.items():
        theirs = PUBLISHED[method] / PUBLISHED["reversible"]
        ours = seconds[method] / seconds["reversible"]
        behind = " (behind the paper's ratio)" if ours < theirs else ""
        claims.append(
            Claim(
                f"reversible is at least {limit:g} times faster than {method}",
                f"{theirs:.1f} times",
                f"{ours:.1f} times{behind}",
                ours >= limit,
                "" if ours >= limit else reason,
            )
        )
    return claims


def draw(steps: Sequence[int], values: Mapping[str, Any], axes: Axes) -> None:
    """One curve for each method."""
    for method, curve in values.items():
        axes.loglog(steps, curve, "o-", label=method)
    axes.set(xlabel="steps")
    axes.legend(fontsize=7)


EXPERIMENT = Experiment(
    name="run_time",
    title="Run time and memory against the number of steps",
    source="McCallum and Foster (2024), figure of run time",
    tasks=tasks,
    report=report,
)
