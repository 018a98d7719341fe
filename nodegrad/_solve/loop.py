"""The solver loop of `odesolve`: each iteration attempts one step.

The loop makes the decisions of Diffrax's loop in the same order and arithmetic, for the
features that `odesolve` has. In addition it accepts finite states only. All times here
run forwards (see `Problem`); they are scalars, and `y` is the state of one sample.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.compat import unvmap_any
from .._internal.results import promoted, RESULTS as _RESULTS, with_coupling_lost
from .._internal.tree import all_finite, check_unchanged, has_nan, where
from .._reverse.saves import Save
from .._steps.step import AbstractStep
from .._trajectory.output import (
    allocate,
    allocate_dense,
    SaveState,
    write,
    write_dense,
    write_step,
)


# Type checkers cannot know Equinox's enumerations.
RESULTS: Any = _RESULTS


class State(eqx.Module):
    """What the loop carries. `recorded_loop.py` reads it, so the names are Diffrax's.

    - `y`: the state at `tprev`, after the last accepted step.
    - `tprev`, `tnext`: the time reached, and the end of the next attempt.
    - `start`: the start of the next attempt if that is another time, see `one_clock`.
    - `made_jump`: whether the vector field jumps at `tprev`.
    - `result`: an item of `RESULTS`; the loop ends when it is not `successful`.
    - `num_steps`, `num_accepted_steps`: of all attempts, and of those accepted.
    - `num_evaluations`: of the vector field; `None` if the solver does not know.
    - `last_finite`: whether the last attempt had a finite state and an error estimate
      without NaN.
    - `save_state`: the rows saved so far, for each `SubSaveAt`.
    - `dense_ts`, `dense_infos`: shapes `(max_steps + 1,)` and `(max_steps, ...)`; the
      ends of the steps, and what interpolates inside them. `None` without
      `SaveAt(dense=True)`.
    """

    y: PyTree[Array]
    tprev: Real[Array, ""]
    tnext: Real[Array, ""]
    start: Any
    made_jump: bool | Bool[Array, ""]
    solver_state: PyTree
    controller_state: PyTree
    result: Any
    # `Any` for what is a Python number before the loop, or `None` without a feature: a
    # type checker cannot know in which case a method runs.
    num_steps: Any
    num_accepted_steps: Any
    num_evaluations: Any
    last_finite: bool | Bool[Array, ""]
    save_state: list[SaveState]
    dense_ts: Any
    dense_infos: PyTree[Array]

    @property
    def attempt_start(self) -> Real[Array, ""]:
        """The start of the next attempt."""
        return self.tprev if self.start is None else self.start


class Problem(eqx.Module):
    """A differential equation whose time runs forwards, and how to solve it.

    - `direction`: 1 or -1. The user's times are multiplied by it, so that `t0 <= t1`.
    - `nearly_t1`: a step that would end later than this ends at `t1`.
    - `dt0`: the first step size; `None` if the controller chooses it.
    - `subs`, `saves`: what to save, and the part of it that is saved during the loop.
    - `jumps`: whether the controller may report jumps of the vector field.
    - `one_clock`: whether times depend on no state. A solve that fails then goes on in
      time, without steps. So the solves of a batch share their times.
    - `max_steps`: a bound on the number of attempts, or `None`.
    """

    direction: Int[Array, ""]
    solver: diffrax.AbstractSolver
    t0: Real[Array, ""]
    t1: Real[Array, ""]
    nearly_t1: Real[Array, ""]
    dt0: Real[Array, ""] | None
    controller: diffrax.AbstractStepSizeController
    step: AbstractStep
    subs: list[diffrax.SubSaveAt]
    saves: list[Save]
    dense: bool = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    one_clock: bool = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    @property
    def terms(self) -> PyTree[diffrax.AbstractTerm]:
        """The terms, which the step has."""
        return self.step.terms

    @property
    def args(self) -> PyTree:
        """The user's `args`, which the step has."""
        return self.step.args

    def initial_state(self, y0: PyTree[Array]) -> State:
        """Returns the state before the first step. `SaveAt(t0=True)` is saved in it."""
        tnext, controller_state = self.controller.init(
            self.terms,
            self.t0,
            self.t1,
            y0,
            self.dt0,
            self.args,
            self.solver.func,
            self.solver.error_order(self.terms),
        )
        tnext = jnp.minimum(tnext, self.t1)
        solver_state = self.step.start(self.t0, tnext, y0)
        evaluations = self.step.evaluations
        dense_ts, dense_infos = None, None
        if self.dense:
            # Only the shapes of the dense information are needed: nothing is computed.
            _, _, info, _, _ = eqx.filter_eval_shape(
                self.step.advance, self.t0, tnext, y0, solver_state, False
            )
            dense_ts, dense_infos = allocate_dense(info, self.t0, self.max_steps)
        return State(
            y=y0,
            tprev=self.t0,
            tnext=tnext,
            start=self.t0 if self.one_clock else None,
            made_jump=False,
            solver_state=solver_state,
            controller_state=controller_state,
            result=RESULTS.successful,
            num_steps=0,
            num_accepted_steps=0,
            num_evaluations=None if evaluations is None else evaluations[0],
            last_finite=True,
            save_state=[self._saved_t0(sub, y0) for sub in self.subs],
            dense_ts=dense_ts,
            dense_infos=dense_infos,
        )

    def _saved_t0(self, sub: diffrax.SubSaveAt, y0: PyTree[Array]) -> SaveState:
        state = allocate(sub, self.t0, y0, self.args, self.max_steps)
        if sub.t0:
            state = write(state, self.t0, sub.fn(self.t0, y0, self.args))
        return state

    def is_running(self, state: State) -> Bool[Array, ""]:
        """Returns whether the solve is before `t1`, and has not failed."""
        return (state.tprev < self.t1) & (state.result == RESULTS.successful)

    def goes_on(self, state: State) -> Bool[Array, ""]:
        """Returns the condition of the loop."""
        if state.start is None:
            return self.is_running(state)
        # The same for all solves of a batch. Otherwise `vmap` makes times of their own.
        return (state.start < self.t1) & unvmap_any(self.is_running(state))

    def attempt_step(self, state: State) -> State:
        """Attempts one step, and accepts or rejects it. The body of the loop."""
        running = state.start is None or self.is_running(state)
        # Make the numerical step. If there are no jumps, the literal `False` says so at
        # trace time, and the step has no code for them.
        y, y_error, dense_info, solver_state, step_result = self.step.advance(
            state.attempt_start,
            state.tnext,
            state.y,
            state.solver_state,
            state.made_jump if self.jumps else False,
        )
        check_unchanged(state.y, y)
        # An infinite error estimate alone is no sign of a NaN: it may be an overflow.
        no_nan = all_finite(y) & (y_error is None or ~has_nan(y_error))

        # Let the controller decide, and choose the next attempt.
        keep, tprev, tnext, made_jump, controller_state, control_result = self._control(
            state, y, y_error
        )
        # `ConstantStepSize` and `StepTo` keep every step, also one that is not finite.
        # Then the time reached does not change, so `y` and saved rows stay finite.
        diverged = keep & ~all_finite(y)
        accepted = keep & ~diverged & running
        next_start, tnext = self._clip_to_end(tprev, tnext, keep)
        tprev = jnp.where(keep & ~accepted, state.tprev, next_start)

        result = _result_of_attempt(
            accepted=accepted,
            diverged=diverged,
            no_nan=no_nan,
            too_small=(next_start < self.t1) & _is_too_small(next_start, tnext, keep),
            step_result=promoted(step_result),
            control_result=promoted(control_result),
        )

        # Save, and keep the previous values of what a rejected step would change. The
        # controller has done so for its own state.
        count = state.num_accepted_steps + jnp.where(accepted, 1, 0)
        save_state, dense_ts, dense_infos = self._write_saves(
            state, accepted, count, tprev, y, dense_info
        )
        return State(
            y=where(accepted, y, state.y),
            tprev=tprev,
            tnext=tnext,
            start=None if state.start is None else next_start,
            made_jump=jnp.where(accepted, made_jump, state.made_jump),
            solver_state=where(accepted, solver_state, state.solver_state),
            controller_state=controller_state,
            result=RESULTS.where(running, result, state.result),
            num_steps=state.num_steps + jnp.where(running, 1, 0),
            num_accepted_steps=count,
            num_evaluations=self._count_evaluations(state, running),
            last_finite=jnp.where(running, no_nan, state.last_finite),
            save_state=save_state,
            dense_ts=dense_ts,
            dense_infos=dense_infos,
        )

    def _write_saves(
        self,
        state: State,
        accepted: Bool[Array, ""],
        count: Int[Array, ""],
        tprev: Real[Array, ""],
        y: PyTree[Array],
        dense_info: dict[str, PyTree[Array]],
    ) -> tuple[list[SaveState], Any, PyTree[Array]]:
        """Writes the outputs of the step that was attempted, if it is `accepted`.

        Returns `(save_state, dense_ts, dense_infos)`. `state` is the state before the
        step; `count`, `tprev`, `y` and `dense_info` are those after it.
        """
        interpolation = self.solver.interpolation_cls(
            t0=state.attempt_start, t1=state.tnext, **dense_info
        )
        save_state = [
            self._save_step(save, old, accepted, count, interpolation, tprev, y)
            for save, old in zip(self.saves, state.save_state, strict=True)
        ]
        dense_ts, dense_infos = state.dense_ts, state.dense_infos
        if self.dense:
            dense_ts, dense_infos = write_dense(
                dense_ts, dense_infos, count - 1, tprev, dense_info, accepted
            )
        return save_state, dense_ts, dense_infos

    def _save_step(
        self,
        save: Save,
        old: SaveState,
        accepted: Bool[Array, ""],
        count: Int[Array, ""],
        interpolation: Any,
        t: Real[Array, ""],
        y: PyTree[Array],
    ) -> SaveState:
        """Writes the rows of one save. `interpolation` is of any class of a solver."""
        at_end = lambda: (t, save.fn(t, y, self.args))
        inside = lambda t: save.fn(t, interpolation.evaluate(t), self.args)
        return write_step(
            old, save.ts, save.steps, at_end, inside, accepted, count, interpolation.t1
        )

    def _count_evaluations(
        self, state: State, running: bool | Bool[Array, ""]
    ) -> Int[Array, ""] | None:
        """Returns the number of evaluations after one more attempt, if it is known."""
        if self.step.evaluations is None:
            return None
        first, each_attempt = self.step.evaluations
        # After a jump the first stage is evaluated again.
        again = jnp.where(state.made_jump, first, 0) if self.jumps else 0
        made = jnp.where(running, each_attempt + again, 0)
        return state.num_evaluations + made

    def _control(
        self, state: State, y: PyTree[Array], y_error: PyTree[Array] | None
    ) -> Any:
        """Returns the controller's decision, which has no derivative through `y`.

        That is `(keep, tprev, tnext, made_jump, controller_state, result)`, as
        `adapt_step_size` of Diffrax's controllers returns it.
        """
        if y_error is not None:
            # As in Diffrax: an infinite error is rejected with the largest decrease of
            # the step size, but a NaN would make the step size NaN.
            y_error = jax.tree.map(
                lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), y_error
            )
        y0, y1, y_error = jax.lax.stop_gradient((state.y, y, y_error))
        order: Any = self.solver.error_order(self.terms)
        keep, *rest = self.controller.adapt_step_size(
            state.attempt_start,
            state.tnext,
            y0,
            y1,
            self.args,
            y_error,
            order,
            state.controller_state,
        )
        return jnp.asarray(keep), *rest

    def _clip_to_end(
        self,
        tprev: Real[Array, ""],
        tnext: Real[Array, ""],
        keep: Bool[Array, ""],
    ) -> tuple[Real[Array, ""], Real[Array, ""]]:
        """Returns the next attempt: `tprev` and `tnext`, or what replaces them at `t1`.

        After a rejected attempt it ends in the middle between `tprev` and `t1`:
        otherwise an attempt that ended at `t1` could be repeated.
        """
        tprev = jnp.minimum(tprev, self.t1)
        clipped = jnp.where(keep, self.t1, tprev + 0.5 * (self.t1 - tprev))
        return tprev, jnp.where(tnext > self.nearly_t1, clipped, tnext)

    def result(self, state: State) -> Any:
        """Returns how the solve ended, given the state after the loop."""
        # A loop that is still running was stopped by `max_steps`. If its last attempt
        # met a NaN, the steps were used up by rejections, and the NaN is the cause.
        out_of_steps = RESULTS.where(
            state.last_finite,
            RESULTS.max_steps_reached,
            RESULTS.vector_field_not_finite,
        )
        result = RESULTS.where(self.is_running(state), out_of_steps, state.result)
        # No comparison with a time of NaN is true, so such a solve makes no step.
        arrived = (state.tprev >= self.t1) | (result != RESULTS.successful)
        result = RESULTS.where(arrived, result, RESULTS.vector_field_not_finite)
        return with_coupling_lost(result, state.solver_state, self.controller)


