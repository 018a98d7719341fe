"""What an experiment is: units of work, and a report made of their results."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from matplotlib.axes import Axes


Size = Literal["smoke", "default", "full"]
#: What a unit of work returns: anything that JSON can hold.
Result = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """How large an experiment is.

    - `size`: `"smoke"` takes seconds and shows only that everything runs; `"default"`
      fits two CPU cores; `"full"` is the paper's size, for a GPU.
    - `seeds`: how many runs there are of whatever is random.
    - `data`: the folder of the data sets, if there is one.
    """

    size: Size = "default"
    seeds: int = 3
    data: Path | None = None

    def pick(self, smoke: _T, default: _T, full: _T) -> _T:
        """The one of the three that belongs to this size."""
        return {"smoke": smoke, "default": default, "full": full}[self.size]


@dataclass(frozen=True)
class Table:
    """Rows of numbers and strings. Every row has one entry for each column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, with the paper's number and ours.

    - `reason`: why it fails, if it does.
    """

    statement: str
    paper: str
    ours: str
    holds: bool
    reason: str = ""

    @property
    def verdict(self) -> str:
        """`holds`, or `fails` with the reason."""
        if self.holds:
            return "holds"
        return f"fails: {self.reason}" if self.reason else "fails"


@dataclass(frozen=True)
class Report:
    """What came out of an experiment.

    - `figures`: functions that draw on axes, by the titles of these. All are drawn side
      by side in one picture.
    - `notes`: every difference from the paper's experiment: sizes, data, settings.
    """

    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]
    figures: Mapping[str, Callable[[Axes], None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """An experiment of one of the papers.

    - `name`: that of its module, and of its files.
    - `title`: what it does, in one line.
    - `source`: the paper, and where in it.
    - `tasks`: from a setting, the units of work, by keys that can be file names. A unit
      is computed once and kept, so the key names its seed. The arguments of a
      `functools.partial` are kept with its result, which is not used any more once they
      differ.
    - `report`: from the results of all units, by their keys.
    - `x64`: whether the numbers are in double precision.
    """

    name: str
    title: str
    source: str
    tasks: Callable[[Setting], Mapping[str, Callable[[], Result]]]
    report: Callable[[Mapping[str, Result], Setting], Report]
    x64: bool = True


# How numbers are shown.


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits."""
    return f"{value:.{digits}g}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The median, and the smallest and the largest value."""
    low, high = number(min(values), digits), number(max(values), digits)
    middle = number(statistics.median(values), digits)
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def entirely_below(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether each of `ours` is less than each of `theirs`.

    Medians of a few seeds say nothing where their ranges overlap.
    """
    return max(ours) < min(theirs)


def across_seeds(results: Mapping[str, Result], prefix: str) -> list[Result]:
    """The results whose keys are `prefix` and the number of a seed."""
    stem = f"{prefix}-seed"
    return [r for key, r in results.items() if key.startswith(stem)]
