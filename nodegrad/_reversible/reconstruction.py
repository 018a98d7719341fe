"""Reconstructs the states of a reversible solver by undoing its steps.

The backward loop carries the state after a step, undoes the step, and passes the state
before it to the visitor. If the visitor linearises the step, the evaluations of the
inverse are linearised, and no further ones are made (see `invertible_step.py`).

The start of the solve is known, and so are the states before resyncs (`restarts.py`).
There, the reconstructed state is compared with the known one, and replaced by it. The
largest difference, relative to the state, is the *reconstruction error*. A gradient is
refused if this error is large.
"""

import functools as ft
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.norms import magnitudes, relative_size, size
from .._internal.tree import where, zeros_like
from .._trajectory.linearized_calls import LinearizedCalls
from .._trajectory.state_source import (
    AbstractStateSource,
    BackwardStep,
    C,
    Evaluate,
    RecordedSteps,
)
from .._trajectory.step_times import StepTimes
from .invertible_step import AbstractInvertibleStep, Resync, Time
from .restarts import RestartRows, Restarts


# A gradient is refused if a reconstructed state differs from a stored one by more than
# this, relative to the stored one. A larger bound admits less accurate gradients.
# Without it, a gradient in tests/reversible/test_reversible_adjoint.py (that of a small
# component beside a large one) is wrong.
_MAX_ERROR = 1e-3
# A difference of up to this many units of rounding of the largest state is accepted,
# also if the stored state is small or zero.
_MAX_ROUNDING = 1e3
# An entry near zero is compared with at least this fraction of the largest value it has
# had so far. Without this bound, or without the previous one, the gradient of the solve
# from rest in tests/reversible/test_reversible_adjoint.py is refused.
_USUAL = 0.1

_UNTRUSTED = (
    "A state that `nodegrad.ReversibleAdjoint` reconstructed differs from the stored "
    f"one by more than a relative {_MAX_ERROR}: rounding errors have grown in the "
    "backward pass (or those of an inverse that is not exact), and the gradient would "
    "be wrong. Pass `resync_every=10` or so to the solver (`Reversible` does that "
    "where it is needed, by default); take fewer steps or a "
    "`coupling_parameter` closer to one (if the inverse is not exact, smaller steps); "
    "or use `nodegrad.ACAAdjoint()`."
)

_LOST = (
    "A gradient was requested of a solve that ended before `t1`, because the copies of "
    "the solution diverged. Pass `resync_every='auto'`, the default, to `Reversible`, "
    "or `resync_every=10` or so to `ALF`. If it diverges with that too, single steps "
    "are too long: take smaller steps, or use a plain solver with "
    "`nodegrad.ACAAdjoint()`. For the gradient of the part that was solved, pass "
    "`throw=False` to the solve."
)


class _Walk(eqx.Module):
    """What the backward loop carries in addition to the values of the visitor.

    - `y`, `replay_state`: the state after the step to undo next.
    - `peak`: for each component of `y`, the largest absolute value met so far.
    - `error`: for each solve, the largest reconstruction error so far.
    - `restarts`: for each solve, the number of restarts in the steps left to undo.
    """

    y: PyTree[Array]
    replay_state: PyTree[Array]
    peak: PyTree[Array]
    error: Real[Array, "..."]
    restarts: Int[Array, "..."]


# The step to undo next, the walk up to it, and the values of the visitor.
_Walked: TypeAlias = tuple[Int[Array, ""], _Walk, C]


