"""Adds ways in which a solve can end to those of Diffrax."""

from typing import Any

import diffrax
import jax


class RESULTS(diffrax.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """The items of `diffrax.RESULTS`, and three more.

    `diffrax.diffeqsolve` with an adjoint of nodegrad reports only `coupling_lost` of
    these.

    `Solution.result` is one of these items. The messages refer to
    `Solution.stats["time_reached"]`: the time up to which the solution was computed,
    that is the start of the step that failed.

    **Example:**

    ```python
    import jax.numpy as jnp
    import nodegrad

    field = lambda t, y, args: jnp.log(y)  # NaN for negative `y`
    y0 = jnp.array(0.5)
    sol = nodegrad.odesolve(field, nodegrad.RK4(), 0.0, 3.0, 0.1, y0, throw=False)
    print(sol.result == nodegrad.RESULTS.vector_field_not_finite)  # True
    ```
    """

    vector_field_not_finite = (
        "The vector field returned a NaN or an infinity (or made the state overflow), "
        "however small the step. The step started at `stats['time_reached']`, and "
        "`stats['num_accepted_steps']` is its number; `ys` is finite up to that time. "
        "Smaller tolerances do not help: look for a division by zero, a logarithm or "
        "root of a negative number, a solution that blows up in finite time, or NaNs "
        "in `y0`, in `args` or in a time. With `atol=0` an entry of the state that is "
        "zero has the relative error 0 / 0: pass a positive `atol`."
    )
    step_too_small = (
        "The step size fell below the spacing of floating point numbers. The solution "
        "is singular near `stats['time_reached']`, or its tolerances are tighter than "
        "the precision of its dtype, or the problem is stiff: try looser tolerances, "
        "float64, or an implicit solver such as `diffrax.Kvaerno5()`."
    )
    coupling_lost = (
        "The two copies of the solution that a reversible solver carries have come "
        "apart, by `stats['coupling_distance']`, or would have with longer steps. The "
        "problem decays faster than the solver allows (`nodegrad.is_stable`). Leave "
        "`resync_every` of `Reversible` at its default, pass `resync_every=10` or so "
        "to `ALF`, take smaller steps, or use a plain solver with "
        "`nodegrad.ACAAdjoint()`."
    )


# A solver's `step` must return an item of `diffrax.RESULTS`. This one stands for a lost
# coupling, until `with_coupling_lost` replaces it.
COUPLING_LOST: Any = diffrax.RESULTS.nonlinear_divergence

_Item = type(diffrax.RESULTS.successful)


class _Result(_Item):  # pyright: ignore[reportGeneralTypeIssues]
    """An item of `RESULTS` that can be compared with items of `diffrax.RESULTS`."""

    # Equinox compares items of one enumeration only. Users compare results of
    # `odesolve` with `diffrax.RESULTS.successful`, and those of `diffeqsolve`, which
    # mostly are items of `diffrax.RESULTS`, with `RESULTS.coupling_lost`.
    def __eq__(self, other: Any):
        return _Item.__eq__(self, promoted(other))

    def __ne__(self, other: Any):
        return _Item.__ne__(self, promoted(other))


def promoted(item: Any) -> Any:
    """Turns an item of `diffrax.RESULTS` into one of `RESULTS`; others stay."""
    if item is diffrax.RESULTS.successful:
        # The common case, for which `promote` would compile an indexing operation.
        return RESULTS.successful
    return RESULTS.promote(item) if isinstance(item, diffrax.RESULTS) else item


def coupling_stats(solver_state: Any) -> dict[str, Any]:
    """Returns what is known of the two copies, if the solver couples two copies."""
    # `distance` and `lost` are attributes of the states of `Reversible` and `ALF`.
    if not hasattr(solver_state, "distance"):
        return {}
    stats = {"coupling_distance": jax.lax.stop_gradient(solver_state.distance)}
    if hasattr(solver_state, "num_resyncs"):
        stats["num_resyncs"] = solver_state.num_resyncs
    return stats


def with_coupling_lost(
    result: Any, solver_state: Any, controller: diffrax.AbstractStepSizeController
) -> Any:
    """Replaces a failure in `result` by `coupling_lost` if that is its cause."""
    if not hasattr(solver_state, "lost"):
        return result
    result = promoted(result)
    failed = solver_state.lost & (result != RESULTS.successful)
    fixed_steps = isinstance(controller, diffrax.ConstantStepSize | diffrax.StepTo)
    if hasattr(solver_state, "limited") and not fixed_steps:
        # The steps became too many or too small because the coupling limits their size.
        stuck = result == RESULTS.max_steps_reached
        stuck = stuck | (result == RESULTS.step_too_small)
        stuck = stuck | (result == RESULTS.dt_min_reached)
        failed = failed | (solver_state.limited & stuck)
    return RESULTS.where(failed, RESULTS.coupling_lost, result)


def _comparable(result: Any) -> Any:
    """Turns `result` into an item that compares with those of `diffrax.RESULTS`."""
    return _Result(result._value, result._enumeration)  # pyright: ignore[reportCallIssue]


# All items of `RESULTS` are of one type: a loop cannot carry items of two types. In the
# body of the class Equinox allows no functions.
for _name, _item in RESULTS._name_to_item.items():
    RESULTS._name_to_item[_name] = _comparable(_item)
for _name in ("promote", "where"):
    _make = getattr(RESULTS, _name).__func__
    _made = lambda cls, *items, make=_make: _comparable(make(cls, *items))
    setattr(RESULTS, _name, classmethod(_made))
