"""Adjoints for `diffrax.diffeqsolve` that record the accepted steps of the solve.

The forward pass is Diffrax's solver loop, so every `SaveAt`, event, progress meter,
term and solver of Diffrax works. That loop takes the `while` loop to run as an
argument; the adjoints pass `recorded_loop` (`recorded_loop.py`), which records the
accepted steps and defines the derivative.
"""

import abc
import functools as ft
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._internal.closure_convert import as_struct, closure_convert
from .._internal.compat import nondifferentiable_backward, solver_loop, while_loop
from .._internal.devices import axes_of_devices, on_each_device
from .._internal.results import coupling_stats, with_coupling_lost
from .._internal.tree import check_counts, check_unchanged, with_fields
from .._layers.find_products import has_products
from .._reverse.plan import make_grid, Solve
from .._reverse.recorded_loop import recorded_loop
from .._reverse.saves import Save
from .._steps.solvers import DelegatingSolver
from .._steps.step import AbstractStep, make_step, RungeKuttaStep
from .._trajectory.state_source import AbstractStateSource
from .._trajectory.step_times import (
    AbstractGrid,
    may_jump,
    without_derivatives,
)


_THROWS = (
    "Inside of `jax.shard_map(..., check_vma=True)`, pass `throw=False` to "
    "`diffrax.diffeqsolve`, and look at the `result` of the solution: the check for "
    "`throw=True` (`equinox.error_if`) has branches of different types there. Or use "
    "`nodegrad.odesolve`, which can throw; or pass `check_vma=False`."
)


