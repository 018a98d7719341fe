"""What to record of a solve, and its parts as pure functions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from .._internal.closure_convert import as_struct, closure_convert, Pure
from .._internal.compat import is_unsafe_sde
from .._internal.tree import as_arrays
from .._steps.step import AbstractStep
from .._trajectory.recording import Inputs, Plan, PureSave
from .._trajectory.state_source import AbstractStateSource, closure_convert_parts
from .._trajectory.step_times import AbstractGrid, AdaptiveGrid
from .layer_statistics import make_statistics
from .saves import Save


class Solve(eqx.Module):
    """What a loop solves: everything that a recording needs to know of it.

    - `step`: the step, with the terms and `args`.
    - `states`: where a derivative gets the states from.
    - `grid`: what the times of steps depend on.
    - `recorded_steps`: how many accepted steps there is room to write down.
    - `jumps`: whether a step may start elsewhere than the one before ended.
    - `check`: whether to reconstruct the states right after the solve, for the error.
    - `throw`: whether a failure raises.
    - `dense`, `event`: whether there are dense output and an event.
    """

    step: AbstractStep
    states: AbstractStateSource
    interpolation_cls: Callable = eqx.field(static=True)
    saves: list[Save]
    grid: AbstractGrid
    t0: Array
    t1: Array
    recorded_steps: int = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    check: bool = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    event: bool = eqx.field(static=True)

    @property
    def stores_times(self) -> bool:
        """Whether the ends of steps are written down rather than computed again."""
        # Some noise is the same only for the very same times.
        return isinstance(self.grid, AdaptiveGrid) or is_unsafe_sde(self.step.terms)


def make_plan(solve: Solve, state: PyTree) -> tuple[Plan, Inputs]:
    """What is static about a solve, and what it depends on."""
    t, y = as_struct(state.tprev), as_struct(state.y)
    replay_state = solve.states.replay_state(state.solver_state, state.made_jump)
    replay_state = as_struct(replay_state)
    constants, parts, results = closure_convert_parts(solve.states, t, y, replay_state)
    _, _, dense_info = results
    saves = [
        _closure_convert_save(solve, save, t, y, dense_info) for save in solve.saves
    ]
    statistics_consts, statistics = make_statistics(solve, state, constants, parts)
    plan = Plan(
        states=eqx.filter(solve.states, eqx.is_array, inverse=True),
        parts=parts,
        saves=[save for _, save in saves],
        statistics=statistics,
        dense=solve.dense,
        event=solve.event,
        throw=solve.throw,
    )
    others = Inputs(
        y=None,
        replay_state=None,
        first_start=None,
        first_end=None,
        constants=constants,
        save_constants=[consts for consts, _ in saves],
        grid=as_arrays(solve.grid),
        ts=[save.ts for save in solve.saves],
        statistics=statistics_consts,
    )
    return plan, with_first(plan.states, others, state)


def _closure_convert_save(
    solve: Solve, save: Save, t: Any, y: PyTree, dense_info: PyTree
) -> tuple[list[Any], PureSave]:
    """How `save` computes its rows at the end of a step, and inside of one."""
    args = solve.step.args

    def at_end(t, y):
        return as_arrays(save.fn(t, y, args))

    def inside(t, start, end, info):
        interpolation = solve.interpolation_cls(t0=start, t1=end, **info)
        return as_arrays(save.fn(t, interpolation.evaluate(t), args))

    no_function: tuple[list[Array], Pure | None] = [], None
    at_end_consts, pure_at_end = (
        closure_convert(at_end, t, y) if save.steps else no_function
    )
    inside_consts, pure_inside = (
        no_function if save.ts is None else closure_convert(inside, t, t, t, dense_info)
    )
    consts = [at_end_consts, inside_consts]
    return consts, PureSave(save.steps, pure_at_end, pure_inside)


def with_first(states: AbstractStateSource, others: Inputs, state: PyTree) -> Inputs:
    """`others`, with the first state and step times from a loop state.

    Also of tangents, with `None` for those that are zero.
    """
    return eqx.filter(
        replace(
            others,
            y=state.y,
            replay_state=states.replay_state(state.solver_state, state.made_jump),
            first_start=state.tprev,
            first_end=state.tnext,
        ),
        eqx.is_array,
    )


def without_first(inputs: Inputs) -> Inputs:
    """`inputs` without the first state and step times."""
    return replace(inputs, y=None, replay_state=None, first_start=None, first_end=None)
