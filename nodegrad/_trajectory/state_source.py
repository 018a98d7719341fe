"""Where the states of a solve come from when its steps are gone back over.

A state source hands every accepted step, last to first, to a *visitor*: a function that
takes what it carries from step to step, and the `BackwardStep`. There are two sources:
`CheckpointedStates` (`checkpoints.py`) steps again from stored states, and
`ReconstructedStates` (`reconstruction.py`) undoes the steps of a reversible solver.
The visitors are the gradient (`gradient.py`) and the expansion to second order
(`expansion.py`). A source knows nothing of what its visitor does.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.batch import Axes, Batch
from .._internal.closure_convert import as_struct, closure_convert, Pure
from .._internal.tree import inexact_spec
from .._steps.increment import Increment, StagedIncrement
from .step_times import AbstractGrid, StepTimes
from .trajectory import Trajectory


C = TypeVar("C")
# A function that a step calls, pure in its constants.
Part = Pure | StagedIncrement
# `evaluate(part, key, *args)` calls a part of the step; calls with the same part and
# key are the same call.
Evaluate = Callable[..., PyTree[Array]]


class BackwardStep(NamedTuple):
    """One accepted step of every solve of a batch, met on the way back.

    - `index`: the number of the step, the same for all solves.
    - `active`: which solves took so many steps. For the others the rest is some step
      of theirs, so that whatever is computed is free of NaNs.
    - `y`, `replay_state`: the state that the step starts from.
    - `linearize`: returns `((y1, replay_state1, dense_info), pull)`, where `pull` takes
      cotangents of these to those of the constants and of `(start, end, y,
      replay_state)`. Nothing is linearised until it is called.
    """

    index: Int[Array, ""]
    times: StepTimes
    active: Bool[Array, "..."]
    y: PyTree[Array]
    replay_state: PyTree[Array]
    linearize: Callable[[], tuple[PyTree, Callable]]


class RecordedSteps(eqx.Module):
    """The steps of a recorded solve, or of a batch of them, as a source needs them.

    - `parts`: the functions that make up a step, pure in their constants.
    - `constants`, `axes`, `wrt`: for every part the arrays it depends on, the levels of
      the batch that they differ in, and whether to differentiate by them.
    - `wrt_times`: whether to differentiate by the times of steps.
    - `y0`, `replay_state0`: the state that the first step starts from.
    """

    trajectory: Trajectory
    grid: AbstractGrid
    grid_axes: PyTree[Axes] = eqx.field(static=True)
    parts: dict[str, Part] = eqx.field(static=True)
    constants: dict[str, list[Array]]
    axes: dict[str, list[Axes]] = eqx.field(static=True)
    wrt: dict[str, list[bool]] = eqx.field(static=True)
    wrt_times: bool = eqx.field(static=True)
    y0: PyTree[Array]
    replay_state0: PyTree[Array]
    batch: Batch

    def times(self, index: Int[Array, "..."]) -> StepTimes:
        """When step `index` (one number, or one for every solve) was made."""
        return self._read(Trajectory.times, index)

    def end(self, index: Int[Array, ""]) -> Real[Array, "..."]:
        """Where step `index` of every solve ended."""
        return self._read(Trajectory.end, index)

    def _read(self, method: Callable, index: Int[Array, "..."]) -> Any:
        if jnp.ndim(index) == 0:
            # Reading the same row of every log is no gather.
            read = lambda grid, trajectory: method(trajectory, grid, index)
            read_all = self.batch.map_shared(read, self.grid, self.grid_axes)
            return read_all(self.trajectory)
        read = lambda grid, trajectory, index: method(trajectory, grid, index)
        read_all = self.batch.map_shared(read, self.grid, self.grid_axes)
        return read_all(self.trajectory, index)

    def valid(self, tree: PyTree) -> PyTree:
        """`tree`, with numbers of another solve for solves that took no step.

        The pullback at these must be free of NaNs, so that zero cotangents stay zero.
        """
        return self.batch.fill_from_valid(self.trajectory.num_steps == 0, tree)

    def evaluate(self, part: str, key: str, *args: PyTree) -> PyTree[Array]:
        """Calls a part of the step, without linearising it."""
        del key
        consts, axes = self.constants[part], self.axes[part]
        return self.parts[part].evaluate(self.batch, consts, axes, args)

    def pullback(self, part: str, args: tuple, spec: PyTree[bool]):
        """As `evaluate`, with the pullback to the constants and to `args`."""
        return self.parts[part].pullback(
            self.batch,
            self.constants[part],
            self.axes[part],
            self.wrt[part],
            args,
            spec,
        )

    def step_spec(self, args: tuple) -> PyTree[bool]:
        """What to differentiate of `(start, end, y, replay_state)` of a step."""
        return (self.wrt_times, self.wrt_times, *inexact_spec(args[2:]))


class AbstractStateSource(eqx.Module):
    """Where the states before the accepted steps come from.

    The methods for the forward pass are written for one solve; `walk` is for a batch.
    """

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """How many rows of stored states to allocate."""

    @abc.abstractmethod
    def row_to_write(
        self,
        index: Int[Array, ""],
        step_offset: Int[Array, ""],
        start: Real[Array, ""],
        made_jump: Bool[Array, ""],
        grid: AbstractGrid,
    ) -> Int[Array, ""]:
        """The row for the state before step `index`, or one that is never read."""

    @abc.abstractmethod
    def replay_state(self, solver_state: PyTree, made_jump: Any) -> PyTree:
        """The part of a solver state (or of its cotangent) that a replay needs."""

    @abc.abstractmethod
    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """`solver_state` with that part replaced."""

    @abc.abstractmethod
    def parts(self) -> dict[str, Callable]:
        """The functions that a step calls and that may depend on parameters."""

    @abc.abstractmethod
    def step(
        self, evaluate: Evaluate, times: StepTimes, t0, t1, y: PyTree, state: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """A step again: `(y1, replay_state1, dense_info)`.

        `t0` and `t1` are the times in `times`, perhaps with tangents.
        """

    @abc.abstractmethod
    def walk(
        self,
        steps: RecordedSteps,
        visit: Callable[[C, BackwardStep], C],
        carry: C,
        linearizes: bool,
    ) -> tuple[C, Real[Array, "..."] | None]:
        """Visits every step, last to first: `(carry, reconstruction error)`.

        The visitor may call `linearize` only if `linearizes`. The error is `None` where
        nothing is reconstructed.
        """

    def guarded(
        self,
        carry: C,
        steps: RecordedSteps,
        error: Real[Array, "..."] | None,
        throw: bool,
        nan_where: Callable[[Bool[Array, "..."], C], C],
    ) -> C:
        """`carry`, unless states were reconstructed too badly to be trusted."""
        del steps, error, throw, nan_where
        return carry


def closure_convert_parts(
    source: AbstractStateSource, t: Any, y: PyTree, replay_state: PyTree
) -> tuple[dict[str, list[Array]], dict[str, Part], PyTree]:
    """The parts of a step as pure functions of their constants.

    Returns the constants and the functions by name, and the shapes of the results of a
    step.
    """
    parts = source.parts()
    consts: dict[str, list[Array]] = {}
    pure: dict[str, Part] = {}

    def evaluate(part, key, *args):
        del key
        if part not in pure:
            fn = parts[part]
            split = (
                fn.closure_convert
                if isinstance(fn, Increment)
                else ft.partial(closure_convert, fn)
            )
            consts[part], pure[part] = split(*as_struct(args))
        return pure[part](consts[part], *args)

    def step(t0, t1, y, replay_state):
        zero, false = jnp.array(0), jnp.array(False)
        times = StepTimes(zero, t0, t1, false, zero, t0, t0, zero)
        return source.step(evaluate, times, t0, t1, y, replay_state)

    return consts, pure, eqx.filter_eval_shape(step, t, t, y, replay_state)
