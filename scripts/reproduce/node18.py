"""A neural ODE for pictures against its residual network, and other solvers."""

import time
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax.random as jr
import numpy as np
import optax
from benchmarks.training_tasks import accuracy, cross_entropy, shuffled
from demonstration.model import Solve
from matplotlib.axes import Axes

import nodegrad

from . import data, pictures
from .experiment import (
    across_seeds,
    Claim,
    Experiment,
    Report,
    Result,
    Setting,
    spread,
    Table,
)


# How the equation is solved in training. One step of Euler's method of size 1 makes a
# residual block of it, with the same parameters.
METHODS = {
    "ACA": Solve(),
    "adjoint": Solve(diffrax.diffeqsolve, diffrax.BacksolveAdjoint()),
    "naive": Solve(diffrax.diffeqsolve, diffrax.RecursiveCheckpointAdjoint()),
    "ResNet": Solve(solver=diffrax.Euler(), dt0=1.0, max_steps=1),
}
# With the published test errors in percent: NODE18 on CIFAR-10.
_PUBLISHED = {"ACA": 4.85, "adjoint": 9.8, "naive": 9.3, "ResNet": 6.98}
SWAPS = {
    "Heun-Euler": (Solve(), 4.85),
    "RK23": (Solve(solver=diffrax.Bosh3()), 4.92),
    "RK45": (Solve(solver=diffrax.Dopri5()), 5.29),
    "Euler, 0.2": (Solve(solver=diffrax.Euler(), dt0=0.2), 5.52),
    "RK2, 0.2": (Solve(solver=diffrax.Midpoint(), dt0=0.2), 5.27),
    "RK4, 0.2": (Solve(solver=nodegrad.RK4(), dt0=0.2), 5.24),
}
# Why a claim may fail here.
_REASONS = {
    "error": "so small a network, trained so shortly, does not tell gradients apart "
    "that differ by the tolerance of the solver",
    "seconds": "the convolutions take the same time with every method, and other "
    "programs ran beside these",
}
_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10 (small)", "digits": "digits"}
_load = lru_cache(pictures.load)


@lru_cache
def _step(method: str, iterations: int) -> Any:
    schedule = optax.warmup_cosine_decay_schedule(
        3e-4, 3e-3, iterations // 15, iterations
    )
    optim = optax.adamw(schedule, weight_decay=1e-2)

    def losses(model: Any, x: Any, labels: Any) -> Any:
        return cross_entropy(model(x, METHODS[method])[0], x, labels)

    return optim, nodegrad.make_steps(optim, losses).step


@eqx.filter_jit
def _accuracy(model: Any, x: Any, labels: Any, solve: Solve) -> Any:
    return accuracy(model(x, solve)[0], x, labels)


