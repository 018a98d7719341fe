"""Writes `docs/reproduction.md` from the results in an output folder."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import runner


DOCS = Path(__file__).parents[2] / "docs"
_IMAGES = "images/reproduction/"
_HEAD = """\
# The papers' experiments, run again

This page is generated: `scripts/reproduce/run --all` runs the experiments, and
`scripts/reproduce/run --page` writes it. Every table says how large the experiment was,
and what stands in for what the paper used. Numbers over several seeds are medians, with
the smallest and the largest value in brackets. A claim that fails is listed as well.
Experiments that were also run with `--full`, on a GPU, have a second section. Where the
published data can be downloaded, `scripts/reproduce/run --download` puts them into the
folder of the data sets, and the experiments use them instead of stand-ins.
"""


def write(contents: list[dict[str, Any]], output: Path, docs: Path = DOCS) -> None:
    """Writes the page, and copies results and figures beside it."""
    contents = [content for content in contents if content["size"] != "smoke"]
    for content in contents:
        runner.write_json(docs / "reproduction" / f"{content['name']}.json", content)
        if "figure" in content:
            (docs / _IMAGES).mkdir(parents=True, exist_ok=True)
            shutil.copy(output / content["figure"], docs / _IMAGES)
    shown = list(_with_full(contents, docs / "reproduction"))
    parts = [_HEAD, "## All claims\n", runner.summary(shown)]
    parts += [runner.markdown(content, _IMAGES) for content in shown]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "reproduction.md").write_text("\n".join(parts).rstrip() + "\n")


def _with_full(
    contents: list[dict[str, Any]], folder: Path
) -> Iterator[dict[str, Any]]:
    """Adds what `folder` keeps of runs with `--full`, which few machines can repeat."""
    for content in contents:
        yield content
        path = folder / f"{content['name']}-full.json"
        if content["size"] == "default" and path.exists():
            full = json.loads(path.read_text())
            name, title = f"{content['name']}, full", f"{full['title']}, full size"
            yield {**full, "name": name, "title": title}
