"""Draws docs/images/stiff_noise.png from docs/benchmarks/stiff.json."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


ROOT = Path(__file__).parents[1]
TITLE = "Ornstein-Uhlenbeck process"


def main() -> None:
    """Reads the results of `scripts/benchmark.py stiff`, and draws one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=ROOT / "docs" / "benchmarks" / "stiff.json"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "images" / "stiff_noise.png"
    )
    arguments = parser.parse_args()
    tables = json.loads(arguments.results.read_text())["tables"]
    (records,) = (t["records"] for t in tables if t["title"] == TITLE)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    markers = iter("os^vDx+*")
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [r for r in records if r["method"] == method]
        rows = [r for r in rows if r["error"] < 10 and not r["failed"]]
        sizes, errors = ([row[key] for row in rows] for key in ("section", "error"))
        axes.loglog(sizes, errors, marker=next(markers), label=method)
    axes.set_xlabel("rate of the decay times step size")
    axes.set_ylabel("root mean square error")
    axes.set_title("Failed solves, and errors above 10, are left out")
    axes.legend(fontsize="small")
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
