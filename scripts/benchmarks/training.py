"""Training with SNOpt against first-order optimisers: time to a loss, final metric.

Every method gets the same number of trials over its settings, each on several seeds,
because one is luck. Three of them are reported, by medians over the seeds: the one with
the lowest training loss at the end, the one that is first at Adam's final training
loss, and the one with the best test loss. Times are those of the training steps alone,
without compilation and evaluation; every method sees the same batches. (L-BFGS needs
the same loss in every iteration, and these are minibatches.)
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
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
from .soap import soap
from .training_examples import control, hybrid, latent, moons, spiral
from .training_tasks import (
    circles,
    data_folder,
    digits,
    discs,
    ImageNODE,
    Task,
    words,
)


#: What everything is trained in.
DTYPE = "float32"
#: From how many iterations. The words need a folder as well.
_TASKS: dict[str, Callable[..., Task]] = {
    task.__name__: task
    for task in (
        digits,
        words,
        circles,
        discs,
        spiral,
        latent,
        control,
        moons,
        hybrid,
    )
}

ADAM, SGD, MUON, SOAP = "Adam", "SGD, momentum 0.9", "Muon", "SOAP"
PAPER, ROBUST = "SNOpt, paper", "SNOpt, robust"
DEFAULT, DECAYED = "snopt()", "snopt(weight_decay=1e-4)"


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
    - `every`: so many iterations are between refreshes; `None`: fewer and fewer.
    """

    name: str
    make: Callable[..., Any]
    trials: Sequence[dict[str, float]]
    options: dict[str, Any] | None = None
    every: int | None = None

    def refreshes(self, index: int) -> bool:
        """Whether the iteration `index` computes the curvature."""
        if self.options is None:
            return False
        if self.every is None:
            return index in (5, 10, 20, 40) or index % 100 == 0
        return index % self.every == 0


def _trials(rates: Sequence[float], *others: dict[str, float]) -> list[dict[str, Any]]:
    return [{"learning_rate": r, **other} for other in others for r in rates]


_DECAYS = {"weight_decay": 0.0}, {"weight_decay": 1e-2}
METHODS = (
    Method(ADAM, optax.adamw, _trials((3e-3, 1e-2, 3e-2), *_DECAYS)),
    Method(SGD, _sgd, _trials((1e-2, 3e-2, 1e-1), *_DECAYS)),
    Method(MUON, _muon, _trials((3e-3, 1e-2, 3e-2), *_DECAYS)),
    Method(SOAP, soap, _trials((3e-3, 1e-2, 3e-2), *_DECAYS)),
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
            (2e-2, 5e-2, 1e-1),
            {"weight_decay": 0.0, "damping": 0.1},
            {"weight_decay": 5e-2, "damping": 0.1},
        ),
        {"kind": "ggn", "moments": True},
    ),
    # One trial: there is nothing to tune.
    *(
        Method(
            name,
            lambda weight_decay: nodegrad.snopt(weight_decay=weight_decay),
            [{"weight_decay": weight_decay}],
            {"kind": "ggn", "moments": True},
            every=10,
        )
        for name, weight_decay in ((DEFAULT, 0.0), (DECAYED, 1e-4))
    ),
)


