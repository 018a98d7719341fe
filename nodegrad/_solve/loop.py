"""The native solver loop: one attempted step after another, lean.

It takes the decisions of Diffrax's loop in the same order and arithmetic, for the
features that `odesolve` offers, and checks besides that what it accepts is finite.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.results import (
    comparable,
    promoted,
    RESULTS as _RESULTS,
    with_coupling_lost,
)
from .._internal.tree import all_finite, where
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
    """What the loop carries; the names are Diffrax's, see `recorded_loop.py`.

    `last_finite` tells whether the last attempt was free of NaNs and infinities.
    """

    y: PyTree
    tprev: Array
    tnext: Array
    made_jump: Any
    solver_state: PyTree
    controller_state: PyTree
    result: Any
    num_steps: Any
    num_accepted_steps: Any
    num_evaluations: Any
    last_finite: Any
    save_state: list[SaveState]
    dense_ts: Any
    dense_infos: PyTree


class Problem(eqx.Module):
    """A differential equation whose time runs forwards, and how to solve it.

    `direction` is 1 or -1: the time of the problem is that of the user times this.
    """

    direction: Array
    solver: diffrax.AbstractSolver
    t0: Array
    t1: Array
    nearly_t1: Array
    dt0: Array | None
    controller: diffrax.AbstractStepSizeController
    step: AbstractStep
    subs: list[diffrax.SubSaveAt]
    saves: list[Save]
    dense: bool = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    @property
    def terms(self) -> PyTree:
        """Those of the step."""
        return self.step.terms

    @property
    def args(self) -> PyTree:
        """Those of the step."""
        return self.step.args

    def initial_state(self, y0: PyTree) -> State:
        """The state before the first step, what is saved at `t0` included."""
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
            _, _, info, _, _ = eqx.filter_eval_shape(
                self.step.advance, self.t0, tnext, y0, solver_state, False
            )
            dense_ts, dense_infos = allocate_dense(info, self.t0, self.max_steps)
        return State(
            y=y0,
            tprev=self.t0,
            tnext=tnext,
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

    def _saved_t0(self, sub: diffrax.SubSaveAt, y0: PyTree) -> SaveState:
        state = allocate(sub, self.t0, y0, self.args, self.max_steps)
        if sub.t0:
            state = write(state, self.t0, sub.fn(self.t0, y0, self.args))
        return state

    def is_running(self, state: State) -> Array:
        """The condition of the loop."""
        return (state.tprev < self.t1) & (state.result == RESULTS.successful)

    def attempt_step(self, state: State) -> State:
        """The body of the loop: attempts one step, and keeps it or not."""
        y, y_error, dense_info, solver_state, step_result = self.step.advance(
            state.tprev,
            state.tnext,
            state.y,
            state.solver_state,
            state.made_jump if self.jumps else False,
        )
        no_nan = all_finite(y) & (y_error is None or ~_has_nan(y_error))
        keep, tprev, tnext, made_jump, controller_state, control_result = self._control(
            state, y, y_error
        )
        accepted = keep & all_finite(y)
        # What is kept must be finite: the time does not advance over anything else.
        tprev = jnp.where(keep & ~accepted, state.tprev, jnp.minimum(tprev, self.t1))
        tnext = self._clip_to_end(tprev, tnext, accepted)
        result = _result_of_attempt(
            diverged=keep & ~accepted,
            no_nan=no_nan,
            too_small=(tprev < self.t1) & _is_too_small(tprev, tnext, keep),
            step_result=RESULTS.where(
                accepted, promoted(step_result), RESULTS.successful
            ),
            control_result=promoted(control_result),
        )
        count = state.num_accepted_steps + jnp.where(accepted, 1, 0)
        interpolation = self.solver.interpolation_cls(
            t0=state.tprev, t1=state.tnext, **dense_info
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
        return State(
            y=where(accepted, y, state.y),
            tprev=tprev,
            tnext=tnext,
            made_jump=jnp.where(accepted, made_jump, state.made_jump),
            solver_state=where(accepted, solver_state, state.solver_state),
            controller_state=controller_state,
            result=result,
            num_steps=state.num_steps + 1,
            num_accepted_steps=count,
            num_evaluations=self._count_evaluations(state),
            last_finite=no_nan,
            save_state=save_state,
            dense_ts=dense_ts,
            dense_infos=dense_infos,
        )

    def _save_step(
        self, save: Save, old: SaveState, accepted, count, interpolation, t, y
    ) -> SaveState:
        at_end = lambda: (t, save.fn(t, y, self.args))
        inside = lambda t: save.fn(t, interpolation.evaluate(t), self.args)
        return write_step(
            old, save.ts, save.steps, at_end, inside, accepted, count, interpolation.t1
        )

    def _count_evaluations(self, state: State) -> Any:
        if self.step.evaluations is None:
            return None
        first, each_attempt = self.step.evaluations
        # After a jump the first stage is evaluated anew.
        again = jnp.where(state.made_jump, first, 0) if self.jumps else 0
        return state.num_evaluations + each_attempt + again

    def _control(self, state: State, y: PyTree, y_error: PyTree) -> Any:
        """The controller's decision, which is not differentiated through `y`."""
        if y_error is not None:
            y_error = jax.tree.map(
                lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), y_error
            )
        y0, y1, y_error = jax.lax.stop_gradient((state.y, y, y_error))
        order: Any = self.solver.error_order(self.terms)
        keep, *rest = self.controller.adapt_step_size(
            state.tprev,
            state.tnext,
            y0,
            y1,
            self.args,
            y_error,
            order,
            state.controller_state,
        )
        return jnp.asarray(keep), *rest

    def _clip_to_end(self, tprev, tnext, accepted):
        clipped = jnp.where(accepted, self.t1, tprev + 0.5 * (self.t1 - tprev))
        return jnp.where(tnext > self.nearly_t1, clipped, tnext)

    def result(self, state: State) -> Any:
        """How the solve ended, given the state after the loop."""
        out_of_steps = RESULTS.where(
            state.last_finite,
            RESULTS.max_steps_reached,
            RESULTS.vector_field_not_finite,
        )
        result = RESULTS.where(self.is_running(state), out_of_steps, state.result)
        return comparable(with_coupling_lost(result, state.solver_state))


