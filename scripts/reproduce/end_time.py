"""Learning the end time of an equation together with its parameters."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from benchmarks.training_tasks import accuracy, digits, ImageNODE
from matplotlib.axes import Axes

import nodegrad

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


# The end time at first and the penalty on it; without a penalty it stays what it is.
CASES = {
    "fixed": (1.0, None),
    "from-1": (1.0, 0.5),
    "from-0.1": (0.1, 0.5),
    "weak-from-1": (1.0, 0.1),
}


@lru_cache
def _programs(penalty: float | None, iterations: int) -> Any:
    task = digits(iterations)
    optim: Any = optax.adamw(1e-2)
    if penalty is not None:
        rule = nodegrad.terminal_time(
            lambda m: m.t1, 0.1, penalty=penalty, update_every=5, decay=0.9
        )
        optim = optax.chain(optim, rule)

    @eqx.filter_jit
    def test(model: Any) -> Any:
        stats = model.solution(task.test[0]).stats
        evaluations = jnp.mean(stats["num_vector_field_evaluations"])
        return accuracy(model(task.test[0]), *task.test), evaluations

    return task, optim, nodegrad.make_steps(optim, task.losses).step, test


def _train(t1: float, penalty: float | None, iterations: int, seed: int) -> Result:
    """End times on the way; accuracy and evaluations for a sample at the end."""
    task, optim, step, test = _programs(penalty, iterations)
    model = ImageNODE(jr.PRNGKey(seed), learn_t1=penalty is not None)
    start = jnp.float32(t1) if penalty is not None else t1
    model = eqx.tree_at(lambda m: m.t1, model, start)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    batches, end_times = task.batches(seed), []
    for _ in range(iterations):
        model, state, _ = step(model, state, *next(batches))
        end_times.append(float(model.t1))
    share, evaluations = map(float, test(model))
    return {"accuracy": share, "evaluations": evaluations, "end_times": end_times}


def _tasks(setting: Setting) -> dict[str, Any]:
    iterations = setting.pick(2, 300, 3000)
    cases = list(CASES.items())[: setting.pick(2, 4, 4)]
    return {
        f"{name}-seed{seed}": partial(_train, *case, iterations, seed)
        for name, case in cases
        for seed in range(setting.seeds)
    }


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    runs = {name: across_seeds(results, name) for name in CASES}
    runs = {name: found for name, found in runs.items() if found}
    of = lambda name, key: [run[key] for run in runs[name]]
    rows = [
        [
            CASES[name][0],
            CASES[name][1] or "fixed",
            spread([run["end_times"][-1] for run in found]),
            spread(of(name, "evaluations")),
            spread([100 * x for x in of(name, "accuracy")], 4),
        ]
        for name, found in runs.items()
    ]
    columns = (
        "T at first",
        "penalty",
        "T at the end",
        "evaluations of a solve",
        "test accuracy (%)",
    )
    median = lambda name, key: float(np.median(of(name, key)))
    cut = 1 - median("from-1", "evaluations") / median("fixed", "evaluations")
    loss = 100 * (median("fixed", "accuracy") - median("from-1", "accuracy"))
    claims = (
        Claim(
            "learning T cuts the evaluations by 20 %",
            "20 % of the run time",
            f"{100 * cut:.0f} % of the evaluations",
            cut >= 0.2,
        ),
        Claim(
            "the accuracy stays what it is, to a point",
            "the same",
            f"{abs(loss):.2g} points {'lower' if loss > 0 else 'higher'}",
            loss < 1,
        ),
    )
    notes = (
        f"The 8 x 8 digits of scikit-learn, {setting.pick(2, 300, 3000)} iterations of "
        "AdamW with 128 of them (the paper: CIFAR-10). Tsit5 at 1e-3.",
        "The step of T: 0.1 of the minimiser of its quadratic model, every 5 "
        "iterations, averages of 0.9.",
    )
    figures = {"end time": partial(_draw, runs)}
    table = Table("Joint learning of the end time T", columns, rows)
    return Report((table,), claims, figures, notes)


def _draw(runs: Mapping[str, list[Result]], axes: Axes) -> None:
    for number, (name, found) in enumerate(runs.items()):
        for seed, run in enumerate(found):
            label = None if seed else name
            axes.plot(run["end_times"], color=f"C{number}", label=label)
    axes.set(xlabel="iteration", ylabel="T")
    axes.legend(fontsize=7)


EXPERIMENT = Experiment(
    name="end_time",
    title="Learning the end time together with the parameters",
    source="SNOpt, joint optimisation of the end time",
    tasks=_tasks,
    report=_report,
    x64=False,
)
