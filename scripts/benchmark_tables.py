"""Benchmark results as markdown tables: `python scripts/benchmark_tables.py`.

Reads the JSON files that `scripts/benchmark.py SUBCOMMAND --output FILE` writes, from
`docs/benchmarks`. The documentation site shows these tables. Its pages also name single
results in a comment, as in `0.73<!-- examples.time -->`; `--refresh FILE...` writes the
numbers before these comments.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
SUBCOMMANDS = (
    "gradients",
    "ensembles",
    "examples",
    "fits",
    "modes",
    "reversible",
    "reversible-examples",
    "robustness",
    "second-order",
    "stiff",
    "training",
)
#: Other results of the same subcommands: the end of the name of their file, where they
#: were measured, and with which options.
_ELSEWHERE = {
    "-gpu": ("on a GPU", " --clock wall"),
    "-newest": ("on the newest JAX", " --quick"),
}
NOT_MEASURED = "not measured"

Results = Mapping[str, dict[str, Any]]
Record = dict[str, Any]


def load(folder: Path = FOLDER) -> Results:
    """The results of all subcommands that have a file in `folder`."""
    names = [name + end for end in ("", *_ELSEWHERE) for name in SUBCOMMANDS]
    paths = {name: folder / f"{name}.json" for name in names}
    return {
        name: json.loads(path.read_text())
        for name, path in paths.items()
        if path.exists()
    }


# Single results.


@dataclass(frozen=True)
class Quantity:
    """The ratio of an entry of one row of a table to that of another row.

    - `subcommand`, `table`: where the rows are; `section` picks among the sections of
      a table (usually numbers of steps).
    - `method`, `peer`: the names of the two rows.
    - `key`: the entry, `seconds`, `build_seconds` or `temp_bytes`.
    - `over_sections`: if given, the ratio is taken in every section, and this makes one
      number of them.
    """

    subcommand: str
    table: str
    method: str
    peer: str
    key: str
    section: Any = None
    over_sections: Callable[[list[float]], float] | None = None

    def value(self, results: Results) -> float | None:
        """The number, or `None` if it was not measured."""
        if self.subcommand not in results:
            return None
        tables = results[self.subcommand]["tables"]
        records = [r for t in tables if t["title"] == self.table for r in t["records"]]
        numerators = self._entries(records, self.method)
        denominators = self._entries(records, self.peer)
        ratios = {s: x / denominators[s] for s, x in numerators.items()}
        if self.over_sections is None:
            return ratios.get(self.section)
        return self.over_sections(list(ratios.values())) if ratios else None

    def _entries(self, records: list[Record], method: str) -> dict[Any, float]:
        return {r.get("section"): r[self.key] for r in records if r["method"] == method}


def _time_and_memory(
    name: str, subcommand: str, table: str, method: str, peer: str, section: Any = None
) -> dict[str, Quantity]:
    of = partial(Quantity, subcommand, table, method, peer, section=section)
    return {f"{name}.time": of(key="seconds"), f"{name}.memory": of(key="temp_bytes")}


def _quantities() -> dict[str, Quantity]:
    default, ours = "Diffrax default", "ACA in diffeqsolve"
    mapped, mapped_ours = f"vmap of {default}", f"vmap of {ours}"
    lorenz = "Lorenz, 2048 samples, own parameters: gradient"
    all_examples = "Diffrax's documentation examples"
    found = {
        f"examples.{name}{suffix}": Quantity(
            "examples", all_examples, ours, default, key, over_sections=over_sections
        )
        for name, key in (
            ("time", "seconds"),
            ("memory", "temp_bytes"),
            ("build", "build_seconds"),
        )
        for suffix, over_sections in (
            ("", statistics.median),
            (".least", min),
            (".most", max),
        )
    }
    found |= _time_and_memory("lorenz", "ensembles", lorenz, ours, default)
    found["lorenz.gradsolve.time"] = Quantity(
        "ensembles",
        lorenz,
        ours,
        "replay of gradsolve, recorded before",
        "seconds",
    )
    found |= _time_and_memory(
        "batch", "modes", "MLP 8-128-128-8, batch 64, 30 steps", mapped_ours, mapped
    )
    for method in "jvp", "jacfwd":
        where = "modes", "tangents of ACA", method, "solve"
        found |= _time_and_memory(method, *where)
    parameters = "100 parameters, 50 steps"
    for name, method in (("hvp", "hvp, ACA"), ("ggn", "ggn_vp, ACA")):
        where = "second-order", parameters, method, "gradient, ACA"
        found |= _time_and_memory(name, *where, section=parameters)
    network = "dim 4, width 64, batch 128"
    for name, method in (
        ("aca", "ACA"),
        ("aca_in_diffeqsolve", ours),
        ("aca_16", "ACA, 16 checkpoints"),
        ("aca_all", "ACA, all"),
        ("direct", "Diffrax DirectAdjoint"),
        ("backsolve", "Diffrax BacksolveAdjoint"),
    ):
        where = "gradients", network, method, default
        found |= _time_and_memory(f"network.{name}", *where, section=100)
    wide = "modes-gpu", "dim 64, width 1024, batch 1024", "vmap of ACA", mapped
    found |= _time_and_memory("gpu.batch", *wide)
    dwarf = "white dwarf network, batch 32, Bosh3"
    for name, method, peer in (
        ("reversible", "ReversibleAdjoint", f"plain: {default}"),
        ("plain_aca", "plain: ACA", f"plain: {default}"),
        ("coupled", "ReversibleAdjoint", default),
        ("aca", "ReversibleAdjoint", "plain: ACA"),
    ):
        where = "reversible", dwarf, method, peer
        found |= _time_and_memory(f"dwarf.{name}", *where, section=1000)
    return found


QUANTITIES = _quantities()


def shown(name: str, results: Results) -> str:
    """The quantity `name`, with two digits."""
    value = QUANTITIES[name].value(results)
    return NOT_MEASURED if value is None else _significant(2)(value)


def filled(text: str, results: Results) -> str:
    """`text` with every `{{ tables of NAME }}` replaced by those of that subcommand."""
    whole = lambda match: tables_of(match[1], results)
    return re.sub(r"\{\{ tables of ([\w-]+) \}\}", whole, text)


def refreshed(text: str, results: Results) -> str:
    """`text` in which each number before a comment `<!-- name -->` is up to date."""

    def replacement(match: re.Match) -> str:
        number = shown(match[2], results)
        return f"{match[1] if number == NOT_MEASURED else number}<!-- {match[2]} -->"

    return re.sub(r"([\d.]+)<!-- ([\w.]+) -->", replacement, text)


# Tables.


def _significant(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    def show(value: float) -> str:
        value = value * scale
        if value == 0:
            return "0"
        first = len(f"{abs(value):.0f}") if abs(value) >= 1 else _first_digit(value)
        return f"{value:,.{max(digits - first, 0)}f}"

    return show


def _first_digit(value: float) -> int:
    """Minus the number of zeros between the point and the first digit."""
    return int(f"{value:e}".split("e")[1]) + 1


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _scientific(value: float) -> str:
    return f"{value:.0e}"


#: What a table shows of its records: the entry, its header, and how it is written.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("case", "case", str),
    ("method", "method", str),
    ("settings", "settings", str),
    ("steps", "steps", str),
    ("rejected", "rejected", str),
    ("seconds", "time (ms)", _significant(3, 1e3)),
    ("time_ratio", "time, ratio", _ratio),
    ("temp_bytes", "memory (kB)", _significant(3, 1e-3)),
    ("memory_ratio", "memory, ratio", _ratio),
    ("states", "memory (states)", lambda x: f"{x:.0f}"),
    ("build_seconds", "build (s)", _significant(3)),
    ("build_ratio", "build, ratio", _ratio),
    ("total_seconds", "build and run (s)", _significant(3)),
    ("forward_evaluations", "evaluations, forward", _significant(3)),
    ("backward_evaluations", "evaluations, backward", _significant(3)),
    ("difference", "difference to the first row", _scientific),
    ("grid_error", "error, same steps", _scientific),
    ("exact_error", "error, exact solution", _scientific),
    ("error", "relative error", _scientific),
    ("loss", "loss", _significant(4)),
    ("final_loss", "training loss", _significant(3)),
    ("lower_on", "seeds below Adam", str),
    ("diverged", "diverged", str),
    ("failed", "failed", str),
    ("to_train", "time to Adam's training loss", _ratio),
    ("best_test_loss", "best test loss", _significant(3)),
    ("last_test_loss", "without the mean", _significant(3)),
    ("metric", "test metric", lambda x: f"{x:.3f}"),
    ("to_test", "time to Adam's test loss", _ratio),
    ("per_iteration", "ordinary iteration", _ratio),
    ("amortised", "iteration with refreshes", _ratio),
    ("solver_steps", "solver steps", lambda x: f"{x:.1f}"),
    ("share", "near its best", _ratio),
    ("near_adam", "near Adam's best", _ratio),
    ("best", "best test loss", _significant(3)),
    ("median", "median", _significant(3)),
    ("worst", "worst", _significant(3)),
    ("penalty", "penalty", str),
    ("t1", "end time", lambda x: f"{x:.2f}"),
    ("evaluations", "evaluations", lambda x: f"{x:.1f}"),
    ("test_loss", "test loss", _significant(3)),
    ("accuracy", "accuracy", lambda x: f"{x:.3f}"),
    ("parameter", "parameter", str),
    ("parameters", "parameters", str),
    ("llh", "log-likelihood", lambda x: f"{x:.4f}"),
    ("reference", "reference", lambda x: f"{x:.4f}"),
    ("llh_difference", "difference", _scientific),
    ("gradient_error", "gradient, relative error", _scientific),
    ("best_llh", "best log-likelihood", lambda x: f"{x:.3f}"),
    ("converged", "converged", str),
    ("iterations", "iterations, median", lambda x: f"{x:.0f}"),
    ("cpu_seconds", "time (s)", _significant(3)),
    ("per_second", "converged per second", _significant(2)),
    ("estimate", "estimate", lambda x: f"{x:.4f}"),
    ("standard_error", "standard error", _scientific),
    ("at_bound", "at a bound", str),
)


def _markdown(headers: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A table whose first `texts` columns are text and whose others are numbers."""
    rule = [":--"] * texts + ["--:"] * (len(headers) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, rule, *rows])


