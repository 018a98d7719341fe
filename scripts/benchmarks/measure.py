"""Measuring compiled JAX programs against one another, in one process.

Programs are compiled ahead of time and called in turns, forwards and backwards through
the list, so that whatever else the machine does falls on all of them alike; what is
reported is the median over the turns.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits


_PACKAGES = ("nodegrad", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy")


@dataclass(frozen=True)
class Clock:
    """`now` in seconds, and a sentence on what the clock counts."""

    now: Callable[[], float]
    description: str


def make_clock(kind: str) -> Clock:
    """The clock named `kind`; call this before JAX starts its first backend.

    The time that this process spent computing (`"process"`) is unmoved by other
    processes, as long as there is one thread: so it is pinned to one core. Work on an
    accelerator is not in it; that takes `"wall"`.
    """
    if kind == "wall":
        return Clock(time.perf_counter, "wall clock, all cores")
    where = "all cores"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        # The threads of LAPACK would wait for one another on that core.
        threadpool_limits(1)
        where = "pinned to one core"
    if jax.default_backend() != "cpu":
        msg = "process time does not see work on an accelerator: use --clock wall"
        raise SystemExit(msg)
    return Clock(time.process_time, f"CPU time of this process, {where}")


def describe_machine(clock: Clock, dtype: str) -> dict[str, Any]:
    """What the numbers depend on besides the programs."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "dtype": dtype,
        "clock": clock.description,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


@dataclass(frozen=True)
class Program:
    """A compiled program, and what it cost to get there."""

    run: Callable[..., Any]
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    temp_bytes: int

    @property
    def build_seconds(self) -> float:
        """From the Python function to the executable."""
        return self.trace_seconds + self.lower_seconds + self.compile_seconds


def compile_program(clock: Clock, fn: Callable[..., Any], *args: Any) -> Program:
    """`fn`, compiled for arguments like `args`."""
    gc.collect()
    times = [clock.now()]
    traced = jax.jit(fn).trace(*args)
    times.append(clock.now())
    lowered = traced.lower()
    times.append(clock.now())
    compiled = lowered.compile()
    times.append(clock.now())
    analysis = compiled.memory_analysis()
    return Program(
        compiled,
        *np.diff(times).tolist(),
        temp_bytes=0 if analysis is None else analysis.temp_size_in_bytes,
    )


def compile_in_turns(
    clock: Clock,
    makers: Mapping[str, Callable[[], Callable[..., Any]]],
    args: tuple[Any, ...],
    repeats: int,
) -> dict[str, Program]:
    """Compiles every program `repeats` times, and takes medians of the times.

    Each maker returns a function that JAX has not seen yet: one that it has would be
    found in a cache.
    """
    built: dict[str, list[Program]] = {name: [] for name in makers}
    for name in in_turns(makers, repeats):
        built[name].append(compile_program(clock, makers[name](), *args))
    return {name: _median_program(programs) for name, programs in built.items()}


def _median_program(programs: list[Program]) -> Program:
    median = lambda name: statistics.median(getattr(p, name) for p in programs)
    return Program(
        programs[-1].run,
        median("trace_seconds"),
        median("lower_seconds"),
        median("compile_seconds"),
        programs[-1].temp_bytes,
    )


def in_turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """All `names`, `rounds` times over, every other time in reverse."""
    order = list(names)
    for index in range(rounds):
        yield from order if index % 2 == 0 else reversed(order)


def time_in_turns(
    clock: Clock,
    runs: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    max_rounds: int = 41,
    min_rounds: int = 3,
    once_above: float = float("inf"),
) -> dict[str, float]:
    """The median time of a call of each of `runs`.

    There are as many rounds as fit into `seconds`, between `min_rounds` and
    `max_rounds`. Calls too short for the clock are repeated within a round; those that
    take longer than `once_above` are made once.
    """
    first = {name: _seconds_of(clock, run, 1) for name, run in runs.items()}
    once = {name: t for name, t in first.items() if t > once_above}
    runs = {name: run for name, run in runs.items() if name not in once}
    again = {name: _seconds_of(clock, run, 1) for name, run in runs.items()}
    calls = {name: max(1, round(2e-3 / max(t, 1e-6))) for name, t in again.items()}
    one_round = sum(again[name] * calls[name] for name in runs)
    rounds = int(np.clip(seconds / max(one_round, 1e-9), min_rounds, max_rounds))
    samples: dict[str, list[float]] = {name: [again[name]] for name in runs}
    if one_round > seconds:
        # Next to calls this long, whatever is done only once is nothing.
        samples = {name: [first[name], again[name]] for name in runs}
        rounds = max(1, min_rounds - 2)
    for name in in_turns(runs, rounds):
        samples[name].append(_seconds_of(clock, runs[name], calls[name]))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    return {**medians, **once}


def _seconds_of(clock: Clock, run: Callable[[], Any], calls: int) -> float:
    start = clock.now()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (clock.now() - start) / calls


class EvaluationCounter:
    """Counts how often a vector field is evaluated at run time."""

    def __init__(self) -> None:
        """Starts at zero."""
        self._count = 0

    def instrument(self, vector_field: Callable[..., Any]) -> Callable[..., Any]:
        """`vector_field`, counted."""

        def counted(t: Any, y: Any, args: Any) -> Any:
            # It takes no argument, so evaluating a batch counts once.
            jax.debug.callback(self._increment)
            return vector_field(t, y, args)

        return counted

    def count(self, run: Callable[[], Any]) -> int:
        """How many evaluations one call of `run` makes."""
        jax.effects_barrier()
        self._count = 0
        jax.block_until_ready(run())
        jax.effects_barrier()
        return self._count

    def _increment(self) -> None:
        self._count += 1


def relative_error(value: Any, reference: Any) -> float:
    """The distance of two pytrees in the 2-norm, relative to that of `reference`."""
    flat = lambda tree: np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    )
    value, reference = flat(value), flat(reference)
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
