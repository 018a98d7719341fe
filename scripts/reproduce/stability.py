"""Stability regions of the coupled methods: true, as published, and as measured.

A step on y' = a y with z = h a is a matrix of the two copies. With P(z) = R(z) - 1 for
the stability polynomial R of the base method and λ for the coupling parameter, it is

    [ λ         1 - λ + P(z)                ]
    [ -λ P(-z)  1 - (1-λ) P(-z) - P(z) P(-z)].

The script that made the published figure has 1 + (1-λ) P(z) - P(z) P(-z) in the lower
right corner. The two agree only where P is odd, which is Euler's method.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

import nodegrad

from .experiment import Claim, Experiment, Report, Result, Setting, Table


Complex = NDArray[np.complexfloating]

SOLVERS: dict[str, Any] = {
    "Euler": diffrax.Euler(),
    "Midpoint": diffrax.Midpoint(),
    "RK3": diffrax.Bosh3(),
    "RK4": nodegrad.RK4(),
}
#: That of the published figure, and those of the published experiments.
COUPLINGS = 0.8, 0.99, 0.999
FIGURE = COUPLINGS[0]
#: A point in the middle of the published regions.
PROBE = -0.5


def step_matrices(polynomial: Any, coupling: float, z: Complex, published: bool) -> Any:
    """The matrices of a step, for every `z`."""
    forward, backward = polynomial(z) - 1, polynomial(-z) - 1
    corner = forward if published else -backward
    rows = [
        [np.full_like(z, coupling), 1 - coupling + forward],
        [-coupling * backward, 1 + (1 - coupling) * corner - forward * backward],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def radius(matrices: Any) -> np.ndarray:
    """The largest absolute value of an eigenvalue of each matrix."""
    return np.abs(np.linalg.eigvals(matrices)).max(-1)


def grid(points: int) -> tuple[Complex, np.ndarray]:
    """The rectangle of the published figure, and the areas of its cells.

    They are narrow near the imaginary axis: for λ near 1, so are the regions.
    """
    centres = (np.arange(points) + 0.5) / points
    z = -3 * centres**3 + 1j * (6 * centres[:, None] - 3)
    widths, height = 9 * centres**2 / points, 6 / points
    return z, np.broadcast_to(widths * height, z.shape)


def growth_of_steps(solver: Any, z: Complex) -> np.ndarray:
    """How much the package's own steps grow on y' = z y: the spectral radius.

    A complex number is a vector of two real ones here. The matrix of a step is measured
    by making it from every state of the two copies.
    """

    def field(t: Any, y: Any, args: Any) -> Any:
        del t
        return jnp.array([[args[0], -args[1]], [args[1], args[0]]]) @ y

    def matrix(z: Any) -> Any:
        terms, times = diffrax.ODETerm(field), (0.0, 1.0)
        y0 = jnp.zeros(2)
        state = solver.init(terms, *times, y0, z)

        def step(copies: Any) -> Any:
            y, inner = copies[:2], copies[2:]
            start = dict(z=inner, difference=y - inner)
            begun = type(state)(**{**vars(state), **start})
            y1, _, _, after, _ = solver.step(terms, *times, y, z, begun, False)
            return jnp.concatenate([y1, after.z])

        return jax.jacfwd(step)(jnp.zeros(4))

    pairs = jnp.stack([jnp.asarray(z.real), jnp.asarray(z.imag)], axis=-1)
    return radius(np.asarray(jax.jit(jax.vmap(matrix))(pairs)))


def measure(name: str, couplings: Sequence[float], points: int, samples: int) -> Result:
    """Areas, the real interval, determinants, and a comparison with actual steps."""
    solver, (z, cells) = SOLVERS[name], grid(points)
    polynomial = np.polynomial.Polynomial(nodegrad.stability_polynomial(solver))
    rng, out = np.random.default_rng(0), {}
    real = np.linspace(-3, 0, 30_001)[:-1]
    for coupling in couplings:
        stable = partial(nodegrad.is_stable, solver, coupling_parameter=coupling)
        published = step_matrices(polynomial, coupling, z, published=True)
        # Unstable points from the origin on end the interval.
        unstable = real[~stable(real)]
        some = rng.uniform(-3, 0, samples) + 1j * rng.uniform(-3, 3, samples)
        # Half of the points are near the origin, where the region is for λ near 1.
        some[::2] *= 1 - coupling
        coupled = nodegrad.Reversible(solver, coupling_parameter=coupling)
        measured = growth_of_steps(coupled, some)
        probe = np.array(PROBE, complex)
        determinant = lambda p, c=coupling, at=probe: float(
            np.linalg.det(step_matrices(polynomial, c, at, p)).real
        )
        out[str(coupling)] = {
            "area": float(np.sum(cells[stable(z)])),
            "published area": float(np.sum(cells[radius(published) < 1])),
            "interval": float(unstable.max()),
            "determinant": determinant(False),
            "published determinant": determinant(True),
            "samples": samples,
            "mismatches": int(np.sum(stable(some) != (measured < 1))),
        }
    base = float(np.sum(cells[nodegrad.is_stable(solver, z)]))
    return {"base area": base, "coupled": out}


def tasks(setting: Setting) -> dict[str, Any]:
    """One for each base method."""
    names = setting.pick(["Midpoint"], list(SOLVERS), list(SOLVERS))
    points, samples = setting.pick((100, 100), (800, 2000), (2000, 20_000))
    couplings = COUPLINGS[:1] if setting.size == "smoke" else COUPLINGS
    return {n: partial(measure, n, couplings, points, samples) for n in names}


def report(results: Mapping[str, Result], setting: Setting) -> Report:
    """The table of areas, and what to think of the published region."""
    del setting
    rows = [
        [
            name,
            coupling,
            result["base area"],
            entry["area"],
            entry["published area"],
            f"{entry['interval']:.4f}",
            f"{entry['mismatches']} of {entry['samples']}",
        ]
        for name, result in results.items()
        for coupling, entry in result["coupled"].items()
    ]
    columns = (
        "base method",
        "λ",
        "area, base",
        "area, coupled",
        "area, published matrix",
        "stable from (real z)",
        "mismatches with actual steps",
    )
    table = Table("Stability in -3 < Re z < 0, |Im z| < 3", columns, rows)
    notes = (
        "The published areas were computed here, from the matrix in the script that "
        "made the published figure.",
        "An actual step is that of `nodegrad.Reversible` on y' = z y, made from every "
        "pair of copies. Half of the random points are near the origin.",
        f"The figure has λ = {FIGURE}, the experiments of the paper have 0.99 and "
        "0.999: there the region is as small as the table says, because the stable "
        "interval is about (-(1 - λ), 0). `resync_every` gives back the region of the "
        "base method.",
    )
    figures = {f"{name}, λ = {FIGURE}": partial(draw, name) for name in results}
    return Report((table,), tuple(_claims(results)), figures, notes)


def _claims(results: Mapping[str, Result]) -> list[Claim]:
    entries = {name: r["coupled"][str(FIGURE)] for name, r in results.items()}
    areas = ", ".join(f"{n} {e['area']:.2f}" for n, e in entries.items())
    drawn = ", ".join(f"{n} {e['published area']:.2f}" for n, e in entries.items())
    every = [e for r in results.values() for e in r["coupled"].values()]
    mismatches = sum(e["mismatches"] for e in every)
    samples = sum(e["samples"] for e in every)
    off = max(abs(e["published area"] / e["area"] - 1) for e in entries.values())
    determinants = [e["published determinant"] for e in entries.values()]
    worst = max(determinants, key=lambda d: abs(d - FIGURE))
    return [
        Claim(
            "the region of stability is not empty, as it is for earlier reversible "
            "methods",
            f"drawn for λ = {FIGURE}",
            f"areas {areas}",
            all(e["area"] > 0 for e in every),
        ),
        Claim(
            f"the published region for λ = {FIGURE} is that of the method",
            f"areas {drawn}",
            f"areas {areas}",
            off < 0.01,
            ""
            if off < 0.01
            else "the matrix in the plotting script has an entry with "
            f"P(z) in place of -P(-z): its determinant at z = {PROBE} is {worst:.2f} "
            f"and not λ; it makes areas up to {off:.0%} too large",
        ),
        Claim(
            "the corrected matrix, and the ellipse test made from it, predict the "
            "stability of actual steps",
            "known for real z",
            f"{mismatches} mismatches in {samples} complex points",
            mismatches == 0,
            "" if mismatches == 0 else "see the table",
        ),
    ]


def draw(name: str, axes: Axes) -> None:
    """The boundaries of the three regions."""
    (z, _), solver = grid(300), SOLVERS[name]
    polynomial = np.polynomial.Polynomial(nodegrad.stability_polynomial(solver))
    curves = {
        "base": np.abs(polynomial(z)),
        "coupled": radius(step_matrices(polynomial, FIGURE, z, published=False)),
        "published": radius(step_matrices(polynomial, FIGURE, z, published=True)),
    }
    for index, (label, values) in enumerate(curves.items()):
        style: Any = "--" if label == "published" else "-"
        axes.contour(
            z.real, z.imag, values, levels=[1], colors=f"C{index}", linestyles=style
        )
        axes.plot([], [], style, color=f"C{index}", label=label)
    axes.set(xlabel="Re z", ylabel="Im z")
    axes.legend(fontsize=7, loc="upper left")


EXPERIMENT = Experiment(
    name="stability",
    title="Stability regions of the coupled methods",
    source="McCallum and Foster (2024), figure of stability",
    tasks=tasks,
    report=report,
)
