"""Partial differential equations by the method of lines, where memory is short.

The state is a square grid with periodic boundaries, and the parameter is a field on it:
the conductivity of the heat equation u' = k Δu, and the squared speed of the wave
equation u'' = k Δu. The gradient is that of the mean square of the final state. The
heat equation decays, the wave equation does not.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import relative_error
from matplotlib.axes import Axes

import nodegrad

from . import adjoints
from .experiment import Claim, Experiment, number, Report, Result, Setting, Table


BASE = nodegrad.RK4()
RESYNC = 10
COUPLING = 0.999
#: The authors couple more strongly where they try the heat equation.
STRONG = 0.8
METHODS: dict[str, adjoints.Solve] = {
    "backpropagation": adjoints.backpropagated(BASE),
    "Diffrax's default": adjoints.checkpointed(BASE),
    "ACAAdjoint": adjoints.aca(BASE),
    f"reversible, λ = {COUPLING}": adjoints.reversible(BASE),
    f"reversible, λ = {STRONG}": adjoints.reversible(BASE, coupling_parameter=STRONG),
    f"reversible, resync_every={RESYNC}": adjoints.reversible(
        BASE, resync_every=RESYNC
    ),
}
PLAIN, COUPLED, RESYNCED = (list(METHODS)[i] for i in (0, 3, 5))
#: The size of steps, and the mean of the parameter field.
EQUATIONS = {"heat": (1e-4, 0.1), "wave": (5e-4, 1.0)}


def laplacian(u: Any) -> Any:
    """By differences of second order, on the unit square."""
    around = sum(jnp.roll(u, shift, axis) for shift in (1, -1) for axis in (0, 1))
    return (around - 4 * u) * len(u) ** 2


def heat(t: Any, u: Any, k: Any) -> Any:
    """The vector field of the heat equation."""
    del t
    return k * laplacian(u)


def wave(t: Any, state: Any, k: Any) -> Any:
    """The vector field of the wave equation, for the field and its velocity."""
    del t
    u, velocity = state
    return velocity, k * laplacian(u)


def make_problem(equation: str, points: int) -> tuple[Any, Any, Any]:
    """Vector field, initial state and parameter field."""
    x = np.arange(points) / points
    bump = np.exp(-40 * ((x - 0.5) ** 2 + (x[:, None] - 0.4) ** 2))
    ripple = 1 + 0.3 * np.sin(2 * np.pi * x) * np.cos(2 * np.pi * x[:, None])
    u0, k = jnp.asarray(bump), jnp.asarray(EQUATIONS[equation][1] * ripple)
    if equation == "heat":
        return heat, u0, k
    return wave, (u0, jnp.zeros_like(u0)), k


def make_gradient(equation: str, method: str, steps: int) -> Any:
    """`(k, y0) -> ((loss, whether the solve failed), gradient in k)`."""
    field = {"heat": heat, "wave": wave}[equation]
    size = EQUATIONS[equation][0]

    def loss(k: Any, y0: Any) -> Any:
        sol = METHODS[method](
            diffrax.ODETerm(field),
            0.0,
            steps * size,
            size,
            y0,
            k,
            max_steps=steps,
            throw=False,
        )
        leaf = jax.tree.leaves(sol.ys)[0][-1]
        return jnp.mean(leaf**2), adjoints.failed(sol)

    return jax.value_and_grad(loss, has_aux=True)


def measure_memory(equation: str, method: str, points: int, steps: int) -> Result:
    """Temporary memory of the compiled gradient."""
    _, y0, k = make_problem(equation, points)
    program = adjoints.compiled(make_gradient(equation, method, steps), k, y0)
    return {"bytes": program.temp_bytes}


def measure(equation: str, method: str, points: int, steps: int) -> Result:
    """Memory, time, and the error against plain backpropagation of the same scheme."""
    _, y0, k = make_problem(equation, points)
    compile_one = lambda m: adjoints.compiled(make_gradient(equation, m, steps), k, y0)
    program, exact = compile_one(method), compile_one(PLAIN)
    (_, lost), gradient = program.run(k, y0)
    times = adjoints.seconds_per_call({method: program}, (k, y0), 1.0)
    difference = relative_error(gradient, exact.run(k, y0)[1])
    return {
        "seconds": times[method],
        "bytes": program.temp_bytes,
        "lost": bool(lost),
        "difference": difference if np.isfinite(difference) else None,
    }


def _size(setting: Setting) -> tuple[int, int]:
    """Points along an axis, and steps."""
    return setting.pick((4, 20), (64, 1000), (256, 4000))


def tasks(setting: Setting) -> dict[str, Any]:
    """Each method on each equation."""
    points, steps = _size(setting)
    if setting.size == "smoke":
        methods = {"wave": [PLAIN, COUPLED]}
    else:
        # What the heat equation needs, the wave equation does not.
        methods = {"heat": list(METHODS), "wave": list(METHODS)[:4]}
    out: dict[str, Any] = {}
    for equation, some in methods.items():
        for method in some:
            key = f"{equation}-{list(METHODS).index(method)}"
            out[key] = partial(measure, equation, method, points, steps)
    task = partial(measure_memory, "wave", COUPLED, points, 2 * steps)
    return {**out, "wave-twice-the-steps": task}


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """The table, and what of the published scheme holds for such equations."""
    points, steps = _size(setting)
    found = {
        (equation, method): results[f"{equation}-{index}"]
        for equation in EQUATIONS
        for index, method in enumerate(METHODS)
        if f"{equation}-{index}" in results
    }
    rows = [
        [
            equation,
            method,
            number(1e3 * r["seconds"]),
            number(r["bytes"] / 1e6),
            "coupling lost" if r["lost"] else "ended",
            _shown(r["difference"]),
        ]
        for (equation, method), r in found.items()
    ]
    columns = (
        "equation",
        "gradient",
        "ms",
        "temporary memory (MB)",
        "solve",
        "error of the gradient",
    )
    title = f"A gradient on {points} x {points} points in {steps} steps of RK4"
    notes = (
        "The paper names partial differential equations as an extension and has no "
        "table of them. The authors try the heat equation with λ between 0.5 and 0.8, "
        "and store states.",
        "The error is relative to backpropagation of RK4 itself, so for the coupled "
        "scheme it contains the difference of the schemes.",
        "`nan`: the reconstruction misses the initial state by too much, so the "
        "gradient is refused.",
    )
    grown = results["wave-twice-the-steps"]["bytes"] / found["wave", COUPLED]["bytes"]
    claims = [_wave_claim(found, grown)]
    if setting.size != "smoke":
        claims += _heat_claims(found, steps)
    figures = {"temporary memory (MB)": partial(draw, found)}
    return Report((Table(title, columns, rows),), tuple(claims), figures, notes)


def _shown(difference: float | None) -> str:
    """Also of what JSON has no number for."""
    return f"{float('nan') if difference is None else difference:.0e}"


def _wave_claim(found: Mapping[tuple[str, str], Result], grown: float) -> Claim:
    coupled, plain = found["wave", COUPLED], found["wave", PLAIN]
    error, saved = coupled["difference"], plain["bytes"] / coupled["bytes"]
    holds = error is not None and error < 1e-3 and grown < 1.05
    return Claim(
        "the method extends to partial differential equations: the wave equation",
        "stated, not measured",
        f"gradient to {_shown(error)}, {saved:.0f} times less memory than "
        f"backpropagation, {grown:.2f} times as much in twice the steps",
        holds,
        "" if holds else "the gradient is off, or memory grows",
    )


def _heat_claims(found: Mapping[tuple[str, str], Result], steps: int) -> list[Claim]:
    coupled, resynced = found["heat", COUPLED], found["heat", RESYNCED]
    plain, aca = found["heat", PLAIN], found["heat", "ACAAdjoint"]
    error = resynced["difference"]
    exact = error is not None and error < 1e-3 and not resynced["lost"]
    return [
        Claim(
            f"the method is stable, with its λ of {COUPLING}: the heat equation",
            "stated, not measured",
            "the copies diverge" if coupled["lost"] else "the solve ended",
            not coupled["lost"],
            "the stable interval is about (-(1 - λ), 0), and the fast modes of this "
            "equation are far outside of it",
        ),
        Claim(
            f"with `resync_every={RESYNC}` the heat equation is solved too",
            "not in the paper",
            f"gradient to {_shown(error)}, {plain['bytes'] / resynced['bytes']:.0f} "
            "times less memory than backpropagation; `ACAAdjoint` on RK4: "
            f"{plain['bytes'] / aca['bytes']:.0f} times less, in "
            f"{aca['seconds'] / resynced['seconds']:.2f} of the time",
            exact,
            "" if exact else f"the gradient in {steps} steps is off",
        ),
    ]


def draw(found: Mapping[tuple[str, str], Result], axes: Axes) -> None:
    """Bars, on a logarithmic axis."""
    names = [f"{equation}: {method}" for equation, method in found]
    axes.barh(names, [r["bytes"] / 1e6 for r in found.values()])
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)


EXPERIMENT = Experiment(
    name="heat",
    title="Partial differential equations by the method of lines",
    source="McCallum and Foster (2024), extensions",
    tasks=tasks,
    report=report,
)
