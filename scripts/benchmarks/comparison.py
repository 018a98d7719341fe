"""Programs that compute the same, compared with the first of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from .measure import Clock, compile_in_turns, Program, relative_error, time_in_turns
from .report import Budget, Column, fixed, Report, scientific, significant


_COLUMNS = (
    Column("method", "method"),
    Column("seconds", "time (ms)", significant(3, 1e3)),
    Column("time_ratio", "ratio", fixed(2)),
    Column("build_seconds", "build (s)", fixed(2)),
    Column("build_ratio", "ratio", fixed(2)),
    Column("temp_bytes", "temp (kB)", significant(3, 1e-3)),
    Column("memory_ratio", "ratio", fixed(2)),
    Column("difference", "diff. to first", scientific),
)


def print_table(
    report: Report,
    name: str,
    programs: Mapping[str, Program],
    seconds: Mapping[str, float],
    results: Mapping[str, Any],
) -> None:
    """Prints one row for each program, with ratios to the first one."""
    first = next(iter(programs))
    peer = programs[first]
    records = [
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
    report.table(name, _COLUMNS, records)


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
    print_table(report, name, programs, times, results)
    peer, *others = programs
    for method in [name for name in others if name not in without_limits]:
        program, reference = programs[method], programs[peer]
        ratios = {
            "time": times[method] / times[peer],
            "memory": program.temp_bytes / max(reference.temp_bytes, 1),
            "build": program.build_seconds / reference.build_seconds,
        }
        for kind, limit in limits.items():
            budget = Budget(f"{kind} of {method}", name, peer, ratios[kind], limit)
            report.budgets.append(budget)
    return times
