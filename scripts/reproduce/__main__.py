"""Reproduces the experiments of the papers: `scripts/reproduce/run --help`."""

import argparse
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import MODULES, page, runner
from .archives import ARCHIVES, DamagedArchiveError, DownloadError
from .data import folder, MissingDataError
from .experiment import Experiment, Setting


_CONSOLE = Console()


def main() -> int:
    """Runs the experiments that the command line names, or lists all of them."""
    parser = _make_parser()
    options = parser.parse_args()
    experiments = {name: _load(name) for name in MODULES}
    unknown = [name for name in options.names if name not in experiments]
    if unknown:
        parser.error(f"no such experiment: {', '.join(unknown)}")
    if options.download and not _download(options.data):
        return 1
    chosen = list(experiments) if options.all else options.names
    seeds = options.seeds or (1 if options.size == "smoke" else 3)
    setting = Setting(options.size, seeds, options.data)
    failed = [
        name for name in chosen if not _run(experiments[name], setting, options.output)
    ]
    contents = _reports(experiments, options.output)
    if options.page:
        page.write(contents, options.output)
    elif chosen:
        _summarise(contents, options.output)
    else:
        _list(experiments, contents)
    if failed:
        _CONSOLE.print(f"[red]not finished: {', '.join(failed)}[/red]")
    return 1 if failed else 0


def _load(name: str) -> Experiment:
    return importlib.import_module(f"{__package__}.{name}").EXPERIMENT


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce/run",
        description="Runs the experiments of the papers; lists them without names.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="every experiment")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        default="default",
        help="the sizes of the papers, for a GPU",
    )
    size.add_argument(
        "--smoke",
        dest="size",
        action="store_const",
        const="smoke",
        help="seconds for each; shows only that everything runs",
    )
    parser.add_argument("--seeds", type=int, help="of whatever is random (3)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/reproduce"),
        help="the folder of the results (results/reproduce)",
    )
    folder = os.environ.get("NODEGRAD_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(folder) if folder else None,
        help="the folder of the data sets (the variable NODEGRAD_DATA)",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="first put the public archives (CIFAR-10, SVHN, MiniBooNE; 1.2 GB) into "
        "the folder of the data sets",
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="then write docs/reproduction.md from the results in the output folder",
    )
    return parser


def _download(path: Path | None) -> bool:
    """Whether all archives are in the folder of the data sets, as published."""
    try:
        for archive in ARCHIVES:
            archive.download(folder(path))
    except (MissingDataError, DownloadError, DamagedArchiveError) as error:
        _CONSOLE.print(f"[red]{error}[/red]", highlight=False)
        return False
    return True


def _run(experiment: Experiment, setting: Setting, output: Path) -> bool:
    """Whether the experiment came to its end."""
    try:
        content = runner.run(experiment, setting, output)
    except (MissingDataError, DamagedArchiveError) as error:
        _CONSOLE.print(f"[yellow]{experiment.name}: {error}[/yellow]", highlight=False)
        return False
    except Exception:
        # The other experiments are worth running all the same.
        _CONSOLE.print(f"[red]{experiment.name}:[/red]", traceback.format_exc())
        return False
    for claim in content["claims"]:
        text = f"  {claim['statement']}: {claim['ours']} (paper: {claim['paper']})"
        _CONSOLE.print(text, f"[bold]{claim['verdict']}[/bold]", highlight=False)
    return True


def _reports(experiments: dict[str, Experiment], output: Path) -> list[dict[str, Any]]:
    """The reports in the output folder, in order."""
    paths = [output / f"{name}.json" for name in experiments]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _summarise(contents: list[dict[str, Any]], output: Path) -> None:
    """Writes and prints all claims."""
    if not contents:
        return
    (output / "summary.md").write_text(runner.summary(contents))
    table = Table(title="claims", title_justify="left")
    for column in ("experiment", *runner.CLAIM_COLUMNS):
        table.add_column(column)
    for content in contents:
        for claim in runner.as_claims(content):
            style = "green" if claim.holds else "red"
            cells = claim.statement, claim.paper, claim.ours, claim.verdict
            table.add_row(content["name"], *cells, style=style)
    _CONSOLE.print(table)
    _CONSOLE.print(f"written to {output}", highlight=False)


def _list(experiments: dict[str, Experiment], contents: list[dict[str, Any]]) -> None:
    finished = {content["name"]: content for content in contents}
    table = Table()
    for column in ("name", "what it does", "source", "finished"):
        table.add_column(column)
    for name, experiment in experiments.items():
        size = finished[name]["size"] if name in finished else ""
        table.add_row(name, experiment.title, experiment.source, size)
    _CONSOLE.print(table)


if __name__ == "__main__":
    sys.exit(main())
