"""How a solve can end, beyond what Diffrax distinguishes."""

from typing import Any

import diffrax
import jax


class RESULTS(diffrax.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """`diffrax.RESULTS`, and the endings that `nodegrad.odesolve` tells apart.

    The messages refer to `Solution.stats["time_reached"]`: the time up to which the
    solution was computed, and so the start of the step that failed.
    """

    vector_field_not_finite = (
        "The vector field returned a NaN or an infinity (or made the state overflow), "
        "however small the step. `stats['time_reached']` is the start of the step in "
        "which that was met and `stats['num_accepted_steps']` its number; `ys` is "
        "finite up to there. This is no matter of tolerances: look for a division by "
        "zero, a logarithm or root of a negative number, a solution that blows up in "
        "finite time, or NaNs in `y0` or `args`."
    )
    step_too_small = (
        "The step size fell below the spacing of floating point numbers. The solution "
        "is singular near `stats['time_reached']`, or its tolerances are tighter than "
        "the precision of its dtype, or the problem is stiff: try looser tolerances, "
        "float64, or an implicit solver such as `diffrax.Kvaerno5()`."
    )
    coupling_lost = (
        "The two copies of the solution that a reversible solver carries have come "
        "apart (`stats['coupling_distance']` is how far), so that neither is a "
        "solution any more. The problem decays faster than the solver allows "
        "(`nodegrad.is_stable`). Pass `resync_every=10` or so to the solver, take "
        "smaller steps, a smaller `coupling_parameter` or (of `ALF`) `damping`, or use "
        "a plain solver with `nodegrad.ACAAdjoint()`."
    )


# What a solver's own `step` can say of that, in the words of Diffrax.
COUPLING_LOST: Any = diffrax.RESULTS.nonlinear_divergence

_Item = type(diffrax.RESULTS.successful)


class _Result(_Item):  # pyright: ignore[reportGeneralTypeIssues]
    """An item of `RESULTS` that compares with those of `diffrax.RESULTS` as well."""

    def __eq__(self, other: Any):
        return _Item.__eq__(self, promoted(other))

    def __ne__(self, other: Any):
        return _Item.__ne__(self, promoted(other))


def promoted(item: Any) -> Any:
    """`item` of `diffrax.RESULTS` as one of `RESULTS`; items of ours as they are."""
    if item is diffrax.RESULTS.successful:
        # The common case, for which `promote` would compile an indexing operation.
        return RESULTS.successful
    return RESULTS.promote(item) if isinstance(item, diffrax.RESULTS) else item


def coupling_stats(solver_state: Any) -> dict[str, Any]:
    """What a solver that couples two copies has to say of them."""
    if not hasattr(solver_state, "distance"):
        return {}
    return {"coupling_distance": jax.lax.stop_gradient(solver_state.distance)}


def with_coupling_lost(result: Any, solver_state: Any) -> Any:
    """`result` of a solve, with its true name if the coupling was lost."""
    if not hasattr(solver_state, "lost"):
        return result
    result = promoted(result)
    failed = solver_state.lost & (result != RESULTS.successful)
    return comparable(RESULTS.where(failed, RESULTS.coupling_lost, result))


def comparable(result: Any) -> Any:
    """`result` as an item that compares with those of `diffrax.RESULTS` as well."""
    return _Result(result._value, result._enumeration)  # pyright: ignore[reportCallIssue]
