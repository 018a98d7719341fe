"""Runs the units of an experiment, keeps every result, and writes the report."""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from benchmarks.measure import Clock, describe_machine
from matplotlib.figure import Figure
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from .experiment import Claim, Experiment, Report, Result, Setting, Table


_CLOCK = Clock(time.perf_counter, "wall clock, all cores")


def run(experiment: Experiment, setting: Setting, output: Path) -> dict[str, Any]:
    """Computes what is missing, writes the report, and returns it as JSON."""
    results, spent = run_units(experiment, setting, output)
    report = experiment.report(results, setting)
    content = _content(experiment, setting, report, spent)
    if report.figures:
        content["figure"] = f"{experiment.name}.png"
        _draw(report, output / content["figure"])
    write_json(output / f"{experiment.name}.json", content)
    (output / f"{experiment.name}.md").write_text(markdown(content))
    return content


def run_units(
    experiment: Experiment, setting: Setting, output: Path
) -> tuple[dict[str, Result], dict[str, tuple[float, float]]]:
    """The results of all units, from files where possible, and what time they took.

    These are the seconds that passed, and the seconds of computation of all threads.
    """
    folder = output / experiment.name / setting.size
    tasks = experiment.tasks(setting)
    results, spent = {}, {}
    columns = (
        TextColumn(experiment.name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns))
        stack.enter_context(jax.enable_x64(experiment.x64))
        bar = progress.add_task("", total=len(tasks))
        for key, task in tasks.items():
            progress.update(bar, description=key)
            record = _read(folder / f"{key}.json", task)
            if record is None:
                start, computed = time.perf_counter(), time.process_time()
                result = task()
                record = {
                    "settings": _settings(task),
                    "seconds": time.perf_counter() - start,
                    # Other programs on the same machine do not add to this.
                    "cpu_seconds": time.process_time() - computed,
                    "result": result,
                }
                write_json(folder / f"{key}.json", record)
                # Also what a result looks like after it was written and read.
                record = json.loads(json.dumps(record))
            results[key] = record.pop("result")
            spent[key] = record["seconds"], record["cpu_seconds"]
            progress.update(bar, advance=1)
        progress.update(bar, description="")
    # The programs of one experiment are of no use to the next one.
    jax.clear_caches()
    return results, spent


def _settings(task: Callable[[], Result]) -> Any:
    """The arguments of a partial function that are plain values, as JSON has them."""
    if not isinstance(task, functools.partial):
        return {}
    plain = lambda x: isinstance(x, str | int | float | bool | tuple | list | None)
    named = {name: x for name, x in task.keywords.items() if plain(x)}
    positional = [x for x in task.args if plain(x)]
    return json.loads(json.dumps({"args": positional, **named}, default=str))


def _read(path: Path, task: Callable[[], Result]) -> Any:
    """What is stored for a unit, if it was made with the same settings."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record["settings"] == _settings(task) else None


def write_json(path: Path, content: Any) -> None:
    """Writes all of it or nothing, wherever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _content(
    experiment: Experiment,
    setting: Setting,
    report: Report,
    spent: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    dtype = "float64" if experiment.x64 else "float32"
    machine = describe_machine(_CLOCK, dtype)
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "size": setting.size,
        "seeds": setting.seeds,
        "machine": {**machine, "processor": _processor()},
        "seconds": {key: passed for key, (passed, _) in spent.items()},
        "cpu_seconds": {key: computed for key, (_, computed) in spent.items()},
        "tables": [asdict(table) for table in report.tables],
        "claims": [{**asdict(c), "verdict": c.verdict} for c in report.claims],
        "notes": list(report.notes),
    }


def _processor() -> str | None:
    """The model of the processor, where Linux says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else None


def _draw(report: Report, path: Path) -> None:
    width = 4.5 * len(report.figures)
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots(1, len(report.figures), squeeze=False)[0]
    for axis, (title, draw) in zip(axes, report.figures.items(), strict=True):
        draw(axis)
        axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)


# Markdown.

CLAIM_COLUMNS = ("claim", "paper", "ours", "verdict")


def markdown(content: Mapping[str, Any], images: str = "") -> str:
    """The report of one experiment; its figure is in the folder `images`."""
    lines = [f"## {content['title']}", "", f"{content['source']}.", ""]
    lines += claims_table(content["claims"])
    for entry in content["tables"]:
        table = Table(**entry)
        lines += [f"**{table.title}**", "", *_table(table.columns, table.rows), ""]
    if "figure" in content:
        lines += [f"![{content['title']}]({images}{content['figure']})", ""]
    lines += [f"- {note}" for note in content["notes"]]
    lines += [f"- {made_how(content)}", ""]
    return "\n".join(lines)


def claims_table(claims: list[Any]) -> list[str]:
    """The claims as lines of a Markdown table, with an empty line after it."""
    if not claims:
        return []
    keys = "statement", "paper", "ours", "verdict"
    return [*_table(CLAIM_COLUMNS, [[c[key] for key in keys] for c in claims]), ""]


def _table(columns: Any, rows: Any) -> list[str]:
    line = lambda cells: "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def made_how(content: Mapping[str, Any]) -> str:
    """Size, seeds, time and machine in a sentence."""
    machine = content["machine"]
    processor = machine["processor"] or machine["machine"]
    device = processor if machine["platform"] == "cpu" else machine["device"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    return (
        f"Size `{content['size']}`, {content['seeds']} seeds, "
        f"{sum(content['seconds'].values()):.0f} s "
        f"({sum(content['cpu_seconds'].values()):.0f} s of computation) on {device}, "
        f"{machine['cores']} cores, {machine['dtype']}, Python {machine['python']}, "
        f"{versions}."
    )


def summary(contents: list[dict[str, Any]]) -> str:
    """All claims of all experiments as a Markdown table."""
    rows = [
        [content["name"], c["statement"], c["paper"], c["ours"], c["verdict"]]
        for content in contents
        for c in content["claims"]
    ]
    return "\n".join(_table(("experiment", *CLAIM_COLUMNS), rows)) + "\n"


def as_claims(content: Mapping[str, Any]) -> list[Claim]:
    """The claims of a report that was read from its file."""
    keys = "statement", "paper", "ours", "holds", "reason"
    return [Claim(**{key: c[key] for key in keys}) for c in content["claims"]]
