"""Tables and budgets: printed as they are measured, written as JSON at the end."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console


# What a table needs where there is no terminal to ask for its width.
_WIDTH = 180


@dataclass(frozen=True)
class Column:
    """The entry `key` of every record, under `header`."""

    key: str
    header: str
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class Budget:
    """A ratio that may not exceed `limit`; without a limit it is for information."""

    what: str
    case: str
    peer: str
    measured: float
    limit: float | None = None
    aim: float | None = None

    @property
    def verdict(self) -> str:
        """`ok`, `MISSED`, or nothing where there is no limit."""
        if self.limit is None:
            return ""
        return "ok" if self.measured <= self.limit else "MISSED"


@dataclass
class Report:
    """Everything one run of a benchmark found."""

    title: str
    header: dict[str, Any]
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prints the header."""
        console = Console()
        self._console = console if console.is_terminal else Console(width=_WIDTH)
        self._console.rule(self.title)
        for key, value in self.header.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items() if v)
            self._console.print(f"{key}: {value}", highlight=False)

    def note(self, text: str) -> None:
        """Prints a remark, and keeps it."""
        self.notes.append(text)
        self._console.print(f"[dim]{text}[/dim]", highlight=False)

    def table(
        self, title: str, columns: Sequence[Column], records: Sequence[dict[str, Any]]
    ) -> None:
        """Prints a table. Records that differ in `section` are set apart."""
        self.tables.append({"title": title, "records": list(records)})
        # Of a column that nobody filled in there is nothing to see.
        columns = [c for c in columns if any(r.get(c.key) is not None for r in records)]
        out = rich.table.Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            out.add_column(
                column.header, justify="right" if index else "left", no_wrap=True
            )
        for record, after in zip(records, [*records[1:], None], strict=True):
            ends = after is not None and after.get("section") != record.get("section")
            values = [record.get(column.key) for column in columns]
            shown = [
                "" if value is None else column.show(value)
                for column, value in zip(columns, values, strict=True)
            ]
            out.add_row(*shown, end_section=ends)
        self._console.print(out)

    def finish(self, path: Path | None) -> None:
        """Prints the budgets, and writes everything to `path`."""
        self._console.print(_budget_table(self.budgets))
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        budgets = [{**asdict(b), "verdict": b.verdict} for b in self.budgets]
        content = {
            "title": self.title,
            "header": self.header,
            "tables": self.tables,
            "budgets": budgets,
            "notes": self.notes,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        self._console.print(f"written to {path}", highlight=False)


def _budget_table(budgets: Sequence[Budget]) -> rich.table.Table:
    out = rich.table.Table(
        title="budgets",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    for header in ("what", "case", "relative to"):
        out.add_column(header)
    for header in ("measured", "limit", "aim", ""):
        out.add_column(header, justify="right")
    number = lambda x: "" if x is None else f"{x:.{3 if x < 0.1 else 2}f}"
    styles = {
        "ok": "[green]ok[/green]",
        "MISSED": "[bold red]MISSED[/bold red]",
        "": "",
    }
    for budget in budgets:
        out.add_row(
            budget.what,
            budget.case,
            budget.peer,
            number(budget.measured),
            "" if budget.limit is None else f"<= {number(budget.limit)}",
            number(budget.aim),
            styles[budget.verdict],
        )
    return out


# How numbers are shown.


def fixed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """With that many digits after the point."""
    return lambda value: f"{value * scale:.{digits}f}"


def significant(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """With that many digits in all, at least."""

    def show(value: float) -> str:
        value = value * scale
        if not math.isfinite(value):
            return str(value)
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        return f"{value:,.{max(digits - whole, 0)}f}"

    return show


def scientific(value: float) -> str:
    """As in `1e-06`."""
    return f"{value:.0e}"
