"""What two experiments share: the memory of backpropagation and of the coupled method.

The results have a unit `{solver}-{method}-memory` for each of `SOLVERS` and `METHODS`,
with the bytes of the compiled iteration. Published tables hold, for each solver, a pair
of anything and gigabytes: for the coupled method, then for backpropagation.
"""

from collections.abc import Mapping
from typing import Any

import diffrax
import numpy as np
from matplotlib.axes import Axes

import nodegrad

from . import adjoints
from .experiment import Claim, Result


SOLVERS: dict[str, Any] = {
    "Midpoint": diffrax.Midpoint(),
    "RK4": nodegrad.RK4(),
    "Dopri5": diffrax.Dopri5(),
}
METHODS = {
    "reversible": adjoints.reversible,
    "backpropagation": adjoints.backpropagated,
}
Published = Mapping[str, tuple[tuple[Any, float], tuple[Any, float]]]


def memory_claim(
    results: Mapping[str, Result], names: list[str], published: Published
) -> Claim:
    """That backpropagation takes as many times the memory as published, or more."""
    size = lambda name, method: results[f"{name}-{method}-memory"]["bytes"]
    theirs = {n: published[n][1][1] / published[n][0][1] for n in names}
    ours = {n: size(n, "backpropagation") / size(n, "reversible") for n in names}
    behind = [n for n in names if ours[n] < theirs[n]]
    shown = lambda ratios: ", ".join(f"{n} {r:.1f}" for n, r in ratios.items())
    return Claim(
        "backpropagation takes many times the memory of the reversible method",
        shown(theirs),
        shown(ours),
        not behind,
        "" if not behind else f"the ratio is less than published: {', '.join(behind)}",
    )


def draw(results: Mapping[str, Result], names: list[str], axes: Axes) -> None:
    """Bars, on a logarithmic axis."""
    for index, method in enumerate(METHODS):
        sizes = [results[f"{n}-{method}-memory"]["bytes"] / 1e9 for n in names]
        at = np.arange(len(names)) + 0.4 * index
        axes.bar(at, sizes, width=0.4, label=method)
    axes.set_xticks(np.arange(len(names)) + 0.2, names)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