class AbstractRecordedAdjoint(diffrax.AbstractAdjoint):
    """An adjoint that records the accepted steps and differentiates them.

    A subclass chooses how states are recovered in the backward pass, and how many
    steps can be recorded. Everything else is shared.
    """

    #: Whether to reconstruct the states right after the solve, to measure the error.
    check: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def make_state_source(
        self,
        step: AbstractStep,
        controller: diffrax.AbstractStepSizeController,
        grid: AbstractGrid,
        max_steps: int,
        dense: bool,
        first_jump: bool,
    ) -> AbstractStateSource:
        """Returns how states are recovered in the backward pass, and which are stored.

        **Arguments:**

        - `step`, `controller`, `max_steps`: those of the solve.
        - `grid`: how the times of the steps depend on the user's times.
        - `dense`: whether the solution is read inside of steps (by interpolation).
        - `first_jump`: whether the first step may start just after a jump.
        """

    @abc.abstractmethod
    def recorded_steps(self, max_steps: int) -> int:
        """Returns the number of accepted steps whose times can be stored."""

    def loop(self, *, throw: bool, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Runs Diffrax's loop and records it. Called by `diffrax.diffeqsolve`.

        **Raises:** `ValueError` for `throw=True` inside of `jax.shard_map`, where it
        would fail in Equinox with a message about the types of branches.
        """
        if throw and axes_of_devices(kwargs):
            raise ValueError(_THROWS)
        return on_each_device(self._loop)(throw=throw, **kwargs)

    def _loop(
        self,
        *,
        solver: diffrax.AbstractSolver,
        stepsize_controller: diffrax.AbstractStepSizeController,
        saveat: diffrax.SaveAt,
        terms: PyTree[diffrax.AbstractTerm],
        args: PyTree,
        init_state: Any,
        max_steps: int | None,
        throw: bool,
        passed_solver_state: bool,
        passed_controller_state: bool,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Runs Diffrax's loop and records it.

        `init_state` and the state returned have a private class of Diffrax. Diffrax's
        loop has more in `kwargs`: `t0`, `t1`, `dt0`, `event`, `progress_meter`.
        """
        check_counts(None, max_steps=max_steps)
        passed_state = init_state.controller_state if passed_controller_state else None
        first = init_state.tprev, init_state.tnext, init_state.y
        # It is the literal `False` unless the user passed another value.
        first_jump = init_state.made_jump is not False
        jumps = first_jump or may_jump(stepsize_controller)
        step = make_step(solver, terms, args, *first, jumps)
        lax_loop = ft.partial(while_loop, kind="lax")
        run = ft.partial(
            solver_loop,
            solver=_StepSolver(solver, step),
            stepsize_controller=without_derivatives(stepsize_controller),
            saveat=saveat,
            terms=terms,
            args=args,
            init_state=_started(step, init_state, passed_solver_state),
            max_steps=max_steps,
            # `recorded_loop` has a rule for the rows of `SaveAt(ts=...)` written here.
            inner_while_loop=lax_loop,
            **kwargs,
        )
        if max_steps is None:
            # Without a bound there is no memory to record into.
            final_state, stats = run(outer_while_loop=lax_loop)
            return without_gradient(final_state), stats
        solve = make_solve(
            self,
            step,
            stepsize_controller,
            kwargs["t0"],
            kwargs["t1"],
            kwargs["dt0"],
            max_steps,
            saves_of(subs_of(saveat)),
            dense=saveat.dense,
            event=kwargs["event"] is not None,
            throw=throw,
            first_jump=first_jump,
            passed_state=passed_state,
        )
        final_state, stats = _run_recorded(run, solve)
        final_state = _with_diffrax_solver_state(step, saveat, final_state)
        stats = stats | _counted(solve, final_state)
        stats = stats | coupling_stats(final_state.solver_state)
        return _with_result(solve, stepsize_controller, final_state), stats


def make_solve(
    adjoint: AbstractRecordedAdjoint,
    step: AbstractStep,
    controller: diffrax.AbstractStepSizeController,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    dt0: Real[Array, ""] | None,
    max_steps: int,
    saves: list[Save],
    *,
    dense: bool,
    event: bool,
    throw: bool,
    first_jump: bool,
    passed_state: PyTree | None = None,
) -> Solve:
    """Returns what to record of a solve, by `diffeqsolve` or by `odesolve`.

    `dt0` is `None` if the controller chooses the first step size. `passed_state` is the
    state of the controller that the user passed.
    """
    grid = make_grid(controller, t0, t1, dt0, passed_state)
    # These outputs interpolate inside of steps, and need the stages of each step.
    between = dense or event or any(save.ts is not None for save in saves)
    states = adjoint.make_state_source(
        step, controller, grid, max_steps, between, first_jump
    )
    return Solve(
        recorded_steps=adjoint.recorded_steps(max_steps),
        max_steps=max_steps,
        step=step,
        states=states,
        saves=saves,
        grid=grid,
        t0=t0,
        t1=t1,
        jumps=may_jump(controller),
        check=adjoint.check,
        throw=throw,
        dense=dense,
        event=event,
    )


def _run_recorded(
    run: Callable[..., tuple[Any, dict[str, Any]]], solve: Solve
) -> tuple[Any, dict[str, Any]]:
    """Runs Diffrax's loop with `recorded_loop` for its `while` loop.

    `run(outer_while_loop=...)` returns the final state and the statistics. With
    `solve.check` the reconstruction error is added to the statistics.
    """
    # `recorded_loop` has two results, but Diffrax's loop expects only a state from its
    # `while` loop, so the error leaves the loop in this list. Both results belong to
    # the same trace: no tracer leaks.
    errors: list[Array | None] = []

    def recording_while_loop(*loop_args: Any, **loop_kwargs: Any) -> Any:
        # Diffrax calls it once, with the arguments of `equinox.internal.while_loop`.
        final_state, error = recorded_loop(solve, *loop_args, **loop_kwargs)
        errors.append(error)
        return final_state

    final_state, stats = run(outer_while_loop=recording_while_loop)
    if solve.check:
        stats = {**stats, "reconstruction_error": errors.pop()}
    return final_state, stats


def _with_result(
    solve: Solve, controller: diffrax.AbstractStepSizeController, final_state: Any
) -> Any:
    """Returns the final state with the reason why the solve ended."""
    # Type checkers cannot know Equinox's enumerations.
    results: Any = diffrax.RESULTS
    # No comparison with NaN is true: Diffrax's loop makes no step, successfully.
    is_known = solve.t0 <= solve.t1
    result = results.where(is_known, final_state.result, results.nonfinite)
    result = with_coupling_lost(result, final_state.solver_state, controller)
    return with_fields(final_state, result=result)


class _StepSolver(DelegatingSolver):
    """`solver` for Diffrax's loop, with its steps made by `stepper`.

    The terms and `args` are those of `stepper`: the loop passes the same ones again.
    """

    solver: diffrax.AbstractSolver
    stepper: AbstractStep

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        args: PyTree,
    ) -> PyTree:
        del terms, args
        return self.stepper.start(t0, t1, y0)

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        args: PyTree,
        solver_state: PyTree,
        made_jump: bool | Bool[Array, ""],
    ) -> Any:
        del terms, args
        out = self.stepper.advance(t0, t1, y0, solver_state, made_jump)
        check_unchanged(y0, out[0])
        return out