def loop_buffers(state: State) -> PyTree:
    """The parts of the state that are written row by row."""
    saved = [(s.ts, s.ys) for s in state.save_state]
    return saved, state.dense_ts, state.dense_infos


def nearly(t1: Array) -> Array:
    """100 ulp before `t1`, from where on Diffrax goes to `t1` at once."""
    # Diffrax takes 100 single steps; read as integers, floats are that far apart.
    integer = jnp.dtype(f"int{8 * t1.dtype.itemsize}")
    lowest = jnp.iinfo(integer).min
    in_order = lambda bits: jnp.where(bits < 0, lowest - bits, bits)
    bits = in_order(jax.lax.bitcast_convert_type(t1, integer)) - 100
    before = jax.lax.bitcast_convert_type(in_order(bits), t1.dtype)
    # Around zero those are denormals, which count as zero.
    return jnp.minimum(before, t1 - 100 * jnp.finfo(t1.dtype).tiny)


def _is_too_small(tprev, tnext, keep):
    """Whether rejections have brought the step size down to the spacing of floats.

    (Accepted steps may be as small as that: to step over a jump takes one.)
    """
    spacing = jnp.finfo(tprev.dtype).eps * jnp.abs(tnext)
    return (tnext <= tprev) | (~keep & (tnext - tprev <= 16 * spacing))


def _result_of_attempt(*, diverged, no_nan, too_small, step_result, control_result):
    """The first failure that applies; a NaN explains those of the step size."""
    small = RESULTS.where(too_small, RESULTS.step_too_small, control_result)
    small_or_nan = RESULTS.where(
        no_nan | (small == RESULTS.successful), small, RESULTS.vector_field_not_finite
    )
    out = RESULTS.where(step_result == RESULTS.successful, small_or_nan, step_result)
    return RESULTS.where(diverged, RESULTS.vector_field_not_finite, out)


def _has_nan(tree: PyTree) -> Array:
    out = jnp.array(False)
    for x in jax.tree.leaves(tree):
        out = out | jnp.any(jnp.isnan(x))
    return out