def loop_buffers(state: State) -> PyTree:
    """Returns the arrays of the state that are written in place, row by row."""
    saved = [(s.ts, s.ys) for s in state.save_state]
    return saved, state.dense_ts, state.dense_infos


def _is_too_small(
    tprev: Real[Array, ""], tnext: Real[Array, ""], keep: Bool[Array, ""]
) -> Bool[Array, ""]:
    """Returns whether rejections have reduced the step size to the spacing of floats.

    Accepted steps may be this small: stepping over a jump takes a step of one ulp.
    """
    # In steps of a few ulp, rounding dominates the error estimate, so the rejections
    # would go on until `max_steps`. A larger factor finds that earlier, but also
    # refuses more steps that might still succeed.
    spacing = jnp.finfo(tprev.dtype).eps * jnp.abs(tnext)
    return (tnext <= tprev) | (~keep & (tnext - tprev <= 16 * spacing))


def _result_of_attempt(
    *,
    accepted: Bool[Array, ""],
    diverged: Bool[Array, ""],
    no_nan: Bool[Array, ""],
    too_small: Bool[Array, ""],
    step_result: Any,
    control_result: Any,
) -> Any:
    """Returns the result of an attempt, an item of `RESULTS`.

    In order of precedence: a step that was kept although it is not finite (`diverged`);
    a failure inside of the step; a failure of the step size. If the attempt met a NaN,
    then that is the cause of a failure of the step size, and is reported for it.
    """
    small = RESULTS.where(too_small, RESULTS.step_too_small, control_result)
    small_or_nan = RESULTS.where(
        no_nan | (small == RESULTS.successful), small, RESULTS.vector_field_not_finite
    )
    # A failure inside of a rejected step does not count: the next, smaller attempt may
    # succeed.
    no_failure = ~accepted | (step_result == RESULTS.successful)
    out = RESULTS.where(no_failure, small_or_nan, step_result)
    return RESULTS.where(diverged, RESULTS.vector_field_not_finite, out)
