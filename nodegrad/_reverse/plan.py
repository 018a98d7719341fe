"""Collects what a recording needs to know of a solve, with its parts as pure functions.

`Solve` describes a solve before it is traced. `make_plan` splits it into `Plan`, which
is static, and `Inputs`, the arrays that a derivative may be taken with respect to.
"""

from dataclasses import replace

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Real

from .._internal.closure_convert import as_struct, closure_convert, Pure
from .._internal.compat import is_unsafe_sde, prevbefore
from .._internal.tree import as_arrays
from .._steps.step import AbstractStep
from .._trajectory.recording import Inputs, Plan, PureSave
from .._trajectory.state_source import AbstractStateSource, closure_convert_parts
from .._trajectory.step_times import (
    AbstractGrid,
    AdaptiveGrid,
    PrescribedGrid,
    UniformGrid,
)
from .layer_statistics import make_statistics
from .saves import Save


class Solve(eqx.Module):
    """Describes the solve that a loop computes.

    - `step`: the step, with the terms and `args`.
    - `states`: how a derivative gets the states before the accepted steps.
    - `saves`: what is saved during the loop.
    - `grid`: the times that the times of steps depend on.
    - `t0`, `t1`: the interval; scalars, with `t0 <= t1`.
    - `recorded_steps`: the number of accepted steps whose times can be recorded.
    - `max_steps`: the largest number of steps.
    - `jumps`: whether a step may start elsewhere than the previous one ended.
    - `check`: whether to reconstruct the states after the solve, to report the error.
    - `throw`: whether a failure raises an error.
    - `dense`, `event`: whether there are dense output and an event.
    """

    step: AbstractStep
    states: AbstractStateSource
    saves: list[Save]
    grid: AbstractGrid
    t0: Real[Array, ""]
    t1: Real[Array, ""]
    recorded_steps: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    check: bool = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    event: bool = eqx.field(static=True)

    @property
    def log_size(self) -> int:
        """The number of rows of the log of accepted steps.

        A log without times has a byte for each step: it need not be cut.
        """
        return self.recorded_steps if self.stores_times else self.max_steps

    @property
    def stores_times(self) -> bool:
        """Whether the ends of steps are recorded, instead of computed again."""
        # An `UnsafeBrownianPath` has the same increments only for bitwise equal times.
        return not self.grid.is_computed or is_unsafe_sde(self.step.terms)


def make_plan(solve: Solve, state: PyTree) -> tuple[Plan, Inputs]:
    """Splits a solve into its static plan and the arrays it depends on.

    `state` is the loop state before the first step. Only the shapes of its arrays enter
    the plan; the arrays themselves are among the inputs.
    """
    t, y = as_struct(state.tprev), as_struct(state.y)
    replay_state = solve.states.replay_state(state.solver_state, state.made_jump)
    # Examples to trace with: no array of this solve may become a constant by accident.
    replay_state = as_struct(replay_state)
    constants, parts, results = closure_convert_parts(solve.states, t, y, replay_state)
    _, _, dense_info = results
    # One function for each way that a save computes rows, and its constants.
    saves = [
        _closure_convert_save(solve, save, t, y, dense_info) for save in solve.saves
    ]
    # `None` unless the vector field has layers whose curvature is wanted.
    statistics_consts, statistics = make_statistics(solve, state, constants, parts)
    # A plan is a parameter of a JAX primitive: arrays of `states` are inputs instead.
    plan = Plan(
        states=eqx.filter(solve.states, eqx.is_array, inverse=True),
        parts=parts,
        saves=[save for _, save in saves],
        statistics=statistics,
        dense=solve.dense,
        event=solve.event,
        throw=solve.throw,
    )
    # The first state and times are `None` here; `with_first` takes them from `state`.
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
    solve: Solve,
    save: Save,
    t: jax.ShapeDtypeStruct,
    y: PyTree[jax.ShapeDtypeStruct],
    dense_info: PyTree[jax.ShapeDtypeStruct],
) -> tuple[list[list[Array]], PureSave]:
    """Splits `save` into `[constants at the end, constants inside]` and a `PureSave`.

    The two functions of `PureSave` compute a row at the end of a step, and inside it.
    """
    args, interpolation_cls = solve.step.args, solve.step.solver.interpolation_cls

    def at_end(t: Real[Array, ""], y: PyTree) -> PyTree[Array]:
        return as_arrays(save.fn(t, y, args))

    # Dense information has the names of the arguments of the interpolation.
    def inside(
        t: Real[Array, ""],
        start: Real[Array, ""],
        end: Real[Array, ""],
        info: PyTree[Array],
    ) -> PyTree[Array]:
        interpolation = interpolation_cls(t0=start, t1=end, **info)
        return as_arrays(save.fn(t, interpolation.evaluate(t), args))

    # A function that does not exist has no constants.
    no_function: tuple[list, Pure | None] = [], None
    at_end_consts, pure_at_end = (
        closure_convert(at_end, t, y) if save.steps else no_function
    )
    inside_consts, pure_inside = (
        no_function if save.ts is None else closure_convert(inside, t, t, t, dense_info)
    )
    consts = [at_end_consts, inside_consts]
    return consts, PureSave(save.steps, pure_at_end, pure_inside)