def records_table(records: Sequence[Record]) -> str:
    """A table of measurements, without the columns in which there is nothing."""
    records = [_with_section(r) for r in records]
    columns = [
        (key, header, show)
        for key, header, show in _COLUMNS
        if any(r.get(key) is not None for r in records)
    ]
    rows = [
        ["" if r.get(key) is None else show(r[key]) for key, _, show in columns]
        for r in records
    ]
    texts = sum(key in ("case", "method", "settings") for key, _, _ in columns)
    return _markdown([header for _, header, _ in columns], rows, texts)


def _with_section(record: Record) -> Record:
    """`record` with its section, a name or a number of steps, under its own key."""
    section = record.get("section")
    if section is None or "steps" in record:
        return record
    return {**record, "case" if isinstance(section, str) else "steps": section}


def budget_table(budgets: Sequence[Record]) -> str:
    """Every ratio that was held against a limit, or is given for information."""
    rows = [
        [
            b["what"],
            b["case"],
            b["peer"],
            f"{b['measured']:.3f}",
            "" if b["limit"] is None else _ratio(b["limit"]),
            f"**{b['verdict']}**" if b["verdict"] == "MISSED" else b["verdict"],
        ]
        for b in budgets
    ]
    headers = ("what", "case", "relative to", "measured", "limit", "verdict")
    return _markdown(headers, rows, 3)


