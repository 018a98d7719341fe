"""Defines state sources, which provide the state before every step to a derivative.

A state source calls a *visitor* for every accepted step, last to first. A visitor is a
function `(carry, BackwardStep) -> carry`. There are two sources: `CheckpointedStates`
(`checkpoints.py`) steps again from stored states, and `ReconstructedStates`
(`reconstruction.py`) undoes the steps of a reversible solver. The visitors are the
gradient (`gradient.py`) and the expansion to second order (`expansion.py`). A source
does not depend on its visitor.
"""

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.batch import Axes, Batch
from .._internal.closure_convert import Pure
from .._internal.tree import inexact_spec
from .._steps.implicit_stages import SolvedStages
from .._steps.increment import closure_convert_part, StagedIncrement
from .step_times import StepTimes
from .trajectory import Clock, Trajectory


C = TypeVar("C")
# A function that a step calls, pure in its constants: `part(constants, *args)`.
Part = Pure | StagedIncrement | SolvedStages
# `evaluate(part, key, *args)` calls a part of the step by its name. Calls with the same
# part and key are the same call, which may be evaluated once and stored.
Evaluate = Callable[..., PyTree[Array]]


class BackwardStep(NamedTuple):
    """Accepted step `index` of every solve of a batch, as a visitor sees it.

    - `index`: the number of the step, the same for all solves.
    - `times`: when the step was made, with the batch axes.
    - `active`: which solves took step `index`. For the others `times`, `y` and
      `replay_state` are those of another step, so that no NaN is computed from them.
    - `y`, `replay_state`: the state before the step, with the batch axes first.
    - `linearize`: returns `((y1, replay_state1, dense_info), pull)`. `pull` takes
      cotangents of these results to those of the constants and of `(start, end, y,
      replay_state)`. If it is also passed totals, it adds those of the constants to
      them. The step is linearised when `linearize` is called, not before.
    """

    index: Int[Array, ""]
    times: StepTimes
    active: Bool[Array, "..."]
    y: PyTree[Array]
    replay_state: PyTree[Array]
    linearize: Callable[[], tuple[PyTree, Callable]]


