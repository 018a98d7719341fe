"""A recorded solve as its derivative sees it, forwards and backwards."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._internal.batch import Axes, Batch
from .._internal.closure_convert import Pure
from .state_source import AbstractStateSource, Part, RecordedSteps
from .trajectory import Trajectory


class PureSave(NamedTuple):
    """How a `diffrax.SubSaveAt` computes what it saves during the loop.

    - `steps`: it saves every `steps`-th step; 0 for none.
    - `at_end`: a row at the end of a step, from `(t, y)`; `None` if not `steps`.
    - `inside`: a row inside a step, from `(t, start, end, dense_info)`; `None` if the
      save has no `ts`.
    """

    steps: int
    at_end: Pure | None
    inside: Pure | None


class Plan(NamedTuple):
    """Everything static about a recorded solve.

    - `states`: where a derivative gets the states from; without arrays.
    - `parts`: the pure functions that make up a step.
    - `statistics`: what the gradient collects of layers, or `None`.
    - `dense`, `event`: whether there are dense output and an event.
    - `throw`: whether a failure should have raised.
    """

    states: AbstractStateSource
    parts: dict[str, Part]
    saves: list[PureSave]
    statistics: Any
    dense: bool
    event: bool
    throw: bool


class Inputs(eqx.Module):
    """What a recorded solve depends on; also its tangents, cotangents, axes and so on.

    - `y`, `replay_state`, `first_start`, `first_end`: the state before the first step
      and the times of that step. They belong to one solve.
    - `constants`, `save_constants`, `grid`, `ts`, `statistics`: what the steps, the
      saves, the step times, the times to save at and the statistics depend on. Solves
      may share these.
    """

    y: PyTree
    replay_state: PyTree
    first_start: Any
    first_end: Any
    constants: dict[str, list[Any]]
    save_constants: list[list[Any]]
    grid: Any
    ts: list[Any]
    statistics: Any


class Saved(eqx.Module):
    """The rows of one save."""

    ts: Any
    ys: PyTree


class Outputs(eqx.Module):
    """What depends on `Inputs` after the loop; also its tangents and cotangents.

    `rows`, `ends` and `starts` are the stored states and times of the trajectory. Only
    second derivatives have use for their tangents.
    """

    y: PyTree
    replay_state: PyTree
    saved: list[Saved]
    dense_ts: Any
    dense_infos: PyTree
    event_start: Any
    event_end: Any
    event_info: PyTree
    rows: PyTree
    ends: Any
    starts: Any


class Recording(eqx.Module):
    """A recorded solve, or a batch of them.

    - `inputs`, `trajectory`: what the solve depended on, and its steps.
    - `axes`: for every array of `inputs`, the levels of `batch` it has axes for.
    - `wrt`: for every array of `inputs`, whether to differentiate by it.
    """

    plan: Plan = eqx.field(static=True)
    inputs: Inputs
    trajectory: Trajectory
    batch: Batch
    axes: Inputs = eqx.field(static=True)
    wrt: Inputs = eqx.field(static=True)

    @property
    def wrt_times(self) -> bool:
        """Whether to differentiate by any time that the steps depend on."""
        return moving_times(self.wrt)

    @property
    def steps(self) -> RecordedSteps:
        """The part that a state source needs."""
        return RecordedSteps(
            trajectory=self.trajectory,
            grid=self.inputs.grid,
            grid_axes=self.axes.grid,
            parts=self.plan.parts,
            constants=self.inputs.constants,
            axes=self.axes.constants,
            wrt=self.wrt.constants,
            wrt_times=self.wrt_times,
            y0=self.inputs.y,
            replay_state0=self.inputs.replay_state,
            batch=self.batch,
        )


def moving_times(perturbed: Inputs) -> bool:
    """Whether any time that the steps depend on is among the `perturbed` inputs."""
    first = perturbed.first_start or perturbed.first_end
    return bool(first or perturbed.grid.anchors)


def all_axes(inputs: Inputs, batch: Batch) -> Inputs:
    """Axes for every level, for every array of `inputs`."""
    axes: Axes = batch.all_axes
    return jax.tree.map(lambda _: axes, inputs)


def none_like(tree: PyTree[Array]) -> PyTree[None]:
    """`tree` with `None` in place of its arrays."""
    return jax.tree.map(lambda _: None, tree)