def _section(name: str, result: dict[str, Any]) -> str:
    """All of one subcommand, as a section of a page."""
    limited = [b for b in result["budgets"] if b["limit"] is not None]
    met = sum(b["verdict"] == "ok" for b in limited)
    subcommand, title, options = name, name, ""
    for end, (where, needed) in _ELSEWHERE.items():
        if name.endswith(end):
            subcommand, options = name.removesuffix(end), needed
            title = f"{subcommand}, {where}"
    parts = [
        f"## {title}",
        f"`python scripts/benchmark.py {subcommand}{options}`: {met} of {len(limited)} "
        f"limits are met ([all numbers as JSON](benchmarks/{name}.json)).",
        _machine(result["header"]),
        *result["notes"],
        budget_table(result["budgets"]),
    ]
    for table in result["tables"]:
        body = records_table(table["records"])
        parts += [f'??? note "{table["title"]}"', _indented(body)]
    return "\n\n".join(parts)


def _machine(header: Record) -> str:
    versions = header["versions"].items()
    packages = ", ".join(f"{name} {number}" for name, number in versions if number)
    return (
        f"Measured on {header['date'].split()[0]}: {header['device']}, "
        f"{header['machine']}, {header['cores']} cores; {header['dtype']}; "
        f"{header['clock']}; Python {header['python']}, {packages}."
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def tables(results: Results) -> str:
    """All results, one section for each subcommand."""
    missing = [name for name in SUBCOMMANDS if name not in results]
    sections = [_section(name, result) for name, result in results.items()]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        sections.append(f"## Not measured\n\nThere are no results of {names}.")
    return "\n\n".join(sections)


def tables_of(name: str, results: Results) -> str:
    """The tables of one subcommand, each after its title."""
    if name not in results:
        return f"`{name}`: {NOT_MEASURED}."
    parts = [_machine(results[name]["header"]), *results[name]["notes"]]
    for table in results[name]["tables"]:
        parts += [f"*{table['title']}*", records_table(table["records"])]
    return "\n\n".join(parts)


def error_rates(folder: Path = FOLDER) -> str:
    """The table of what `scripts/reversible_errors.py` found."""
    rates = json.loads((folder / "reversible_errors.json").read_text())
    lines = [
        "| solver | problems | wrong, and called successful | more than ten tolerances "
        "beyond the base solver | `coupling_lost` | failed otherwise | steps, relative "
        "to the base solver | resyncs, median | resyncs, nine of ten at most |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = "problems", "wrong", "beyond", "lost", "failed"
    for name, row in rates.items():
        counts = " | ".join(str(row[key]) for key in keys)
        resyncs = f"{row['resyncs']:.0f} | {row['many_resyncs']:.0f}"
        lines.append(f"| `{name}` | {counts} | {row['steps']:.2f} | {resyncs} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables, or refreshes the numbers in files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the JSON files")
    parser.add_argument(
        "--refresh", type=Path, nargs="+", metavar="FILE", help="instead of printing"
    )
    arguments = parser.parse_args()
    results = load(arguments.folder)
    if arguments.refresh is None:
        print(tables(results))
        return
    for path in arguments.refresh:
        path.write_text(refreshed(path.read_text(), results))


if __name__ == "__main__":
    main()