class RecordedSteps(eqx.Module):
    """What a source needs to know of the steps of one recorded solve, or of a batch.

    - `trajectory`: the recorded steps; its arrays have all batch axes.
    - `clock`, `clock_axes`: what the step times depend on, and the axes of its arrays.
    - `ends_apart`: whether some solves took fewer steps than others; `None` unless
      `shares_times`.
    - `parts`: the functions that a step calls, by name.
    - `constants`, `axes`, `wrt`: for every part the arrays it depends on, the batch
      levels that these have axes for, and whether to differentiate in them.
    - `wrt_times`: whether to differentiate by the times of steps.
    - `y0`, `replay_state0`: the state before the first step.
    """

    trajectory: Trajectory
    clock: Clock
    clock_axes: PyTree[Axes] = eqx.field(static=True)
    ends_apart: Bool[Array, ""] | None
    parts: dict[str, Part] = eqx.field(static=True)
    constants: dict[str, list[Array]]
    axes: dict[str, list[Axes]] = eqx.field(static=True)
    wrt: dict[str, list[bool]] = eqx.field(static=True)
    wrt_times: bool = eqx.field(static=True)
    y0: PyTree[Array]
    replay_state0: PyTree[Array]
    batch: Batch

    @property
    def shares_times(self) -> bool:
        """Whether step times are the same for all solves of a batch, and constants."""
        return self.ends_apart is not None

    def times(self, index: Int[Array, "..."]) -> StepTimes:
        """Returns when step `index` of every solve was made.

        `index` is a scalar, or has one number for every solve.
        """
        return self._read(Trajectory.times, index)

    def end(self, index: Int[Array, ""]) -> Real[Array, "..."]:
        """Returns where step `index` of every solve ended."""
        return self._read(Trajectory.end, index)

    def _read(
        self,
        method: Callable[[Trajectory, Clock, Int[Array, ""]], PyTree[Array]],
        index: Int[Array, "..."],
    ) -> Any:
        """Returns `method(trajectory, clock, index)` for every solve."""
        if jnp.ndim(index) == 0:
            # `vmap` turns a row that differs between solves into a gather. A common row
            # stays a slice, so `index` is not mapped.
            read = lambda clock, trajectory: method(trajectory, clock, index)
            read_all = self.batch.map_shared(read, self.clock, self.clock_axes)
            return read_all(self.trajectory)
        read = lambda clock, trajectory, index: method(trajectory, clock, index)
        read_all = self.batch.map_shared(read, self.clock, self.clock_axes)
        return read_all(self.trajectory, index)

    def at_shared_times(self, times: StepTimes, index: Int[Array, ""]) -> StepTimes:
        """Returns `times`, of step `index`, with scalars for times that solves share.

        A vector field then computes what depends on time alone once for all solves.
        """
        if not self.shares_times:
            return times
        end = lambda index: self.trajectory.end(self.clock, index)
        return replace(
            times,
            start=end(index - 1),
            end=end(index),
            previous_start=end(jnp.maximum(index - 1, 0) - 1),
        )

    def at_shared_states(
        self, active: Bool[Array, "..."], states: PyTree[Array]
    ) -> PyTree[Array]:
        """Returns `states` with those of an active solve for solves that are not.

        A solve that failed before this step has the times of the others, if solves
        share times. It adds zeros, but at its own state the vector field may have a
        derivative of NaN at these times.
        """
        if self.ends_apart is None:
            return states
        # Nothing is to be done (and, in a batch over several devices, nothing is sent)
        # where all solves take the same steps.
        fill = lambda states: self.batch.fill_from_valid(~active, states)
        return jax.lax.cond(self.ends_apart, fill, lambda states: states, states)

    def valid(self, tree: PyTree) -> PyTree:
        """Replaces the numbers of solves that took no step by those of one that did.

        The pullback at these numbers must be free of NaNs: 0 * NaN is NaN.
        """
        return self.batch.fill_from_valid(self.trajectory.num_steps == 0, tree)

    def evaluate(self, part: str, key: str, *args: PyTree) -> PyTree[Array]:
        """Calls a part for every solve of the batch. This is an `Evaluate`."""
        del key
        consts, axes = self.constants[part], self.axes[part]
        return self.parts[part].evaluate(self.batch, consts, axes, args)

    def pullback(
        self, part: str, args: tuple[PyTree, ...], spec: PyTree[bool]
    ) -> tuple[PyTree, Callable]:
        """Returns the value of a call and its pullback to the constants and to `args`.

        `spec` marks the leaves of `args` to differentiate.
        """
        return self.parts[part].pullback(
            self.batch,
            self.constants[part],
            self.axes[part],
            self.wrt[part],
            args,
            spec,
        )

    def step_spec(self, args: tuple[PyTree, ...]) -> PyTree[bool]:
        """Marks what to differentiate of a step's `(start, end, y, replay_state)`."""
        return (self.wrt_times, self.wrt_times, *inexact_spec(args[2:]))


