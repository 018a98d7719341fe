"""Training with SNOpt against first-order optimisers: time to a loss, final metric.

Every method gets the same number of trials over its settings on one seed, and is then
run with the best of them on several. Times are those of the training steps alone,
without compilation and evaluation; every method sees the same batches.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import nodegrad

from .measure import Clock, time_in_turns
from .report import Budget, Column, fixed, Report, significant
from .training_tasks import circles, data_folder, digits, ImageNODE, Task, words


#: What everything is trained in.
DTYPE = "float32"

ADAM, SGD, MUON = "Adam", "SGD, momentum 0.9", "Muon"
PAPER, ROBUST = "SNOpt, paper", "SNOpt, robust"


def _sgd(learning_rate, weight_decay):
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, 0.9)
    )


def _muon(learning_rate, weight_decay):
    return optax.contrib.muon(learning_rate, weight_decay=weight_decay)


def _snopt(preset):
    def make(learning_rate, weight_decay, damping):
        return nodegrad.snopt(
            learning_rate, preset, weight_decay=weight_decay, damping=damping
        )

    return make


@dataclass(frozen=True)
class Method:
    """An optimiser as a function of its settings, and the settings to try.

    - `options`: of `nodegrad.value_grad_and_curvature`, if it takes curvature.
    """

    name: str
    make: Callable[..., Any]
    trials: Sequence[dict[str, float]]
    options: dict[str, Any] | None = None


def _trials(rates: Sequence[float], *others: dict[str, float]) -> list[dict[str, Any]]:
    return [{"learning_rate": r, **other} for other in others for r in rates]


_DECAYS = {"weight_decay": 0.0}, {"weight_decay": 1e-2}
METHODS = (
    Method(ADAM, optax.adamw, _trials((3e-3, 1e-2, 3e-2), *_DECAYS)),
    Method(SGD, _sgd, _trials((1e-2, 3e-2, 1e-1), *_DECAYS)),
    Method(MUON, _muon, _trials((3e-3, 1e-2, 3e-2), *_DECAYS)),
    Method(
        PAPER,
        _snopt("paper"),
        _trials(
            (1e-2, 3e-2, 1e-1),
            {"weight_decay": 0.0, "damping": 0.05},
            {"weight_decay": 1e-2, "damping": 0.1},
        ),
        {},
    ),
    Method(
        ROBUST,
        _snopt("robust"),
        _trials(
            (5e-2, 1e-1, 2e-1),
            {"weight_decay": 0.0, "damping": 0.1},
            {"weight_decay": 1e-2, "damping": 0.1},
        ),
        {"kind": "ggn", "moments": True},
    ),
)


@dataclass
class Run:
    """One training run: curves over iterations, and times of its steps."""

    method: str
    settings: dict[str, float]
    seed: int
    train: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refreshed: list[bool] = field(default_factory=list)
    tested_at: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_metric: list[float] = field(default_factory=list)
    solver_steps: float = float("nan")

    @property
    def times(self) -> np.ndarray:
        """The time after every iteration."""
        return np.cumsum(self.seconds)

    def smooth(self) -> np.ndarray:
        """The training loss, averaged over the last tenth of an epoch or so."""
        width = max(1, len(self.train) // 20)
        padded = np.concatenate([np.full(width - 1, self.train[0]), self.train])
        return np.convolve(padded, np.ones(width) / width, mode="valid")

    @property
    def final_loss(self) -> float:
        """The last training loss, or infinity after divergence."""
        loss = self.smooth()[-1]
        return float(loss) if np.isfinite(loss) else float("inf")

    def time_to_train_loss(self, target: float) -> float:
        """When the smoothed training loss first was as low as that."""
        reached = np.flatnonzero(self.smooth() <= target)
        return float(self.times[reached[0]]) if len(reached) else float("inf")

    def time_to_test_loss(self, target: float) -> float:
        """When the test loss first was as low as that."""
        reached = np.flatnonzero(np.asarray(self.test_loss) <= target)
        if not len(reached):
            return float("inf")
        return float(self.times[self.tested_at[reached[0]] - 1])


class Trainer:
    """One method on one task, compiled once for all settings and seeds."""

    def __init__(self, task: Task, method: Method, clock: Clock):
        """Compiles nothing yet."""
        self.task, self.method, self._clock = task, method, clock
        self._optim = optax.inject_hyperparams(method.make)(**method.trials[0])
        options = dict(method.options or {})
        loss = task.losses
        if task.predict is None:
            options.pop("kind", None)
        elif options.get("kind") == "ggn":
            loss, options["predict"] = task.loss, task.predict
        self._steps = nodegrad.make_steps(self._optim, loss, **options)
        self._evaluate = eqx.filter_jit(partial(_evaluate, task))

    def start(self, settings: dict[str, float], seed: int) -> tuple[Any, Any]:
        """A model, and the state of the optimiser with these settings."""
        model = self.task.make_model(jr.PRNGKey(seed))
        state: Any = self._optim.init(eqx.filter(model, eqx.is_inexact_array))
        for name, value in settings.items():
            like = state.hyperparams[name]
            state.hyperparams[name] = jnp.asarray(value, like.dtype)
        return model, state

    def warm_up(self) -> Callable[[], Any]:
        """Compiles everything; returns an ordinary iteration, always the same."""
        start = self.start(self.method.trials[0], 0)
        batch, key = next(self.task.batches(0)), jr.PRNGKey(0)
        steps = self._steps if self.method.options is not None else [self._steps.step]
        for first in steps:
            model, state, _ = first(*start, *batch, key=key)
            # What comes out of a step may have other types than what went in at first.
            for step in steps:
                model, state, _ = step(model, state, *batch, key=key)
        return lambda: self._steps.step(*start, *batch, key=key)[2]

    def run(self, settings: dict[str, float], seed: int, every: int) -> Run:
        """Trains, and evaluates `every` so many iterations."""
        out = Run(self.method.name, settings, seed)
        model, state = self.start(settings, seed)
        batches, key = self.task.batches(seed), jr.PRNGKey(seed)
        for index in range(self.task.iterations):
            batch, key = next(batches), jr.fold_in(key, index)
            refresh = self.method.options is not None and self.task.refreshes(index)
            step = self._steps.refresh if refresh else self._steps.step
            before = self._clock.now()
            model, state, value = step(model, state, *batch, key=key)
            out.train.append(float(value))
            out.seconds.append(self._clock.now() - before)
            out.refreshed.append(refresh)
            if not np.isfinite(out.train[-1]):
                break
            if (index + 1) % every == 0:
                loss, metric = map(float, self._evaluate(model))
                out.tested_at.append(index + 1)
                out.test_loss.append(loss)
                out.test_metric.append(metric)
        stats = eqx.filter_jit(self.task.steps)(model, next(self.task.batches(seed)))
        out.solver_steps = float(jnp.mean(stats["num_steps"]))
        return out


def _evaluate(task: Task, model: Any) -> tuple[Any, Any]:
    batch = task.test
    if task.predict is None:
        out = losses = task.losses(model, *batch)
    else:
        out = task.predict(model, *batch)
        losses = task.loss(out, *batch)
    return jnp.mean(losses), task.metric(out, *batch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this subcommand."""
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best trial")
    parser.add_argument("--iterations", type=int, help="of every run (300)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("digits", "words", "circles"),
        default=["digits", "words", "circles"],
        help="words needs the folder of its data in NODEGRAD_DATA",
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Trains everything."""
    iterations = arguments.iterations or (60 if arguments.quick else 300)
    seeds = 1 if arguments.quick else arguments.seeds
    methods = METHODS
    if arguments.quick:
        quick = [m for m in METHODS if m.name in (ADAM, PAPER, ROBUST)]
        methods = [Method(m.name, m.make, m.trials[1:2], m.options) for m in quick]
    names = arguments.tasks[:1] if arguments.quick else arguments.tasks
    report.note(
        f"{len(methods[0].trials)} trials of every method on seed 0, of which the one "
        f"with the lowest final training loss is run on {seeds} seeds; "
        f"{iterations} iterations."
    )
    for name in names:
        task = _make_task(name, iterations)
        if task is None:
            report.note("words: left out, NODEGRAD_DATA has no data.")
            continue
        trainers = [Trainer(task, method, clock) for method in methods]
        one_step = {t.method.name: t.warm_up() for t in trainers}
        seconds = time_in_turns(clock, one_step, seconds=5.0)
        runs = {t.method.name: _runs(t, seeds, iterations) for t in trainers}
        _report_task(report, task, runs, seconds)
        _plot(task, runs, Path("results") / f"training_{name}.png")
    if not arguments.quick and "digits" in names:
        measure_terminal_time(report, iterations)


def _make_task(name: str, iterations: int) -> Task | None:
    if name == "words":
        folder = data_folder()
        return None if folder is None else words(iterations, folder)
    return {"digits": digits, "circles": circles}[name](iterations)


def _runs(trainer: Trainer, seeds: int, iterations: int) -> list[Run]:
    every = max(1, iterations // 30)
    trials = [trainer.run(trial, 0, every) for trial in trainer.method.trials]
    best = min(trials, key=lambda run: run.final_loss)
    return [best] + [trainer.run(best.settings, s, every) for s in range(1, seeds)]


# What to say of it.


_COLUMNS = (
    Column("method", "method"),
    Column("settings", "settings"),
    Column("final_loss", "train loss", significant(3)),
    Column("best_test_loss", "best test loss", significant(3)),
    Column("metric", "test metric", fixed(3)),
    Column("to_train", "time to Adam's train loss", fixed(2)),
    Column("to_test", "to its test loss", fixed(2)),
    Column("per_iteration", "per iteration", fixed(2)),
    Column("amortised", "with refreshes", fixed(2)),
    Column("solver_steps", "solver steps", fixed(1)),
)


def _report_task(
    report: Report, task: Task, runs: dict[str, list[Run]], seconds: dict[str, float]
) -> None:
    peer = runs[ADAM]
    median = lambda get, of: statistics.median(get(run) for run in of)
    train_target = median(lambda r: r.final_loss, peer)
    test_target = median(lambda r: min(r.test_loss), peer)
    to_train = partial(median, lambda r: r.time_to_train_loss(train_target))
    to_test = partial(median, lambda r: r.time_to_test_loss(test_target))
    best = lambda values: min(values, default=float("inf"))
    records = []
    for name, of in runs.items():
        records.append(
            {
                "method": name,
                "settings": ", ".join(f"{v:g}" for v in of[0].settings.values()),
                "final_loss": median(lambda r: r.final_loss, of),
                "best_test_loss": median(lambda r: best(r.test_loss), of),
                "metric": median(lambda r: max(r.test_metric, default=0.0), of),
                "to_train": to_train(of) / to_train(peer),
                "to_test": to_test(of) / to_test(peer),
                "per_iteration": seconds[name] / seconds[ADAM],
                "amortised": _mean_seconds(of) / _mean_seconds(peer),
                "solver_steps": median(lambda r: r.solver_steps, of),
                "curves": [(r.times.tolist(), r.smooth().tolist()) for r in of],
            }
        )
    report.table(f"{task.name}: ratios are to Adam", _COLUMNS, records)
    by_name = {record["method"]: record for record in records}
    enter = lambda what, value, limit: report.budgets.append(
        Budget(what, task.name, ADAM, value, limit)
    )
    amortised_limit = 1.6 if task.name == "circles" else 1.16
    for name in (PAPER, ROBUST):
        enter(f"ordinary iteration, {name}", by_name[name]["per_iteration"], 1.10)
        enter(f"amortised, {name}", by_name[name]["amortised"], amortised_limit)
    enter(f"time to train loss, {ROBUST}", by_name[ROBUST]["to_train"], 0.5)
    enter(f"time to test loss, {ROBUST}", by_name[ROBUST]["to_test"], 0.7)


def _mean_seconds(runs: list[Run]) -> float:
    return sum(sum(r.seconds) for r in runs) / sum(len(r.seconds) for r in runs)


def _plot(task: Task, runs: dict[str, list[Run]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for index, (name, of) in enumerate(runs.items()):
        for run_ in of:
            label = name if run_ is of[0] else None
            style = dict(color=f"C{index}", lw=1, label=label)
            axes[0].plot(run_.times, run_.smooth(), **style)
            at = [run_.times[i - 1] for i in run_.tested_at]
            axes[1].plot(at, run_.test_loss, **style)
    for axis, what in zip(axes, ("training", "test"), strict=True):
        axis.set(xlabel="seconds", ylabel=f"{what} loss", title=task.name)
        if task.predict is not None:
            axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# The end time.


def measure_terminal_time(report: Report, iterations: int) -> None:
    """Learns the end time of the digits' equation from 1, by SNOpt's feedback rule."""
    task = digits(iterations)
    records = []
    for penalty in (None, 0.05, 0.2):
        optim = optax.adamw(1e-2)
        if penalty is not None:
            rule = nodegrad.terminal_time(
                lambda m: m.t1, 0.1, penalty=penalty, update_every=5, decay=0.9
            )
            optim = optax.chain(optim, rule)
        model = ImageNODE(jr.PRNGKey(0), learn_t1=penalty is not None)
        state = optim.init(eqx.filter(model, eqx.is_inexact_array))
        step = nodegrad.make_steps(optim, task.losses).step
        batches = task.batches(0)
        for _ in range(iterations):
            model, state, _ = step(model, state, *next(batches))
        loss, accuracy = _evaluate(task, model)
        stats = task.steps(model, task.test)
        records.append(
            {
                "penalty": penalty if penalty is not None else 0.0,
                "t1": float(model.t1),
                "test_loss": float(loss),
                "accuracy": float(accuracy),
                "evaluations": float(jnp.mean(stats["num_vector_field_evaluations"])),
            }
        )
    columns = (
        Column("penalty", "penalty"),
        Column("t1", "end time", fixed(2)),
        Column("evaluations", "evaluations per pass", fixed(1)),
        Column("test_loss", "test loss", significant(3)),
        Column("accuracy", "accuracy", fixed(3)),
    )
    report.table("digits: learning the end time", columns, records)
    ratio = records[-1]["evaluations"] / records[0]["evaluations"]
    report.budgets.append(
        Budget("evaluations with a learned end time", "digits", "t1 = 1", ratio, 0.8)
    )
