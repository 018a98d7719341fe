"""The single checks, and the verdict that follows from them.

Every error is relative, and passes up to the user's `tolerance`.
"""

import math
from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._solve.aca_adjoint import ACAAdjoint
from .._solve.reversible_adjoint import ReversibleAdjoint
from .costs import first_line, relative_error
from .finite_differences import Differences, directions, make_differences
from .report import Check
from .varied_solve import Call, Loss, Program, scaled


# The largest reconstruction error with which `ReversibleAdjoint` returns a gradient.
_MAX_RECONSTRUCTION = 1e-3
# Tighter tolerances, and smaller constant step sizes, take more steps: at most this
# many times `max_steps`.
_MORE_STEPS = 16
# A direction may change the loss less than this, compared with the one that changes it
# most. Then errors in that direction are relative to this.
_LEAST = 1e-2

_Row = dict[str, Any]


class References:
    """Exact gradients by an adjoint that shares no code with the user's one.

    - `gradients`: by scale: the factor of the tolerances, or of a constant step size.
    - `name`: the adjoint; empty if none works.
    - `note`: why there are not more of them.
    """

    def __init__(self, loss: Loss, calls: Sequence[Call], throw: bool) -> None:
        self.gradients: dict[float, PyTree] = {}
        self.name = self.note = ""
        # Memory for more steps. Where the solution has a row for each, its shape must
        # stay as it is.
        more = 1 if any(call.stores_steps for call in calls) else _MORE_STEPS
        scales = (
            (1.0, 0.1, 0.01) if any(c.adaptive for c in calls) else (1.0, 0.5, 0.25)
        )
        for adjoint in _others(calls[0].adjoint):
            try:
                program = Program(
                    loss, lambda s, a=adjoint: scaled(a, s, throw, more), 1.0
                )
                for scale in scales:
                    self.gradients[scale] = program(scale)[1]
            # Any kind of failure only means that there is less to compare with.
            except Exception as error:
                self.note = first_line(error)
            if self.gradients:
                self.name = type(adjoint).__name__
                return

    @property
    def exact(self) -> PyTree | None:
        """The gradient of the solve as the user wrote it."""
        return self.gradients.get(1.0)


def _others(adjoint: diffrax.AbstractAdjoint) -> tuple[diffrax.AbstractAdjoint, ...]:
    aca, recursive = ACAAdjoint(), diffrax.RecursiveCheckpointAdjoint()
    checkpointed = diffrax.RecursiveCheckpointAdjoint | diffrax.DirectAdjoint
    return (aca, recursive) if isinstance(adjoint, checkpointed) else (recursive, aca)


def check_adjoint(
    loss: Loss, gradient: PyTree | None, references: References, tolerance: float
) -> Check:
    """Compares the user's gradient with an exact one."""
    if gradient is None:
        return Check("failed", "there is no gradient")
    if references.exact is None:
        return Check("skipped", f"no other adjoint works ({references.note})")
    error = relative_error(gradient, references.exact, loss.params)
    verdict = "passed" if error <= tolerance else "failed"
    return Check(verdict, f"against {references.name}", error)


def check_solve(
    loss: Loss, calls: Sequence[Call], references: References, tolerance: float
) -> Check:
    """Compares the gradient with those of more accurate solves."""
    if not any(call.scalable for call in calls):
        return Check("skipped", "these steps cannot be refined automatically")
    if len(references.gradients) < 2:
        words = f"no more accurate solve has a gradient ({references.note})"
        return Check("undecided", words)
    *scales, finest = references.gradients
    best = references.gradients[finest]
    errors = [
        relative_error(references.gradients[scale], best, loss.params)
        for scale in scales
    ]
    # The error of the finest one is not known. It falls as the others do, if there are
    # two of them.
    falls = errors[-1] / errors[0] if errors[0] and len(errors) > 1 else 1.0
    errors.append(errors[-1] * falls)
    rows = tuple(
        {"scale": scale, "error": error}
        for scale, error in zip(references.gradients, errors, strict=True)
    )
    error = rows[0]["error"]
    adaptive = any(call.adaptive for call in calls)
    what = "tolerances" if adaptive else "step size"
    words = f"against {what} times {finest:g}"
    if any(call.noisy for call in calls):
        # Paths converge slowly, and only statistics of them matter in most losses.
        return Check("information", words, error, details=rows)
    if error <= tolerance:
        return Check("passed", words, error, details=rows)
    return Check("failed", words, error, details=rows)


# Finite differences.


def differences(
    loss: Loss,
    calls: Sequence[Call],
    gradient: PyTree | None,
    dtype: Any,
    tolerance: float,
    num: int,
) -> tuple[list[_Row], str]:
    """Returns finite differences in `num` directions, relative to the gradient.

    `dtype` is that of the loss. Without differences, the second result says why.
    """
    if gradient is None:
        return [], "there is no gradient"
    dtypes = [dtype, *(x.dtype for x in jax.tree.leaves(loss.params))]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    adaptive = any(call.adaptive for call in calls)
    evaluate = make_differences(loss, eps, adaptive, tolerance)
    # A loss that cannot be evaluated at several points at once can still be checked
    # in other ways.
    vectors = directions(loss.params, num)
    try:
        found = [evaluate(v, gradient) for v in vectors]
    except Exception as error:
        return [], first_line(error)
    least = _LEAST * max(d.scale for d in found)
    return [_row(d, max(d.scale, least) or 1.0) for d in found], ""