class StoresStates(eqx.Module):
    """Says what is stored of a state: all of it, if a subclass says nothing else."""

    def to_store(self, y: PyTree[Array], replay_state: PyTree[Array]) -> PyTree[Array]:
        """Returns what a row holds of the state before a step."""
        return y, replay_state

    def from_store(self, row: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        """Returns the state `(y, replay_state)` in a row."""
        y, replay_state = row
        return y, replay_state


class AbstractStateSource(StoresStates):
    """Provides the states before the accepted steps.

    `step` works for one solve and for a batch, `walk` for a batch. The other methods
    are written for one solve.
    """

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """The number of rows of stored states to allocate; 0 for none."""

    @abc.abstractmethod
    def row_to_write(
        self, number: Int[Array, ""], stores: Bool[Array, ""] | bool
    ) -> Int[Array, ""]:
        """Returns the row for stored state `number`, or one that is not read.

        It is one that is not read where not `stores`.
        """

    @abc.abstractmethod
    def is_stored(
        self,
        index: Int[Array, ""],
        step_offset: Int[Array, ""],
        made_jump: Bool[Array, ""],
        resync: Bool[Array, ""],
    ) -> bool | Bool[Array, ""]:
        """Returns whether the state before accepted step `index` is stored.

        `step_offset` is the number of steps made before this solve, `made_jump` whether
        the step starts just after a jump, and `resync` whether the solver decided to
        resync before it. The literal `True` means that all are.
        """

    @property
    def chooses_resyncs(self) -> bool:
        """Whether the solver decides where to resync, which must then be recorded."""
        return False

    @abc.abstractmethod
    def replay_state(
        self, solver_state: PyTree, made_jump: bool | Bool[Array, "..."] | None
    ) -> PyTree:
        """Returns the part of a solver state that a replay needs, next to `y`.

        `solver_state` may also be a cotangent or a tangent of a solver state. Then
        `made_jump`, which has no tangent, is `None`.
        """

    @abc.abstractmethod
    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """Returns `solver_state` with that part replaced."""

    @abc.abstractmethod
    def parts(self) -> dict[str, Callable]:
        """Returns the functions that a step calls and that may depend on parameters."""

    @abc.abstractmethod
    def step(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Repeats a step. Returns `(y1, replay_state1, dense_info)`.

        `t0` and `t1` have the values of `times.start` and `times.end`, and tangents if
        step times are differentiated.
        """

    def step_and_undo(
        self,
        evaluate: Evaluate,
        times: StepTimes,
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Makes a step as `step` does, and calls every part that `walk` will call."""
        return self.step(evaluate, times, t0, t1, y, state)

    @abc.abstractmethod
    def walk(
        self,
        steps: RecordedSteps,
        visit: Callable[[C, BackwardStep], C],
        carry: C,
        linearizes: bool,
    ) -> tuple[C, Real[Array, "..."] | None]:
        """Visits every step, last to first; returns `(carry, reconstruction error)`.

        The visitor may call `BackwardStep.linearize` only if `linearizes`. The error
        has the batch shape; it is `None` if the source does not reconstruct states.
        """

    def guarded(
        self,
        carry: C,
        steps: RecordedSteps,
        error: Real[Array, "..."] | None,
        throw: bool,
        nan_where: Callable[[Bool[Array, "..."], C], C],
    ) -> C:
        """Returns `carry`, with NaNs for solves whose `error` is too large.

        `nan_where(failed, carry)` writes the NaNs. With `throw` an error that is too
        large raises. A source that does not reconstruct states returns `carry`.
        """
        del steps, error, throw, nan_where
        return carry


def closure_convert_parts(
    source: AbstractStateSource,
    t: jax.ShapeDtypeStruct,
    y: PyTree[jax.ShapeDtypeStruct],
    replay_state: PyTree[jax.ShapeDtypeStruct],
) -> tuple[dict[str, list[Array]], dict[str, Part], PyTree]:
    """Turns the parts of a step into pure functions of their constants.

    `t`, `y` and `replay_state` are shapes and dtypes. Returns the constants by part,
    the functions by part, and the shapes of the results of a step.
    """
    parts = source.parts()
    consts: dict[str, list[Array]] = {}
    pure: dict[str, Part] = {}

    def evaluate(part: str, key: str, *args: PyTree) -> PyTree[Array]:
        del key
        # The first call of a part provides the shapes to trace it with. All calls of a
        # part have arguments of the same shapes.
        if part not in pure:
            consts[part], pure[part] = closure_convert_part(parts[part], *args)
        return pure[part](consts[part], *args)

    def step(
        t0: Real[Array, ""], t1: Real[Array, ""], y: PyTree, replay_state: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        # Only shapes and dtypes matter here: these times stand for any step.
        zero, false = jnp.array(0), jnp.array(False)
        times = StepTimes(
            index=zero,
            start=t0,
            end=t1,
            made_jump=false,
            origin=zero,
            previous_size=t0,
            previous_start=t0,
            step_offset=zero,
            resync=false,
        )
        return source.step_and_undo(evaluate, times, t0, t1, y, replay_state)

    return consts, pure, eqx.filter_eval_shape(step, t, t, y, replay_state)
