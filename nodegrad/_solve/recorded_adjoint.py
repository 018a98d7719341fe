"""The Diffrax door: adjoints of `diffrax.diffeqsolve` that record the solve.

The forward pass is Diffrax's own loop, with every `SaveAt`, event, progress meter, term
and solver it knows; it takes the `while` loop it runs as an argument, and is handed
ours (`_recorded_loop.recorded_loop`).
"""

import abc
import functools as ft
from dataclasses import replace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._internal.compat import nondifferentiable_backward, solver_loop, while_loop
from .._internal.results import coupling_stats, with_coupling_lost
from .._reverse.plan import Solve
from .._reverse.recorded_loop import recorded_loop
from .._reverse.saves import Save
from .._steps.step import AbstractStep, DelegatingSolver, make_step, RungeKuttaStep
from .._trajectory.state_source import AbstractStateSource
from .._trajectory.step_times import (
    AbstractGrid,
    make_grid,
    may_jump,
    without_derivatives,
)


class AbstractRecordedAdjoint(diffrax.AbstractAdjoint):
    """An adjoint that records the accepted steps and differentiates these."""

    #: Whether to reconstruct the states right after the solve, for the error alone.
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
        """Where a derivative gets the states before the accepted steps from.

        `dense` says whether anything reads between the ends of a step, `first_jump`
        whether the first step may start just after a jump.
        """

    @abc.abstractmethod
    def recorded_steps(self, max_steps: int) -> int:
        """How many accepted steps there is room to write down."""

    def loop(
        self, *, solver, stepsize_controller, saveat, terms, args, init_state,
        max_steps, throw, passed_solver_state, passed_controller_state, **kwargs,
    ):  # fmt: skip
        """Diffrax's loop, recorded. Called by `diffrax.diffeqsolve`."""
        del passed_controller_state
        step = make_step(
            solver, terms, args, init_state.tprev, init_state.tnext, init_state.y
        )
        run = ft.partial(
            solver_loop,
            solver=_StepSolver(solver, step),
            stepsize_controller=without_derivatives(stepsize_controller),
            saveat=saveat,
            terms=terms,
            args=args,
            init_state=_started(step, init_state, passed_solver_state),
            max_steps=max_steps,
            inner_while_loop=ft.partial(while_loop, kind="lax"),
            **kwargs,
        )
        if max_steps is None:
            loop = ft.partial(while_loop, kind="lax")
            final_state, stats = run(outer_while_loop=loop)
            return without_gradient(final_state), stats
        saves = saves_of(subs_of(saveat))
        is_event = kwargs["event"] is not None
        solve = make_solve(
            self,
            step,
            stepsize_controller,
            kwargs["t0"],
            kwargs["t1"],
            kwargs["dt0"],
            max_steps,
            saves,
            dense=saveat.dense,
            event=is_event,
            throw=throw,
            # `made_jump` is the literal `False` unless the user passed it.
            first_jump=init_state.made_jump is not False,
        )
        errors = []

        def outer_while_loop(*args, **kwargs):
            # Diffrax's loop hands on the state alone.
            final_state, error = recorded_loop(solve, *args, **kwargs)
            errors.append(error)
            return final_state

        final_state, stats = run(outer_while_loop=outer_while_loop)
        if solve.check:
            stats = {**stats, "reconstruction_error": errors.pop()}
        if isinstance(step, RungeKuttaStep):
            final_state = _with_diffrax_solver_state(step, saveat, final_state)
        solver_state = final_state.solver_state
        result = with_coupling_lost(final_state.result, solver_state)
        more = _counted(solve, final_state) | coupling_stats(solver_state)
        return replace(final_state, result=result), {**stats, **more}


def make_solve(
    adjoint: AbstractRecordedAdjoint,
    step: AbstractStep,
    controller: diffrax.AbstractStepSizeController,
    t0: Array,
    t1: Array,
    dt0: Array | None,
    max_steps: int,
    saves: list[Save],
    *,
    dense: bool,
    event: bool,
    throw: bool,
    first_jump: bool,
) -> Solve:
    """What either door records."""
    grid = make_grid(controller, t0, t1, dt0)
    between = dense or event or any(save.ts is not None for save in saves)
    states = adjoint.make_state_source(
        step, controller, grid, max_steps, between, first_jump
    )
    return Solve(
        recorded_steps=adjoint.recorded_steps(max_steps),
        step=step,
        states=states,
        interpolation_cls=step.solver.interpolation_cls,
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


class _StepSolver(DelegatingSolver):
    """`solver`, stepping through `step`."""

    solver: diffrax.AbstractSolver
    stepper: AbstractStep

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    def init(self, terms, t0, t1, y0, args):
        del terms, args
        return self.stepper.start(t0, t1, y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del terms, args
        return self.stepper.advance(t0, t1, y0, solver_state, made_jump)


def _started(step: AbstractStep, init_state: Any, passed_solver_state: bool) -> Any:
    """Diffrax's initial state with the solver state that `step` wants.

    Diffrax evaluates the first stage inside its loop; we do it once, before. And a jump
    before the first step it would take for one before every step.
    """
    if init_state.made_jump is True:
        init_state = replace(init_state, made_jump=jnp.array(True))
    if passed_solver_state and not isinstance(step, RungeKuttaStep):
        return init_state
    solver_state = step.start(init_state.tprev, init_state.tnext, init_state.y)
    return replace(init_state, solver_state=solver_state)


def _with_diffrax_solver_state(step: RungeKuttaStep, saveat, final_state: Any) -> Any:
    """The final state with the solver state that Diffrax's Runge-Kutta methods have."""
    solver_state = None
    if saveat.solver_state and step.tableau.fsal:
        # Evaluated anew, because its gradient must reach `y` and `args`.
        f0 = step.start(final_state.tprev, final_state.tnext, final_state.y)
        solver_state = jnp.array(False), f0
    return replace(final_state, solver_state=solver_state)


def _counted(solve: Solve, final_state: Any) -> dict:
    """The number of vector field evaluations, if it is known."""
    if solve.step.evaluations is None or solve.jumps:
        return {}
    first, each_attempt = solve.step.evaluations
    return {
        "num_vector_field_evaluations": first + each_attempt * final_state.num_steps
    }


def subs_of(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    """The `SubSaveAt`s of `saveat`, in order."""
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
    return jax.tree.leaves(saveat.subs, is_leaf=is_sub)


def saves_of(subs: list[diffrax.SubSaveAt]) -> list[Save]:
    """What is to be saved during the loop."""
    return [Save(ts=sub.ts, steps=sub.steps, fn=sub.fn) for sub in subs]


def without_gradient(tree: Any) -> Any:
    """Refuses reverse mode, for which the number of steps has to be bounded."""
    msg = (
        "`max_steps=None` cannot be combined with a gradient through an adjoint of "
        "nodegrad: the memory for the accepted steps must be allocated "
        "before the solve. Pass a bound, `max_steps=...`; it costs 9 bytes a step at "
        "most, and the states that the adjoint keeps. Forward mode (`jax.jvp`) needs "
        "no bound."
    )
    return nondifferentiable_backward(tree, msg=msg)
