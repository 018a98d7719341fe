"""Programs that compute the same, compared with the first of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from .measure import Clock, compile_in_turns, Program, relative_error, time_in_turns
from .report import Budget, Column, fixed, Report, scientific, significant


#: Of the entries that `measured` makes, but for the first.
MEASURED = (
    Column("method", "method"),
    Column("seconds", "time (ms)", significant(3, 1e3)),
    Column("time_ratio", "ratio", fixed(2)),
    Column("build_seconds", "build (s)", fixed(2)),
    Column("build_ratio", "ratio", fixed(2)),
    Column("temp_bytes", "temp (kB)", significant(3, 1e-3)),
    Column("memory_ratio", "ratio", fixed(2)),
    Column("difference", "diff. to first", scientific),
)


def measured(
    programs: Mapping[str, Program],
    seconds: Mapping[str, float],
    results: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A record for each program, with ratios to the first one."""
    first = next(iter(programs))
    peer = programs[first]
    return [
        {
            "method": method,
            "seconds": seconds[method],
            "time_ratio": seconds[method] / seconds[first],
            "build_seconds": program.build_seconds,
            "build_ratio": program.build_seconds / peer.build_seconds,
            "temp_bytes": program.temp_bytes,
            "memory_ratio": program.temp_bytes / max(peer.temp_bytes, 1),
            "difference": relative_error(results[method], results[first])
            if method in results
            else None,
        }
        for method, program in programs.items()
    ]


def budgets(
    record: Mapping[str, Any], case: str, peer: str, limits: Mapping[str, float]
) -> list[Budget]:
    """What the time, memory and build of a record of `measured` have to keep to."""
    what = f"of {record['method']}"
    return [
        Budget(f"{kind} {what}", case, peer, record[f"{kind}_ratio"], limit)
        for kind, limit in limits.items()
    ]


def compare(
    clock: Clock,
    report: Report,
    name: str,
    makers: Mapping[str, Callable[[], Callable[..., Any]]],
    args: tuple[Any, ...],
    limits: Mapping[str, float],
    seconds: float,
    without_limits: tuple[str, ...] = (),
) -> dict[str, float]:
    """Compiles, times and compares; enters a budget for each of `limits`.

    Not for the first program, nor for those `without_limits`.
    """
    programs = compile_in_turns(clock, makers, args, 1)
    runs = {name: partial(program.run, *args) for name, program in programs.items()}
    times = time_in_turns(clock, runs, seconds=seconds * len(runs))
    results = {method: run()[1] for method, run in runs.items()}
    shapes = {method: jax.eval_shape(lambda x: x, x) for method, x in results.items()}
    first = shapes[next(iter(runs))]
    results = {method: x for method, x in results.items() if shapes[method] == first}
    records = measured(programs, times, results)
    report.table(name, MEASURED, records)
    peer, *others = records
    for record in others:
        if record["method"] not in without_limits:
            report.budgets.extend(budgets(record, name, peer["method"], limits))
    return times