@dataclass
class Run:
    """One training run: curves over iterations, and times of its steps.

    - `test_loss`, `test_metric`: of the running mean of the parameters, if the
      optimiser keeps one. `last_test_loss` is that of the parameters themselves.
    """

    method: str
    settings: dict[str, float]
    seed: int
    train: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refreshed: list[bool] = field(default_factory=list)
    tested_at: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    last_test_loss: list[float] = field(default_factory=list)
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

    @property
    def best_test_loss(self) -> float:
        """The lowest test loss on the way."""
        return min(self.test_loss, default=float("inf"))

    @property
    def best_last_test_loss(self) -> float:
        """The same of the parameters themselves."""
        return min(self.last_test_loss, default=float("inf"))

    @property
    def best_metric(self) -> float:
        """The highest test metric on the way."""
        return max(self.test_metric, default=-np.inf)

    def iterations_to_train_loss(self, target: float) -> float:
        """After how many iterations the smoothed training loss was as low as that."""
        reached = np.flatnonzero(self.smooth() <= target)
        return reached[0] + 1 if len(reached) else float("inf")

    def iterations_to_test_loss(self, target: float) -> float:
        """After how many iterations the test loss was as low as that."""
        reached = np.flatnonzero(np.asarray(self.test_loss) <= target)
        return self.tested_at[reached[0]] if len(reached) else float("inf")

    def time_of(self, iterations: float) -> float:
        """The time that so many iterations took."""
        return self.times[int(iterations) - 1] if iterations < np.inf else np.inf


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
        """Compiles everything; returns an ordinary iteration, always the same.

        It starts after a refresh, where it is like most others.
        """
        start = self.start(self.method.trials[0], 0)
        batch, key = next(self.task.batches(0)), jr.PRNGKey(0)
        steps = self._steps if self.method.options is not None else [self._steps.step]
        for first in steps:
            model, state, _ = first(*start, *batch, key=key)
            # What comes out of a step may have other types than what went in at first.
            for step in steps:
                model, state, _ = step(model, state, *batch, key=key)
        return lambda: self._steps.step(model, state, *batch, key=key)[2]

    def test(
        self, model: Any, state: Any
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Test loss and metric of `averaged(model, state)`, and of `model` itself."""

        def evaluate(model: Any) -> tuple[float, float]:
            loss, metric = self._evaluate(model)
            return float(loss), float(metric)

        last, mean = evaluate(model), averaged(model, state)
        return last if mean is model else evaluate(mean), last

    def runs(self, settings: dict[str, float], seeds: int) -> list[Run]:
        """A run for every seed, evaluated about thirty times on the way."""
        every = max(1, self.task.iterations // 30)
        return [self.run(settings, seed, every) for seed in range(seeds)]

    def run(self, settings: dict[str, float], seed: int, every: int) -> Run:
        """Trains, and evaluates `every` so many iterations."""
        out = Run(self.method.name, settings, seed)
        model, state = self.start(settings, seed)
        batches, key = self.task.batches(seed), jr.PRNGKey(seed)
        for index in range(self.task.iterations):
            batch, key = next(batches), jr.fold_in(key, index)
            refresh = self.method.refreshes(index)
            step = self._steps.refresh if refresh else self._steps.step
            before = self._clock.now()
            model, state, value = step(model, state, *batch, key=key)
            out.train.append(float(value))
            out.seconds.append(self._clock.now() - before)
            out.refreshed.append(refresh)
            if not np.isfinite(out.train[-1]):
                break
            if (index + 1) % every == 0:
                (loss, metric), (last_loss, _) = self.test(model, state)
                out.tested_at.append(index + 1)
                out.test_loss.append(loss)
                out.test_metric.append(metric)
                out.last_test_loss.append(last_loss)
        stats = eqx.filter_jit(self.task.steps)(model, next(self.task.batches(seed)))
        out.solver_steps = float(jnp.mean(stats["num_steps"]))
        return out


def settings_text(settings: dict[str, float]) -> str:
    """The numbers of a trial."""
    return ", ".join(f"{x:g}" for x in settings.values())


def averaged(model: Any, state: Any) -> Any:
    """The model with the running mean of its parameters, if the optimiser has one."""
    progress = getattr(state.inner_state, "progress", None)
    return model if progress is None else eqx.combine(progress.average, model)


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
    parser.add_argument("--seeds", type=int, help="runs of every trial (5; discs: 10)")
    parser.add_argument("--iterations", type=int, help="of every run (300; discs: 200)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=tuple(_TASKS),
        default=list(_TASKS),
        help="words needs the folder of its data in NODEGRAD_DATA",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[method.name for method in METHODS],
        default=[method.name for method in METHODS],
        help="Adam always runs",
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Trains everything."""
    methods = [m for m in METHODS if m.name in (ADAM, *arguments.methods)]
    if arguments.quick:
        quick = [m for m in methods if m.name in (ADAM, DEFAULT)]
        methods = [replace(m, trials=m.trials[:1]) for m in quick]
    names = arguments.tasks[:1] if arguments.quick else arguments.tasks
    report.note(
        f"{len(methods[0].trials)} trials of every method on every seed, and one of "
        f"`{DEFAULT}` and `{DECAYED}`. Medians over the seeds: the training loss of "
        "the trial in which it is lowest; times of the trial that is first at Adam's; "
        "test loss and metric of the trial with the lowest test loss on the way. "
        f"`{DEFAULT}` and `{DECAYED}` keep a running mean of the parameters, which is "
        "what is tested; the column beside it has the parameters themselves."
    )
    for name in names:
        seeds, iterations = _asked_lengths(name, arguments)
        task = make_task(name, iterations)
        if task is None:
            report.note("words: left out, NODEGRAD_DATA has no data.")
            continue
        report.note(f"{name}: {seeds} seeds, {iterations} iterations.")
        trainers = [Trainer(task, method, clock) for method in methods]
        one_step = {t.method.name: t.warm_up() for t in trainers}
        seconds = time_in_turns(clock, one_step, seconds=5.0)
        tuned = _tuned_runs(trainers, seeds)
        _report_task(report, task, tuned, seconds)
        _plot(task, tuned, Path("results") / f"training_{name}.png")
    _enter_median(report)
    complete = len(methods) == len(METHODS)
    if complete and not arguments.quick and "digits" in names:
        measure_terminal_time(report, *_asked_lengths("digits", arguments))


def _asked_lengths(name: str, arguments: argparse.Namespace) -> tuple[int, int]:
    seeds, iterations = lengths(name, arguments.quick)
    asked = None if arguments.quick else arguments.seeds
    return asked or seeds, arguments.iterations or iterations


def lengths(name: str, quick: bool) -> tuple[int, int]:
    """The numbers of seeds and of iterations of a task."""
    if quick:
        return 1, 60
    # The discs are the example of the documentation, which makes 200 steps.
    return (10, 200) if name == "discs" else (5, 300)


def make_task(name: str, iterations: int) -> Task | None:
    """A task by its name; `None` if its data are missing."""
    if name == "words":
        folder = data_folder()
        return None if folder is None else words(iterations, folder)
    return _TASKS[name](iterations)


Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Tuned:
    """The runs of all methods, each with the settings that are best for one purpose.

    - `by_loss`: for the training loss at the end.
    - `by_time`: for the time to Adam's training loss at the end.
    - `by_test`: for the lowest test loss on the way.
    """

    by_loss: Runs
    by_time: Runs
    by_test: Runs


def _tuned_runs(trainers: Sequence[Trainer], seeds: int) -> Tuned:
    """Runs all trials of all methods."""
    trials = {
        t.method.name: [t.runs(settings, seeds) for settings in t.method.trials]
        for t in trainers
    }
    train_target = min(_median(_final_loss, runs) for runs in trials[ADAM])

    def to_train(runs: list[Run]) -> tuple[float, float]:
        reached = lambda run: run.iterations_to_train_loss(train_target)
        return _median(reached, runs), _median(_final_loss, runs)

    best = lambda key: {name: min(of, key=key) for name, of in trials.items()}
    return Tuned(
        by_loss=best(lambda runs: _median(_final_loss, runs)),
        by_time=best(to_train),
        by_test=best(lambda runs: _median(_best_test_loss, runs)),
    )


def _median(get: Callable[[Run], float], runs: list[Run]) -> float:
    return statistics.median(map(get, runs))


_final_loss = attrgetter("final_loss")
_best_test_loss = attrgetter("best_test_loss")
_best_last_test_loss = attrgetter("best_last_test_loss")
_best_metric = attrgetter("best_metric")


# What to say of it.


_COLUMNS = (
    Column("method", "method"),
    Column("final_loss", "train loss", significant(3)),
    Column("lower_on", "below Adam's"),
    Column("diverged", "diverged"),
    Column("settings", "settings"),
    Column("to_train", "time to Adam's", fixed(2)),
    Column("test_settings", "settings"),
    Column("best_test_loss", "best test loss", significant(3)),
    Column("last_test_loss", "without mean", significant(3)),
    Column("metric", "test metric", fixed(3)),
    Column("to_test", "time to Adam's", fixed(2)),
    Column("per_iteration", "per iteration", fixed(2)),
    Column("amortised", "with refreshes", fixed(2)),
    Column("solver_steps", "solver steps", fixed(1)),
)


def _report_task(
    report: Report, task: Task, tuned: Tuned, seconds: dict[str, float]
) -> None:
    by_loss, by_time, by_test = tuned.by_loss, tuned.by_time, tuned.by_test
    train_target = _median(_final_loss, by_loss[ADAM])
    test_target = _median(_best_test_loss, by_test[ADAM])
    to_train = partial(
        _median, lambda r: r.time_of(r.iterations_to_train_loss(train_target))
    )
    to_test = partial(
        _median, lambda r: r.time_of(r.iterations_to_test_loss(test_target))
    )
    whole = lambda of: _median(lambda r: r.times[-1], of)
    settings = lambda of: settings_text(of[0].settings)
    records = []
    for name, of in by_time.items():
        records.append(
            {
                "method": name,
                "final_loss": _median(_final_loss, by_loss[name]),
                "lower_on": f"{_lower(by_loss[name], by_loss[ADAM])} of {len(of)}",
                "diverged": sum(r.final_loss == np.inf for r in by_loss[name]),
                "settings": settings(of),
                "to_train": to_train(of) / whole(by_time[ADAM]),
                "test_settings": settings(by_test[name]),
                "best_test_loss": _median(_best_test_loss, by_test[name]),
                "last_test_loss": _median(_best_last_test_loss, by_test[name]),
                "metric": _median(_best_metric, by_test[name]),
                "to_test": to_test(by_test[name]) / whole(by_test[ADAM]),
                "per_iteration": seconds[name] / seconds[ADAM],
                "amortised": _mean_seconds(of) / _mean_seconds(by_time[ADAM]),
                "solver_steps": _median(attrgetter("solver_steps"), of),
            }
        )
    report.table(f"{task.name}: ratios are to Adam", _COLUMNS, records)
    by_name = {record["method"]: record for record in records}
    enter = lambda what, value, limit: report.budgets.append(
        Budget(what, task.name, ADAM, value, limit)
    )
    amortised_limit = 1.6 if task.name == "circles" else 1.16
    for name in filter(by_name.__contains__, (PAPER, ROBUST)):
        enter(f"ordinary iteration, {name}", by_name[name]["per_iteration"], 1.10)
        enter(f"amortised, {name}", by_name[name]["amortised"], amortised_limit)
    limits = {ROBUST: (0.5, 0.7), DEFAULT: (0.4, 0.7)}
    for name in filter(by_name.__contains__, limits):
        to_train, to_test = limits[name]
        enter(f"time to train loss, {name}", by_name[name]["to_train"], to_train)
        enter(f"time to test loss, {name}", by_name[name]["to_test"], to_test)
        behind = by_name[ADAM]["metric"] - by_name[name]["metric"]
        enter(f"test metric, Adam's less that of {name}", behind, 0.0)
        higher = 1 - _lower(by_loss[name], by_loss[ADAM]) / len(by_loss[name])
        enter(f"share of seeds with a higher training loss, {name}", higher, 0.2)


def _enter_median(report: Report) -> None:
    """The median over the tasks of the time to Adam's training loss."""
    what = f"time to train loss, {DEFAULT}"
    times = [budget.measured for budget in report.budgets if budget.what == what]
    if len(times) > 1:
        case, median = f"{len(times)} tasks", statistics.median(times)
        report.budgets.append(Budget(f"median {what}", case, ADAM, median, 0.4, 0.25))


def _lower(runs: list[Run], others: list[Run]) -> int:
    """On how many seeds `runs` end at a lower training loss than `others`."""
    pairs = zip(runs, others, strict=True)
    return sum(run_.final_loss < other.final_loss for run_, other in pairs)


def _mean_seconds(runs: list[Run]) -> float:
    return sum(sum(r.seconds) for r in runs) / sum(len(r.seconds) for r in runs)


def _plot(task: Task, tuned: Tuned, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for index, name in enumerate(tuned.by_time):
        style: dict[str, Any] = dict(color=f"C{index}", lw=1)
        for seed, run_ in enumerate(tuned.by_time[name]):
            label = None if seed else name
            axes[0].plot(run_.times, run_.smooth(), label=label, **style)
        for run_ in tuned.by_test[name]:
            at = [run_.time_of(i) for i in run_.tested_at]
            axes[1].plot(at, run_.test_loss, **style)
    for axis, what in zip(axes, ("training", "test"), strict=True):
        axis.set(xlabel="seconds", ylabel=f"{what} loss", title=task.name)
        if task.predict is not None:
            axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# The end time.


def measure_terminal_time(report: Report, seeds: int, iterations: int) -> None:
    """Learns the end time of the digits' equation from 1, by SNOpt's feedback rule."""
    task = digits(iterations)
    penalties = None, 0.1, 0.3, 0.5
    records = [_with_end_time(task, penalty, seeds) for penalty in penalties]
    columns = (
        Column("penalty", "penalty"),
        Column("t1", "end time", fixed(2)),
        Column("evaluations", "evaluations per pass", fixed(1)),
        Column("test_loss", "test loss", significant(3)),
        Column("accuracy", "accuracy", fixed(3)),
    )
    title = f"digits: learning the end time (Adam, medians of {seeds} seeds)"
    report.table(title, columns, records)
    ratio = records[-1]["evaluations"] / records[0]["evaluations"]
    report.budgets.append(
        Budget("evaluations with a learned end time", "digits", "t1 = 1", ratio, 0.8)
    )


def _with_end_time(task: Task, penalty: float | None, seeds: int) -> dict[str, Any]:
    """What comes of training with a `penalty` on the end time, or with a fixed one."""
    optim: Any = optax.adamw(1e-2)
    if penalty is not None:
        rule = nodegrad.terminal_time(
            lambda m: m.t1, 0.1, penalty=penalty, update_every=5, decay=0.9
        )
        optim = optax.chain(optim, rule)
    step, found = nodegrad.make_steps(optim, task.losses).step, []
    for seed in range(seeds):
        model = ImageNODE(jr.PRNGKey(seed), learn_t1=penalty is not None)
        state = optim.init(eqx.filter(model, eqx.is_inexact_array))
        batches = task.batches(seed)
        for _ in range(task.iterations):
            model, state, _ = step(model, state, *next(batches))
        loss, accuracy = _evaluate(task, model)
        stats = task.steps(model, task.test)
        evaluations = jnp.mean(stats["num_vector_field_evaluations"])
        found.append([float(x) for x in (model.t1, evaluations, loss, accuracy)])
    names = "t1", "evaluations", "test_loss", "accuracy"
    medians = map(float, np.median(found, axis=0))
    return {"penalty": penalty or 0.0, **dict(zip(names, medians, strict=True))}