def _started(step: AbstractStep, init_state: Any, passed_solver_state: bool) -> Any:
    """Returns Diffrax's initial state with the solver state that `step` expects."""
    if init_state.made_jump is True:
        # Diffrax treats a Python bool as static: as a jump before every step. An array
        # applies to the first step only.
        init_state = replace(init_state, made_jump=jnp.array(True))
    first = init_state.tprev, init_state.tnext, init_state.y
    if not isinstance(step, RungeKuttaStep):
        if passed_solver_state:
            return init_state
        # Diffrax has called `solver.init`. Its result is replaced only where layers
        # report statistics: `step.start` reports none, otherwise they would count the
        # evaluation before the first step as a use.
        _, start = closure_convert(step.start, *as_struct(first))
        if not has_products(start.jaxpr):
            return init_state
    # Diffrax's Runge-Kutta methods evaluate their first stage inside the loop, and have
    # a solver state to do so once. A `RungeKuttaStep` evaluates it here, before the
    # loop, so its solver state differs also where the user passed one.
    solver_state = step.start(*first)
    return replace(init_state, solver_state=solver_state)


def _with_diffrax_solver_state(
    step: AbstractStep, saveat: diffrax.SaveAt, final_state: Any
) -> Any:
    """Returns the final state with a solver state as Diffrax's own solver has it.

    That is a pair for first-same-as-last methods: whether no step was made yet, and the
    first stage of the next step. Other Runge-Kutta methods have `None`.
    """
    if not isinstance(step, RungeKuttaStep):
        return final_state
    solver_state = None
    if saveat.solver_state and step.tableau.fsal:
        # Evaluated again: `recorded_loop` returns the solver state as a constant, but
        # this value has a gradient with respect to `y` and `args`.
        f0 = step.start(final_state.tprev, final_state.tnext, final_state.y)
        solver_state = jnp.array(False), f0
    return replace(final_state, solver_state=solver_state)


def _counted(solve: Solve, final_state: Any) -> dict[str, Any]:
    """Returns the number of vector field evaluations as a statistic, if it is known.

    It is not known if there may be jumps: the first stage is evaluated again after each
    of them, and Diffrax's loop does not count them.
    """
    if solve.step.evaluations is None or solve.jumps:
        return {}
    first, each_attempt = solve.step.evaluations
    return {
        "num_vector_field_evaluations": first + each_attempt * final_state.num_steps
    }


def subs_of(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    """Returns the `SubSaveAt`s of `saveat`, in the order of its pytree."""
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
    return jax.tree.leaves(saveat.subs, is_leaf=is_sub)


def saves_of(subs: list[diffrax.SubSaveAt]) -> list[Save]:
    """Returns the part of each of `subs` that is saved during the loop."""
    return [Save(ts=sub.ts, steps=sub.steps, fn=sub.fn) for sub in subs]


def without_gradient(tree: Any) -> Any:
    """Returns `tree`; reverse mode through it raises, because `max_steps` is `None`."""
    msg = (
        "`max_steps=None` cannot be combined with a gradient through an adjoint of "
        "nodegrad: the memory for the accepted steps must be allocated "
        "before the solve. Pass a bound, `max_steps=...`; it costs 19 bytes a step at "
        "most, and the states that the adjoint keeps. Forward mode (`jax.jvp`) needs "
        "no bound."
    )
    return nondifferentiable_backward(tree, msg=msg)
