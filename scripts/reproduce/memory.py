"""The memory of an iteration of SNOpt, relative to that of Adam."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from benchmarks.measure import Clock, compile_program

from .experiment import Claim, Experiment, Report, Result, Setting, Table
from .optimisers import SNOPT, trainer
from .training_sets import TASKS


METHODS = ("adam", "snopt-paper", "snopt")


def _measure(task: str, method: str, folder: Path | None) -> Result:
    """Megabytes of model and state, and those that each kind of step takes besides."""
    made = trainer(task, method, 1, folder)
    model, state = made.start(made.method.trials[0], 0)
    batch = next(made.task.batches(0))
    steps = {"step": made.steps.step}
    if made.method.options is not None:
        steps["refresh"] = made.steps.refresh
    dynamic, static = eqx.partition((model, state), eqx.is_array)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree) if eqx.is_array(x))
    found = {"model": size(model) / 1e6, "state": size(state) / 1e6}
    for name, step in steps.items():

        def run(dynamic: Any, batch: Any, step: Any = step) -> Any:
            model, state = eqx.combine(dynamic, static)
            out = step(model, state, *batch, key=jr.PRNGKey(0))
            return eqx.filter(out, eqx.is_array)

        program = compile_program(Clock(lambda: 0.0, ""), run, dynamic, batch)
        found[name] = program.temp_bytes / 1e6
    return found


def _tasks(setting: Setting) -> dict[str, Any]:
    names = setting.pick(("digits",), ("digits", "mnist", "circles"), tuple(TASKS))
    return {
        f"{task}-{method}": partial(_measure, task, method, setting.data)
        for task in names
        for method in METHODS
    }


def _total(found: Result) -> float:
    """Model, state, and the step that takes more."""
    return found["model"] + found["state"] + max(found["step"], found.get("refresh", 0))


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    del setting
    rows, claims = [], []
    for task, (title, _) in TASKS.items():
        if f"{task}-adam" not in results:
            continue
        adam = _total(results[f"{task}-adam"])
        ratios = {}
        for method in METHODS:
            found = results[f"{task}-{method}"]
            ratios[method] = _total(found) / adam
            cells = [found["state"], found["step"], found.get("refresh")]
            rows.append([title, method, *cells, _total(found), ratios[method]])
        for method, what in SNOPT.items():
            claims.append(
                Claim(
                    f"{title}: {what} takes at most 40 % more memory than Adam",
                    "10 to 40 % more",
                    f"{100 * (ratios[method] - 1):.0f} % more",
                    ratios[method] <= 1.4,
                    "the table has both steps; other networks than the paper's",
                )
            )
    columns = ("data", "method", "state", "step", "refresh", "in all", "of Adam's")
    table = Table("Megabytes, for a batch of the training experiments", columns, rows)
    notes = (
        "Memory that the compiled programs allocate besides their arguments; in all: "
        "with the model, the state of the optimiser, and the larger of the two steps.",
        "Networks and data of the training experiments, all smaller than the paper's.",
    )
    return Report((table,), tuple(claims), {}, notes)


EXPERIMENT = Experiment(
    name="memory",
    title="Memory of SNOpt against first-order training",
    source="SNOpt, memory",
    tasks=_tasks,
    report=_report,
    x64=False,
)
