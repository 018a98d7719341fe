"""Tables, lines and the figure of the demonstration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from benchmarks.comparison import MEASURED
from benchmarks.report import Column, fixed, Report, scientific
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .comparison import Records
from .training import Epoch


_GRADIENTS = (*MEASURED, Column("error", "error", scientific))
_SWAPS = (
    Column("solver", "solver"),
    Column("steps", "steps"),
    Column("evaluations", "evaluations"),
    Column("error", "test error (%)", fixed(2)),
    Column("published", "published error (%)", fixed(2)),
)
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.color": "0.92",
    "legend.frameon": False,
}


def print_gradients(report: Report, records: Records, tolerance: float) -> None:
    """The table of adjoints at one tolerance."""
    title = f"Gradient of the trained model, Heun-Euler at a tolerance of {tolerance}"
    report.table(title, _GRADIENTS, records)
    report.note("error: the distance to the exact gradient of the continuous problem")


def print_swaps(report: Report, records: Records) -> None:
    """The table of solvers."""
    title = "The model trained with Heun-Euler, evaluated with other solvers"
    report.table(title, _SWAPS, records)
    report.note("published: the ACA paper, NODE18 on CIFAR10, a larger experiment")


def describe(records: Records) -> str:
    """The second of two records, compared with the first."""
    first, second = records
    return (
        f"relative difference {second['difference']:.0e} from {first['method']}; "
        f"{second['time_ratio']:.2f} of its run time; {second['temp_bytes'] / 1e6:.1f} "
        f"MB of memory in place of {first['temp_bytes'] / 1e6:.1f} MB"
    )


def draw(
    path: Path,
    history: Sequence[Epoch],
    gradients: Mapping[float, Records],
    swaps: Records,
) -> None:
    """The figure: training, gradients, solvers."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 4), layout="constrained")
        training_axes, gradients_axes, swaps_axes = figure.subplots(1, 3)
        _draw_training(training_axes, history)
        _draw_gradients(gradients_axes, gradients)
        _draw_swaps(swaps_axes, swaps)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _draw_training(axes: Axes, history: Sequence[Epoch]) -> None:
    epochs = range(1, len(history) + 1)
    errors = [100 * (1 - epoch.accuracy) for epoch in history]
    axes.semilogy(epochs, errors, label="test error (%)")
    axes.semilogy(epochs, [epoch.loss for epoch in history], label="training loss")
    evaluations = [epoch.evaluations for epoch in history]
    axes.semilogy(epochs, evaluations, label="evaluations in a solve")
    title = f"Training: test accuracy {history[-1].accuracy:.2%}"
    axes.set(title=title, xlabel="epoch")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _draw_gradients(axes: Axes, gradients: Mapping[float, Records]) -> None:
    by_method = zip(*gradients.values(), strict=True)
    for records, marker in zip(by_method, "sod^", strict=True):
        errors = [record["error"] for record in records]
        milliseconds = [1e3 * record["seconds"] for record in records]
        axes.loglog(errors, milliseconds, marker + "-", label=records[0]["method"])
    title = f"Gradient, tolerances {max(gradients):g} to {min(gradients):g}"
    axes.set(title=title, xlabel="relative error", ylabel="run time (ms)")
    axes.invert_xaxis()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()


def _draw_swaps(axes: Axes, swaps: Records) -> None:
    names = [f"{swap['solver']}\n{swap['steps']}" for swap in swaps]
    bars = axes.barh(names, [swap["error"] for swap in swaps], height=0.6)
    axes.bar_label(bars, fmt="%.2f %%", padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    axes.set(title="Other solvers, without further training", xlabel="test error (%)")