def _error(model: Any, test: Any, solve: Solve) -> float:
    """The test error in percent. Every batch is one state, as in training."""
    parts = [np.array_split(x, max(1, len(x) // 500)) for x in test]
    found = [
        len(x) * float(_accuracy(model, x, labels, solve))
        for x, labels in zip(*parts, strict=True)
    ]
    return 100 * (1 - sum(found) / len(test[0]))


def _train(
    name: str,
    method: str,
    folder: Path | None,
    iterations: int,
    tested: int,
    seed: int,
) -> Result:
    """Trains one network; those trained with ACA are tested with other solvers too."""
    found = _load(name, folder)
    (_, channels, size, _), key = found.train[0].shape, jr.key(seed)
    model = pictures.Network(key, channels, size)
    optim, step = _step(method, iterations)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    batches, seconds, losses = shuffled(found.train, 128)(seed), [], []
    for _ in range(iterations):
        start = time.perf_counter()
        model, state, loss = step(model, state, *next(batches))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    swaps = SWAPS if method == "ACA" else {}
    test = found.test[0][:tested], found.test[1][:tested]
    return {
        "error": _error(model, test, METHODS[method]),
        "swaps": {k: _error(model, test, s) for k, (s, _) in swaps.items()},
        "losses": losses,
        "seconds": float(np.median(seconds)),
    }


def _sets(setting: Setting) -> tuple[str, ...]:
    return ("digits",) if setting.size == "smoke" else ("mnist", "cifar10")


def _tasks(setting: Setting) -> dict[str, Any]:
    iterations = setting.pick(2, 100, 2000)
    folder = None if setting.size == "smoke" else data.folder(setting.data)
    methods = list(METHODS)[: setting.pick(1, 4, 4)]
    tested = setting.pick(100, 1000, 10_000)
    return {
        f"{name}-{method}-seed{seed}": partial(
            _train, name, method, folder, iterations, tested, seed
        )
        for name in _sets(setting)
        for method in methods
        for seed in range(setting.seeds)
    }


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    tables, claims, figures = [], [], {}
    for name in _sets(setting):
        runs = {m: across_seeds(results, f"{name}-{m}") for m in METHODS}
        runs = {method: found for method, found in runs.items() if found}
        tables += _tables(_NAMES[name], runs)
        claims += _claims(_NAMES[name], runs)
        figures[_NAMES[name]] = partial(_draw, runs)
    notes = (
        "The network is small: two convolutions of stride 2, one ODE of two 3 x 3 "
        "convolutions with 16 channels, a linear layer, no batch normalisation (the "
        "paper: NODE18, four stages of 64 to 512 channels). CIFAR-10 is 5000 training "
        "and 1000 test images from a lossy copy.",
        f"{setting.pick(2, 100, 2000)} iterations of AdamW with 128 images (the "
        "paper: 90 epochs or more of SGD). Heun-Euler at 1e-2 for all methods; the "
        "paper's adjoint and naive runs used Dopri5 at 1e-5. At most "
        f"{setting.pick(100, 1000, 10_000)} images to test with.",
        "Naive: Diffrax's default adjoint, whose gradient is that of ACA, since both "
        "hold step sizes constant. Paper: errors on CIFAR-10.",
    )
    return Report(tuple(tables), tuple(claims), figures, notes)


def _median(runs: list[Result], key: str) -> float:
    return float(np.median([run[key] for run in runs]))


def _swapped(runs: list[Result], solver: str) -> list[float]:
    return [run["swaps"][solver] for run in runs]


def _tables(name: str, runs: Mapping[str, list[Result]]) -> list[Table]:
    rows = []
    for method, found in runs.items():
        errors, seconds = [r["error"] for r in found], _median(found, "seconds")
        rows.append([method, _PUBLISHED[method], spread(errors), 1e3 * seconds])
    columns = "method", "paper: error (%)", "ours: error (%)", "ms per iteration"
    swaps = [
        [solver, published, spread(_swapped(runs["ACA"], solver))]
        for solver, (_, published) in SWAPS.items()
    ]
    return [
        Table(f"{name}: trained with", columns, rows),
        Table(f"{name}: trained with ACA, tested with", columns[:3], swaps),
    ]


def _claims(name: str, runs: Mapping[str, list[Result]]) -> list[Claim]:
    base = np.asarray(_swapped(runs["ACA"], "Heun-Euler"))
    changes = [np.median(_swapped(runs["ACA"], s) - base) for s in SWAPS]
    largest = float(np.max(np.abs(changes)))
    claims = [
        Claim(
            f"{name}: another solver changes the test error by less than a point",
            "at most 0.67 points",
            f"at most {largest:.2g} points",
            largest < 1,
        )
    ]
    for other, key, what in (
        ("ResNet", "error", "error is at most that of the ResNet"),
        ("adjoint", "error", "error is below that of the adjoint method"),
        ("adjoint", "seconds", "iteration takes less time than the adjoint method's"),
        ("naive", "seconds", "iteration takes less time than the naive method's"),
    ):
        if other not in runs:
            continue
        ours, theirs = _median(runs["ACA"], key), _median(runs[other], key)
        if key == "error":
            paper = f"{_PUBLISHED['ACA']} against {_PUBLISHED[other]} %"
            shown = f"{ours:.3g} against {theirs:.3g} %"
        else:
            paper = {"adjoint": "10 against 18 hours", "naive": "10 against 34 hours"}
            paper = paper[other]
            shown = f"{1e3 * ours:.3g} against {1e3 * theirs:.3g} ms"
        holds = ours <= theirs if other == "ResNet" else ours < theirs
        statement = f"{name}: ACA's {what}"
        claims.append(Claim(statement, paper, shown, holds, _REASONS[key]))
    return claims


def _draw(runs: Mapping[str, list[Result]], axes: Axes) -> None:
    for method, found in runs.items():
        losses = np.median([run["losses"] for run in found], axis=0)
        width = min(10, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.semilogy(smooth, label=method)
    axes.set(xlabel="iteration", ylabel="training loss")
    axes.legend(fontsize=7)


EXPERIMENT = Experiment(
    name="node18",
    title="A neural ODE for pictures, its ResNet, and other solvers",
    source="ACA, NODE18 on CIFAR",
    tasks=_tasks,
    report=_report,
    x64=False,
)
