"""Writes `docs/reproduction.md` from the results in an output folder."""

import shutil
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
"""


def write(contents: list[dict[str, Any]], output: Path, docs: Path = DOCS) -> None:
    """Writes the page, and copies results and figures beside it."""
    contents = [content for content in contents if content["size"] != "smoke"]
    parts = [_HEAD, "## All claims\n", runner.summary(contents)]
    for content in contents:
        runner.write_json(docs / "reproduction" / f"{content['name']}.json", content)
        if "figure" in content:
            (docs / _IMAGES).mkdir(parents=True, exist_ok=True)
            shutil.copy(output / content["figure"], docs / _IMAGES)
        parts.append(runner.markdown(content, _IMAGES))
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "reproduction.md").write_text("\n".join(parts).rstrip() + "\n")
