"""How much the accuracy depends on the settings of the optimiser."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .experiment import Claim, Experiment, Report, Result, Setting, Table
from .optimisers import trainer


# Around the rates that are usual for each method, in the same proportions.
_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_CENTRES = {"adam": 1e-2, "sgd": 1e-1, "snopt-paper": 3e-2}
# The second setting: weight decay, or damping for SNOpt.
_SECOND = {
    "adam": ("weight_decay", (0.0, 1e-2, 1e-1)),
    "sgd": ("weight_decay", (0.0, 1e-3, 1e-2)),
    "snopt-paper": ("damping", (0.02, 0.05, 0.1)),
}


def _column(method: str, value: float, iterations: int, seed: int) -> Result:
    """The test accuracy for every learning rate."""
    name, _ = _SECOND[method]
    made, accuracies = trainer("digits", method, iterations, None), []
    for factor in _FACTORS if iterations > 2 else _FACTORS[:1]:
        settings = {"learning_rate": factor * _CENTRES[method], name: value}
        accuracies.append(made.fit(settings, seed)[1]["metric"])
    return {"accuracies": accuracies}


def _tasks(setting: Setting) -> dict[str, Any]:
    iterations = setting.pick(2, 100, 1000)
    return {
        f"{method}-{value:g}-seed{seed}": partial(
            _column, method, value, iterations, seed
        )
        for method, (_, values) in list(_SECOND.items())[:: setting.pick(2, 1, 1)]
        for value in values[: setting.pick(1, 3, 3)]
        for seed in range(setting.seeds)
    }


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    grids = {}
    for method, (_, values) in _SECOND.items():
        columns = [
            [
                results[key]["accuracies"]
                for s in range(setting.seeds)
                if (key := f"{method}-{value:g}-seed{s}") in results
            ]
            for value in values
        ]
        medians = [100 * np.median(column, axis=0) for column in columns if column]
        if medians:
            grids[method] = np.nan_to_num(np.asarray(medians))
    rows = []
    for method, grid in grids.items():
        name, values = _SECOND[method]
        for value, line in zip(values, grid.tolist(), strict=False):
            shown = line + [None] * (len(_FACTORS) - len(line))
            rows.append([method, _CENTRES[method], f"{name} {value:g}", *shown])
    factors = [f"{factor:g} x" for factor in _FACTORS]
    columns = "method", "learning rate", "second setting", *factors
    table = Table("Test accuracy (%) by the learning rate", columns, rows)
    worst = {method: float(grid.min()) for method, grid in grids.items()}
    claims = (
        Claim(
            "the worst accuracy of SNOpt is above the worst one of Adam",
            "a figure: SNOpt depends less on its settings",
            f"{worst['snopt-paper']:.3g} against {worst['adam']:.3g} %",
            worst["snopt-paper"] > worst["adam"],
        ),
    )
    notes = (
        f"The 8 x 8 digits of scikit-learn, {setting.pick(2, 100, 1000)} iterations of "
        "128 (the paper: MNIST, SVHN, CIFAR-10). SNOpt with its published preset.",
        "Medians over the seeds. What diverges has the accuracy of its last model.",
    )
    figures = {method: partial(_draw, method, grid) for method, grid in grids.items()}
    return Report((table,), claims, figures, notes)


def _draw(method: str, grid: Any, axes: Axes) -> None:
    axes.imshow(grid, vmin=0, vmax=100, aspect="auto")
    name, values = _SECOND[method]
    rates = [f"{factor * _CENTRES[method]:g}" for factor in _FACTORS]
    axes.set_xticks(range(grid.shape[1]), rates[: grid.shape[1]])
    axes.set_yticks(range(grid.shape[0]), [f"{v:g}" for v in values[: grid.shape[0]]])
    axes.set(xlabel="learning rate", ylabel=name)
    for (i, j), value in np.ndenumerate(grid):
        axes.text(j, i, f"{value:.0f}", ha="center", color="w" if value < 60 else "k")


EXPERIMENT = Experiment(
    name="robustness",
    title="How the accuracy depends on the settings of the optimiser",
    source="SNOpt, robustness to hyper-parameters",
    tasks=_tasks,
    report=_report,
    x64=False,
)