class ReconstructedStates(AbstractStateSource):
    """The state source that undoes the steps, from the final state on.

    - `invertible_step`: the step and its inverse.
    - `restarts`: where the states before resyncs are stored.
    """

    invertible_step: AbstractInvertibleStep
    restarts: Restarts

    @property
    def rows(self) -> int:
        return self.restarts.rows

    @property
    def chooses_resyncs(self) -> bool:
        return self.restarts.chosen

    def to_store(self, y: PyTree[Array], replay_state: PyTree[Array]) -> PyTree[Array]:
        return self.invertible_step.to_store(y, replay_state)

    def from_store(self, row: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        return self.invertible_step.from_store(row)

    def row_to_write(
        self, number: Int[Array, ""], stores: Bool[Array, ""] | bool
    ) -> Int[Array, ""]:
        return self.restarts.row_to_write(number, stores)

    def is_stored(
        self,
        index: Int[Array, ""],
        step_offset: Int[Array, ""],
        made_jump: Bool[Array, ""],
        resync: Bool[Array, ""],
    ) -> Resync:
        return self.restarts.is_restart(index, step_offset, made_jump, resync)

    def replay_state(
        self, solver_state: PyTree, made_jump: bool | Bool[Array, "..."] | None
    ) -> PyTree:
        del made_jump
        return self.invertible_step.replay_state(solver_state)

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        return self.invertible_step.with_replay_state(solver_state, replay_state)

    def parts(self) -> dict[str, Callable]:
        return self.invertible_step.parts()

    def step(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        resync = self._told(times)
        return self.invertible_step.forward(evaluate, t0, t1, y, state, resync)

    def step_and_undo(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        y1, state1, dense_info = self.step(evaluate, times, t0, t1, y, state)
        self.invertible_step.backward(evaluate, t0, t1, t0, y1, state1)
        return y1, state1, dense_info

    def _told(self, times: StepTimes) -> Resync:
        """Returns the flag that `forward` gets."""
        if self.invertible_step.told_of_regular_resyncs:
            return self.restarts.is_at(times)
        return times.made_jump if self.restarts.jumps else False

    def walk(
        self,
        steps: RecordedSteps,
        visit: Callable[[C, BackwardStep], C],
        carry: C,
        linearizes: bool,
    ) -> tuple[C, Real[Array, "..."] | None]:
        batch, trajectory = steps.batch, steps.trajectory
        num_steps = trajectory.num_steps
        # Solves without any step get the state and times of one that has steps, so that
        # the pullbacks through steps they did not take contain no NaN.
        y, state = steps.valid((trajectory.y, trajectory.replay_state))
        error = jnp.zeros_like(batch.map(size)(_constant(trajectory.y)))
        peak = zeros_like(magnitudes(_constant(trajectory.y)))
        last_times = steps.valid(steps.times(jnp.maximum(num_steps - 1, 0)))

        walk = _Walk(y, state, peak, error, trajectory.num_stored)
        init = jnp.max(num_steps) - 1, walk, carry
        undo = ft.partial(self._undo_step, steps, visit, linearizes, last_times)
        stored = RestartRows.of(self.restarts, steps)
        if self.restarts.are_thinned:
            _, walk, carry = self._undo_thinned(steps, undo, stored, init)
        else:
            undo_step = ft.partial(undo, stored)
            _, walk, carry = batch.while_loop(lambda c: c[0] >= 0, undo_step, init)
        return carry, walk.error

    def _undo_thinned(
        self,
        steps: RecordedSteps,
        undo: Callable,
        stored: RestartRows,
        init: _Walked[C],
    ) -> _Walked[C]:
        """Undoes all steps, if there may be more restarts than rows for them."""
        valid = init[1].y, init[1].replay_state

        def undo_some(
            stored__walked: tuple[RestartRows, _Walked[C]],
        ) -> tuple[RestartRows, _Walked[C]]:
            stored, (index, walk, carry) = stored__walked
            stored = stored.found_again(
                self, self.restarts, steps, index, walk.restarts, valid
            )

            def can_go_on(index__walk__carry: _Walked[C]) -> Bool[Array, ""]:
                # The first restart that a solve lacks is number `first - 1`.
                index, walk, _ = index__walk__carry
                is_missing = (walk.restarts > 0) & (walk.restarts <= stored.first)
                lacks = is_missing & self.restarts.is_at(steps.times(index))
                lacks = lacks & (index < steps.trajectory.num_steps)
                return (index >= 0) & ~jnp.any(lacks)

            undo_step = ft.partial(undo, stored)
            walked = steps.batch.while_loop(can_go_on, undo_step, (index, walk, carry))
            return stored, walked

        _, walked = steps.batch.while_loop(
            lambda c: c[1][0] >= 0,
            undo_some,
            (stored, init),
            lambda c: c[0].again,
        )
        return walked

    def _undo_step(
        self,
        steps: RecordedSteps,
        visit: Callable[[C, BackwardStep], C],
        linearizes: bool,
        last_times: StepTimes,
        stored: RestartRows,
        index__walk__carry: _Walked[C],
    ) -> _Walked[C]:
        """Undoes step `index`, and visits it.

        `last_times` are those of the last step of each solve.
        """
        batch, (index, walk, carry) = steps.batch, index__walk__carry
        # The solves of a batch undo step `index` together. A solve that took fewer
        # steps undoes its last step repeatedly, and the result is dropped.
        active = index < steps.trajectory.num_steps
        times = batch.where_active(active, steps.times(index), last_times)
        shared = steps.at_shared_times(times, index)
        last = steps.at_shared_states(active, (walk.y, walk.replay_state))
        peak = magnitudes(walk.peak, _constant(walk.y))
        # Linearised calls keep the pullbacks of the inverse for `linearize`.
        evaluate = LinearizedCalls(steps, shared) if linearizes else steps.evaluate
        at = replace(walk, y=last[0], replay_state=last[1])
        y, state, error = self._undo(steps, evaluate, shared, at, peak, stored)
        linearize = self._linearize(evaluate, shared, y, state)
        carry = visit(carry, BackwardStep(index, times, active, y, state, linearize))
        error = jnp.maximum(walk.error, jnp.where(active, error, 0))
        y, state = batch.where_active(active, (y, state), (walk.y, walk.replay_state))
        passed = active & self.restarts.is_at(times)
        restarts = walk.restarts - passed.astype(walk.restarts.dtype)
        return index - 1, _Walk(y, state, peak, error, restarts), carry

    def _undo(
        self,
        steps: RecordedSteps,
        evaluate: Evaluate,
        times: StepTimes,
        walk: _Walk,
        peak: PyTree[Array],
        stored: RestartRows,
    ) -> tuple[PyTree[Array], PyTree[Array], Real[Array, "..."]]:
        """Undoes a step: returns `(y, replay_state, error)` before it.

        The error is zero unless the state before the step is stored.
        """
        invertible_step = self.invertible_step
        found = invertible_step.backward(
            evaluate,
            times.start,
            times.end,
            times.previous_start,
            walk.y,
            walk.replay_state,
        )
        # Replace reconstructed states by stored ones, which are exact.
        known = steps.y0, steps.replay_state0
        is_known = times.index == 0
        if self.rows:
            is_restart = self.restarts.is_at(times)
            restart = self.from_store(stored.take(steps, walk.restarts - 1))
            known = where(is_known, known, restart)
            is_known = is_known | is_restart
        error = steps.batch.map(_relative_error)(
            invertible_step.checked_part(*found),
            invertible_step.checked_part(*known),
            peak,
        )
        y, state = where(is_known, known, found)
        return y, state, jnp.where(is_known, error, 0)

    def _linearize(
        self, calls: Any, times: StepTimes, y: PyTree[Array], state: PyTree[Array]
    ) -> Callable[[], tuple[PyTree, Callable]]:
        """Returns the `linearize` of a `BackwardStep`.

        `calls` are `LinearizedCalls`. Otherwise the visitor does not call the result.
        """

        def step(evaluate: Evaluate, t0: Time, t1: Time, y: PyTree, state: PyTree):
            resync = self._told(times)
            return self.invertible_step.forward(evaluate, t0, t1, y, state, resync)

        return lambda: calls.linearize(step, (times.start, times.end, y, state))

    def guarded(
        self,
        carry: C,
        steps: RecordedSteps,
        error: Real[Array, "..."] | None,
        throw: bool,
        nan_where: Callable[[Bool[Array, "..."], C], C],
    ) -> C:
        assert error is not None
        # An error of NaN is bad, too.
        bad = ~(error <= _MAX_ERROR)
        if throw:
            # A solve that is lost raises an error, but JAX drops it if the value of the
            # solve is not used. So raise again.
            lost = steps.trajectory.lost
            which = jnp.where(jnp.any(lost), 1, 0)
            failed = jnp.any(bad | lost)
            messages = [_UNTRUSTED, _LOST]
            # The operand of a check is moved to one device. A single boolean is the
            # operand, so that `carry` may stay sharded.
            no = jnp.array(False)
            bad = bad | eqx.branched_error_if(no, failed, which, messages)
        return nan_where(bad, carry)


def reconstruction_error(source: AbstractStateSource, steps: RecordedSteps) -> Array:
    """Returns the reconstruction error of one solve, by undoing its steps once.

    It is zero if the source stores all states that it needs, and NaN if some steps were
    not recorded.
    """
    _, error = source.walk(steps, lambda carry, _: carry, None, False)
    if error is None:
        return jnp.zeros(())
    return jnp.where(steps.trajectory.is_cut, jnp.nan, error)


def _constant(y: PyTree[Array]) -> PyTree[Array]:
    return jax.lax.stop_gradient(eqx.filter(y, eqx.is_inexact_array))


def _relative_error(
    found: PyTree[Array], known: PyTree[Array], peak: PyTree[Array]
) -> Real[Array, ""]:
    """Returns the relative error of `found`, if `known` is exact.

    It is the larger of two: the root mean square of the error, relative to that of the
    state; and the root mean square of errors that are relative entry by entry, so that
    a large component does not hide the error of a small one.
    """
    found, known = _constant(found), _constant(known)
    error = jax.tree.map(jnp.subtract, found, known)
    unit = jnp.finfo(size(error).dtype).eps
    # Relative to this, `_MAX_ROUNDING` units of rounding of the largest state are an
    # error of `_MAX_ERROR`.
    least = _MAX_ROUNDING / _MAX_ERROR * unit * size(peak)
    # A relative error of zero does not exist. A solve from rest is compared with its
    # largest values only.
    overall = size(error) / jnp.maximum(size(known), least)
    overall = jnp.where(size(known) == 0, 0, overall)
    # An entry may be zero in this one state. Compare it with its values elsewhere.
    usual = magnitudes(known, jax.tree.map(lambda x: _USUAL * x, peak))
    worst = jnp.maximum(overall, relative_size(error, usual))
    return jnp.where(size(error) == 0, 0, worst)
