"""How many settings of an optimiser are nearly as good as its best: SNOpt and Adam.

Each optimiser has a grid of 25 settings: the number that decides how far it goes in a
step, and the weight decay. For Adam the former is the learning rate. `snopt()` has
none; what bounds its steps in the metric of the curvature is the damping. A setting
counts if the lowest test loss on the way, a median over the seeds, is at most a tenth
above that of the best setting of the same optimiser. An optimiser whose best is poor
has many such settings, so those near the best of Adam are counted as well.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

import nodegrad

from .measure import Clock
from .report import Budget, Column, fixed, Report, significant
from .training import (
    ADAM,
    DEFAULT,
    lengths,
    make_task,
    Method,
    METHODS,
    settings_text,
    Trainer,
)


#: What everything is trained in.
DTYPE = "float32"
# On the other tasks of `training` test losses are so small that a tenth of them says
# nothing.
_TASKS = "digits", "discs", "circles", "moons"
_NEAR = 1.1


def _grid(name: str, sizes: Sequence[float], decays: Sequence[float]) -> list[dict]:
    return [{name: s, "weight_decay": d} for s, d in product(sizes, decays)]


# The weight decay of `snopt()` is a penalty of the loss, and that of AdamW a rate: both
# lists go from none to one that is too large.
_BY_NAME = {method.name: method for method in METHODS}
_METHODS = (
    replace(
        _BY_NAME[ADAM],
        trials=_grid(
            "learning_rate",
            (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            (0.0, 1e-3, 1e-2, 1e-1, 1.0),
        ),
    ),
    replace(
        _BY_NAME[DEFAULT],
        make=lambda damping, weight_decay: nodegrad.snopt(
            damping=damping, weight_decay=weight_decay
        ),
        trials=_grid(
            "damping", (1e-4, 1e-3, 1e-2, 1e-1, 1.0), (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
        ),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--seeds", type=int, default=3, help="of every setting (3)")
    parser.add_argument("--tasks", nargs="+", choices=_TASKS, default=list(_TASKS))


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Trains with every setting."""
    report.note(
        f"25 settings of each optimiser, {arguments.seeds} seeds each. The lowest test "
        "loss on the way (of `snopt()`: of the running mean of the parameters), as a "
        "median over the seeds. Near: at most a tenth above the best of this method."
    )
    tasks = arguments.tasks[:1] if arguments.quick else arguments.tasks
    shares: dict[str, list[float]] = {method.name: [] for method in _METHODS}
    for name in tasks:
        _, iterations = lengths(name, quick=arguments.quick)
        task = make_task(name, iterations)
        assert task is not None
        losses = {}
        for method in _METHODS:
            trainer = Trainer(task, method, clock)
            losses[method.name] = [
                _test_loss(trainer, settings, arguments.seeds)
                for settings in method.trials
            ]
        records = [_record(m, losses[m.name], min(losses[ADAM])) for m in _METHODS]
        for record in records:
            shares[record["method"]].append(record["share"])
        report.table(f"{name}: {iterations} iterations", _COLUMNS, records)
    for name, of in shares.items():
        report.note(f"{name}: {statistics.mean(of):.2f} of the settings in the mean.")
    ratio = statistics.mean(shares[ADAM]) / statistics.mean(shares[DEFAULT])
    what = "share of settings near the best, Adam's over that of snopt()"
    report.budgets.append(Budget(what, f"{len(tasks)} tasks", ADAM, ratio, 0.5))


def _test_loss(trainer: Trainer, settings: dict[str, float], seeds: int) -> float:
    runs = trainer.runs(settings, seeds)
    return statistics.median(run.best_test_loss for run in runs)


_COLUMNS = (
    Column("method", "method"),
    Column("share", "near its best", fixed(2)),
    Column("near_adam", "near Adam's best", fixed(2)),
    Column("best", "best test loss", significant(3)),
    Column("median", "median", significant(3)),
    Column("worst", "worst", significant(3)),
    Column("settings", "best settings"),
)


def _record(method: Method, losses: list[float], adam: float) -> dict[str, Any]:
    best = int(np.argmin(losses))
    share = lambda of: sum(loss <= _NEAR * of for loss in losses) / len(losses)
    return {
        "method": method.name,
        "share": share(losses[best]),
        "near_adam": share(adam),
        "best": losses[best],
        "median": statistics.median(losses),
        "worst": max(losses),
        "settings": settings_text(method.trials[best]),
        "losses": losses,
    }