def with_first(states: AbstractStateSource, others: Inputs, state: PyTree) -> Inputs:
    """Returns `others` with the first state and step times taken from a loop state.

    Tangents of both may be passed as well, with `None` for zeros.
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
    """Returns `inputs` with `None` for the first state and step times."""
    # The loop state has these already; they would be passed twice.
    return replace(inputs, y=None, replay_state=None, first_start=None, first_end=None)


def make_grid(
    controller: PyTree,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    dt0: Real[Array, ""] | None,
    passed_state: PyTree | None,
) -> AbstractGrid:
    """Returns the grid of a step size controller, which holds the anchors.

    `passed_state` is the state of the controller that the user passed, or `None`.
    """
    if isinstance(controller, diffrax.StepTo):
        # The last step ends at `t1`, which has the value of the last of these times. So
        # does a step that would end just before, unless it is the first one.
        ts = controller.ts.at[-1].set(t1)
        return PrescribedGrid(ts.at[2:].set(jnp.where(ts > nearly(t1), t1, ts)[2:]))
    if isinstance(controller, diffrax.ConstantStepSize):
        state = passed_state
        if state is None:
            # It reads the times alone. The other arguments only have the right types.
            fn = lambda *_: t0
            term = diffrax.ODETerm(fn)
            _, state = controller.init(term, t0, t1, t0, dt0, None, fn, None)
        _, num_steps, start, stop = state
        return UniformGrid(
            anchors=jnp.stack([start, stop, t1]),
            num_steps=num_steps,
            nearly_t1=nearly(t1),
            is_computed=passed_state is None,
        )
    # `t1` and the times of all clipping controllers around the innermost controller.
    anchors, ends = [t1[None]], [t1[None]]
    while isinstance(controller, diffrax.ClipStepSizeController):
        if controller.step_ts is not None:
            anchors.append(controller.step_ts.astype(t1.dtype))
            ends.append(anchors[-1])
        if controller.jump_ts is not None:
            anchors.append(controller.jump_ts.astype(t1.dtype))
            ends.append(prevbefore(anchors[-1]))
        controller = controller.controller
    limits = []
    if isinstance(controller, diffrax.PIDController):
        limits = [controller.dtmin, controller.dtmax]
        limits = [jnp.asarray(x, t1.dtype) for x in limits if x is not None]
    return AdaptiveGrid(jnp.concatenate(anchors), jnp.concatenate(ends), limits)


def nearly(t1: Real[Array, ""]) -> Real[Array, ""]:
    """Returns the floating point number 100 ulp before `t1`.

    A step that would end after it ends at `t1`, as in Diffrax: an interval of a few ulp
    would spoil dense output by rounding.
    """
    # Only compared with times. Reading the bits of a float has no derivative.
    t1 = jax.lax.stop_gradient(t1)
    # Diffrax calls `prevbefore` 100 times. The bits of positive floats, read as signed
    # integers, count the floats: 100 ulp are 100 integers. Those of negative floats
    # descend, so `in_order` mirrors them; it is its own inverse.
    integer = jnp.dtype(f"int{8 * t1.dtype.itemsize}")
    lowest = jnp.iinfo(integer).min
    in_order = lambda bits: jnp.where(bits < 0, lowest - bits, bits)
    bits = in_order(jax.lax.bitcast_convert_type(t1, integer)) - 100
    before = jax.lax.bitcast_convert_type(in_order(bits), t1.dtype)
    # Around zero these are denormals, which XLA may flush to zero: then at least 100 of
    # the smallest normal number.
    return jnp.minimum(before, t1 - 100 * jnp.finfo(t1.dtype).tiny)