def _row(d: Differences, scale: float) -> _Row:
    away = lambda x: abs(float(x) - d.expected) / scale
    row: _Row = {
        "leaves": d.leaves,
        "error": away(d.estimate.value),
        "uncertainty": d.estimate.uncertainty / scale,
        "has_converged": d.estimate.has_converged,
        "is_smooth": d.is_smooth,
        "step_sizes": d.step_sizes.tolist(),
        "frozen_errors": [away(x) for x in d.frozen],
        "adaptive_errors": [None] * len(d.frozen),
        # Between the two kinds of differences.
        "change": None,
        "change_uncertainty": None,
    }
    if d.adaptive is not None and d.adaptive_estimate is not None:
        row["adaptive_errors"] = [away(x) for x in d.adaptive]
        free, frozen = d.adaptive_estimate, d.estimate
        row["change"] = abs(free.value - frozen.value) / scale
        row["change_uncertainty"] = (free.uncertainty + frozen.uncertainty) / scale
    return row


def check_differences(rows: Sequence[_Row], note: str, tolerance: float) -> Check:
    """Compares the gradient with differences at constant step sizes of the solve."""
    if not rows:
        return Check("undecided", note)
    excess = lambda row: row["error"] - row["uncertainty"]
    known = [row for row in rows if row["has_converged"]]
    failed = [row for row in known if excess(row) > tolerance]
    passes = lambda row: max(row["error"], row["uncertainty"]) <= tolerance
    verdict = "passed" if all(map(passes, rows)) else "undecided"
    worst = max(rows, key=lambda row: row["error"] + row["uncertainty"])
    if failed:
        verdict, worst = "failed", max(failed, key=excess)
    words = f"in {len(rows)} directions" if len(rows) > 1 else "in one direction"
    return Check(verdict, words, worst["error"], worst["uncertainty"], tuple(rows))


def check_smoothness(rows: Sequence[_Row], solve: Check, tolerance: float) -> Check:
    """Looks for differences that no smooth function has.

    Where the vector field jumps, an adaptive solve finds the jump, and its differences
    contain how the jump moves with the parameters. The gradient does not. But
    differences of an inaccurate solve may differ from its gradient as well.
    """
    if not rows:
        return Check("skipped", "there are no differences")
    words = "differences at other step sizes of the parameters"
    if not all(row["is_smooth"] for row in rows):
        return Check("failed", words)
    known = [row for row in rows if row["change"] is not None]
    if not known or solve.verdict not in ("passed", "information"):
        return Check("passed", words)
    excess = lambda row: row["change"] - row["change_uncertainty"]
    worst = max(known, key=excess)
    verdict = "failed" if excess(worst) > tolerance else "passed"
    words = "differences of solves whose steps adapt, or do not"
    return Check(verdict, words, worst["change"], worst["change_uncertainty"])


# Reversible solvers.


def check_reconstruction(seen: Sequence[_Row], tolerance: float) -> Check:
    """Reports how well the states of the solve can be reconstructed."""
    errors = [
        row["reconstruction_error"] for row in seen if "reconstruction_error" in row
    ]
    if not errors:
        return Check("skipped", "steps of this solver cannot be undone")
    # NaN is an error as well, and `max` may skip it.
    error = max(math.inf if math.isnan(e) else e for e in errors)
    distances = [row["coupling_distance"] for row in seen if "coupling_distance" in row]
    words = "of the states, by undoing the steps"
    if distances:
        words += f"; coupling distance {max(distances):.1e}"
    verdict = "passed" if error <= min(tolerance, _MAX_RECONSTRUCTION) else "failed"
    details = {
        "reconstruction_error": error,
        "coupling_distance": max(distances, default=None),
    }
    return Check(verdict, words, error, details=(details,))


# The verdict.


def verdict_of(
    checks: dict[str, Check],
    gradient: PyTree | None,
    calls: Sequence[Call],
    failed: bool,
) -> str:
    """Returns the first of `VERDICTS` that applies. `failed`: whether a solve did."""
    is_failed = lambda name: checks[name].verdict == "failed"
    reverses = any(isinstance(call.adjoint, ReversibleAdjoint) for call in calls)
    if reverses and is_failed("reconstruction") and is_failed("adjoint"):
        return "reconstruction_lost"
    if failed or gradient is None:
        return "solve_failed"
    leaves = map(np.asarray, jax.tree.leaves(gradient))
    if not all(np.isfinite(x.astype(complex)).all() for x in leaves):
        return "not_finite"
    if is_failed("adjoint"):
        return "adjoint_differs"
    if is_failed("finite_differences"):
        return "not_smooth" if is_failed("smoothness") else "differences_disagree"
    if is_failed("solve"):
        return "solve_too_loose"
    if is_failed("smoothness"):
        return "not_smooth"
    decided = all(
        checks[n].verdict == "passed" for n in ("adjoint", "finite_differences")
    )
    return (
        "right" if decided and checks["solve"].verdict != "undecided" else "undecided"
    )
