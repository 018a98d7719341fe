"""What a gradient costs with each adjoint, and how far it is from the exact one."""

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._solve.aca_adjoint import ACAAdjoint
from .._solve.reversible_adjoint import ReversibleAdjoint
from .finite_differences import element_scales
from .varied_solve import Loss, Program, with_adjoint


ADJOINTS = (
    ACAAdjoint(),
    ACAAdjoint("all"),
    ReversibleAdjoint(),
    diffrax.RecursiveCheckpointAdjoint(),
    diffrax.DirectAdjoint(),
    diffrax.BacksolveAdjoint(),
)
_APPROXIMATE = diffrax.BacksolveAdjoint, diffrax.ImplicitAdjoint
# A leaf may matter less than this, compared with the one that matters most. Then the
# error of its gradient is relative to this.
_LEAST = 1e-2


@dataclass(frozen=True)
class AdjointCost:
    """A gradient of the user's loss with one adjoint.

    - `error`: the relative difference from the exact gradient; `None` if there is no
      gradient.
    - `seconds`: the median time of value and gradient; `None` if it was not measured.
    - `temp_bytes`: the memory that the compiled program allocates, without its
      arguments and results; `None` if it was not compiled.
    - `note`: why there is no gradient, otherwise empty.
    - `is_yours`: whether the user's loss has this adjoint.
    - `is_exact`: whether the adjoint differentiates the computed solution.
    """

    name: str
    error: float | None
    seconds: float | None
    temp_bytes: int | None
    note: str
    is_yours: bool
    is_exact: bool


def relative_error(found: PyTree, reference: PyTree, params: PyTree) -> float:
    """Returns the largest relative error of a leaf of a gradient.

    Entries are multiplied by the scales of their parameters, so that parameters of
    different units can be compared. NaN or infinite entries are an infinite error.
    """
    scales = element_scales(params)
    error, size = [], []
    for x, y, s in zip(*map(jax.tree.leaves, (found, reference)), scales, strict=True):
        x, y = np.asarray(x, complex), np.asarray(y, complex)
        error.append(np.max(np.abs((x - y) * s), initial=0.0))
        size.append(np.max(np.abs(y * s), initial=0.0))
    least = _LEAST * max(size)
    errors = [e / max(n, least) if e else 0.0 for e, n in zip(error, size, strict=True)]
    return float(max(errors)) if np.all(np.isfinite(errors)) else float("inf")


def adjoint_name(adjoint: diffrax.AbstractAdjoint) -> str:
    """Returns how a user writes `adjoint`, without the fields that are `None`."""
    package = (
        "diffrax" if type(adjoint).__module__.startswith("diffrax") else "nodegrad"
    )
    if isinstance(adjoint, ACAAdjoint) and adjoint.max_recorded_steps is None:
        checkpoints = adjoint.checkpoints
        shown = "" if checkpoints is None else repr(checkpoints).replace("'", '"')
        return f"nodegrad.ACAAdjoint({shown})"
    is_plain = bool(eqx.tree_equal(adjoint, type(adjoint)()))
    return f"{package}.{type(adjoint).__name__}({'' if is_plain else '...'})"


def costs(
    loss: Loss,
    yours: Program,
    your_adjoints: Sequence[diffrax.AbstractAdjoint],
    adjoints: Sequence[diffrax.AbstractAdjoint],
    reference: PyTree | None,
    repeats: int,
    memory_limit: float,
) -> tuple[AdjointCost, ...]:
    """Returns the costs of the user's own program, then those of `adjoints`.

    `your_adjoints`: the adjoint of every solve in the user's program.
    """
    mine = {adjoint_name(a): a for a in your_adjoints}
    your_name = " and ".join(mine)
    named = {adjoint_name(a): [a] for a in adjoints} | {your_name: your_adjoints}
    programs: dict[str, Program] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, used in named.items():
        # Any kind of failure of an adjoint is a result here.
        try:
            program = yours
            if name != your_name:
                program = Program(loss, lambda a=used[0]: with_adjoint(a))
            programs[name] = program
            if (program.temp_bytes or 0) > memory_limit:
                notes[name] = "not run: it needs more than `memory_limit`"
            elif reference is not None:
                errors[name] = relative_error(program()[1], reference, loss.params)
        except Exception as error:
            notes[name] = first_line(error)
    times = _times({name: programs[name] for name in errors}, repeats)
    return tuple(
        AdjointCost(
            name=name,
            error=errors.get(name),
            seconds=times.get(name),
            temp_bytes=programs[name].temp_bytes if name in programs else None,
            note=notes.get(name, ""),
            is_yours=name == your_name,
            is_exact=not _is_approximate(used),
        )
        for name, used in named.items()
    )


def _is_approximate(adjoints: Sequence[diffrax.AbstractAdjoint]) -> bool:
    return any(isinstance(adjoint, _APPROXIMATE) for adjoint in adjoints)


def _times(programs: dict[str, Program], repeats: int) -> dict[str, float]:
    """Returns median times. The programs take turns, so that a busy machine is fair."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(ts) for name, ts in times.items() if ts}


def first_line(error: Exception) -> str:
    """Returns the beginning of the message of an error."""
    # The error of a compiled program contains the traceback to the error of a solve.
    inner = re.search(r"EquinoxRuntimeError: (.*)", str(error))
    if inner is not None:
        return inner[1]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def recommended(rows: Sequence[AdjointCost], tolerance: float) -> AdjointCost | None:
    """Returns the exact adjoint to use, or `None` if none was measured.

    That is the fastest one, or one that takes at most a tenth more time and the least
    memory of those.
    """
    rows = [
        row
        for row in rows
        if row.is_exact and row.error is not None and row.error <= tolerance
    ]
    if not rows:
        return None
    least = min(row.seconds or 0.0 for row in rows)
    fast = [row for row in rows if (row.seconds or 0.0) <= 1.1 * least]
    return min(fast, key=lambda row: row.temp_bytes or 0)
