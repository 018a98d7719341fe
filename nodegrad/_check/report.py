"""The result of a check, for programs and for people."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import PyTree

from .costs import AdjointCost


# Each verdict of a whole check, and what it means.
VERDICTS = {
    "right": "the gradient is right, and the solve is accurate enough for it",
    "solve_failed": "a solve failed, in the loss or in its backward pass",
    "not_finite": "the gradient contains NaN or infinity",
    "reconstruction_lost": (
        "the backward pass could not reconstruct the states of the solve"
    ),
    "adjoint_differs": "the adjoint's gradient is not that of the computed solution",
    "differences_disagree": (
        "the gradient is not the derivative of the loss: a derivative rule "
        "(`custom_vjp`, `custom_jvp`, `stop_gradient`) in your functions is wrong, or "
        "the loss has no derivative here"
    ),
    "not_smooth": (
        "the loss is not smooth: its differences do not converge to the gradient. Put "
        "jumps of the vector field into `jump_ts` or events"
    ),
    "solve_too_loose": "the solve is not accurate enough for this gradient",
    "undecided": "not everything could be checked",
}


@dataclass(frozen=True)
class Check:
    """One of the checks.

    - `verdict`: `"passed"`, `"failed"`, `"undecided"`, `"information"` (a number that
      decides nothing) or `"skipped"`.
    - `error`: a relative error, which passes up to the `tolerance`.
    - `uncertainty`: how much the check itself may be wrong, relative as well.
    - `words`: what was compared, and why it was skipped if it was.
    - `details`: the numbers behind it, one dictionary a row.
    """

    verdict: str
    words: str
    error: float | None = None
    uncertainty: float | None = None
    details: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradient` found; `print` shows it as tables.

    See `check_gradient` for the fields.
    """

    verdict: str
    advice: tuple[str, ...]
    tolerance: float
    value: float
    num_parameters: int
    num_solves: int
    accepted_steps: tuple[int, int] | None
    checks: dict[str, Check]
    adjoints: tuple[AdjointCost, ...]
    recommended: str | None
    gradient: PyTree = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the verdict is `"right"`."""
        return self.verdict == "right"

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the gradient, as `json.dumps` takes it."""
        out = {k: v for k, v in vars(self).items() if k not in ("gradient", "checks")}
        out["adjoints"] = [asdict(row) for row in self.adjoints]
        out["checks"] = {name: asdict(check) for name, check in self.checks.items()}
        return out

    def __str__(self) -> str:
        steps = ""
        if self.accepted_steps is not None:
            least, most = self.accepted_steps
            each = f"{least}" if least == most else f"{least} to {most}"
            solves = "solve" if self.num_solves == 1 else "solves"
            steps = f"{self.num_solves} {solves} with {each} accepted steps"
        parts = [
            f"{self.verdict}: {VERDICTS[self.verdict]}",
            f"loss {self.value:.6g}; parameters: {self.num_parameters}; {steps}; "
            f"tolerance {self.tolerance:.0e}",
            _table(("check", "verdict", "error", "+-", ""), _check_rows(self.checks)),
            _difference_table(self.checks["finite_differences"]),
            _table(
                ("adjoint", "error", "time", "memory", ""),
                map(_cost_row, self.adjoints),
            ),
            "\n".join(self.advice),
        ]
        return "\n\n".join(part for part in parts if part)

    __repr__ = __str__


def _check_rows(checks: dict[str, Check]) -> Iterable[Sequence[str]]:
    for name, c in checks.items():
        numbers = _number(c.error), _number(c.uncertainty)
        yield name.replace("_", " "), c.verdict, *numbers, c.words


def _cost_row(row: AdjointCost) -> Sequence[str]:
    seconds = "" if row.seconds is None else f"{1e3 * row.seconds:.3g} ms"
    memory = "" if row.temp_bytes is None else f"{row.temp_bytes / 1e3:.4g} kB"
    note = row.note if len(row.note) < 80 else row.note[:77] + "..."
    yours = "(yours) " if row.is_yours else ""
    approximate = "" if row.is_exact else "(approximate) "
    words = f"{yours}{approximate}{note}".strip()
    return row.name, _number(row.error), seconds, memory, words


def _difference_table(check: Check) -> str:
    """Shows the differences in the direction with the largest error."""
    if not check.details:
        return ""
    worst = max(check.details, key=lambda row: row["error"])
    columns = worst["step_sizes"], worst["frozen_errors"], worst["adaptive_errors"]
    names = "step size", "steps held constant", "steps adapt"
    moved = ", ".join(worst["leaves"])
    title = f"differences from the gradient, in a direction that moves {moved}:"
    rows = (
        (f"{h:.1e}", _number(frozen), _number(adaptive))
        for h, frozen, adaptive in zip(*columns, strict=True)
    )
    return f"{title}\n{_table(names, rows)}"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns aligned lines, or nothing without rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = lambda line: "  ".join(map(str.ljust, line, widths)).rstrip()
    head, *body = map(align, lines)
    return "\n".join([head, "-" * len(head), *body])


def advice(
    verdict: str,
    checks: dict[str, Check],
    adjoints: Sequence[AdjointCost],
    best: AdjointCost | None,
    tolerance: float,
) -> tuple[str, ...]:
    """Returns what to do, one sentence each."""
    said = []
    if verdict == "solve_too_loose":
        rows = checks["solve"].details
        enough = [row["scale"] for row in rows if row["error"] <= tolerance]
        said.append(
            f"Multiply rtol and atol (or dt0) by {max(enough):g}: then the error of "
            "the gradient should be small enough."
            if enough
            else "Even more accurate solves have gradients that differ by more than "
            "the tolerance: the problem may be chaotic, stiff, or not smooth."
        )
    if checks["reconstruction"].verdict == "failed":
        said.append(
            "Do not use ReversibleAdjoint here: pass resync_every=10 or so to the "
            "solver, take smaller steps, or use nodegrad.ACAAdjoint()."
        )
    mine = next((row for row in adjoints if row.is_yours), None)
    if best is not None and mine is not None:
        said.append(_comparison(best, mine))
    return tuple(said)


def _comparison(best: AdjointCost, mine: AdjointCost) -> str:
    if best.is_yours:
        return f"Keep {best.name}."
    parts = []
    if best.seconds is not None and mine.seconds:
        parts.append(f"{best.seconds / mine.seconds:.2g} times the time")
    if best.temp_bytes is not None and mine.temp_bytes:
        parts.append(f"{best.temp_bytes / mine.temp_bytes:.2g} times the memory")
    takes = f": it takes {' and '.join(parts)} of {mine.name}" if parts else ""
    return f"Use {best.name}{takes}."
