"""Defines the record of a solve that its derivatives work on, in both modes."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.batch import Axes, Batch
from .._internal.closure_convert import Pure
from .state_source import AbstractStateSource, Part, RecordedSteps
from .trajectory import Clock, Trajectory


class PureSave(NamedTuple):
    """How a `diffrax.SubSaveAt` computes the rows that it saves during the loop.

    - `steps`: a row is saved after every `steps`-th step; 0 for no such rows.
    - `at_end`: computes the row at the end of a step from `(t, y)`; `None` if `steps`
      is 0.
    - `inside`: computes the row at a time inside a step from `(t, start, end,
      dense_info)`; `None` if the save has no `ts`.
    """

    steps: int
    at_end: Pure | None
    inside: Pure | None


class Plan(NamedTuple):
    """The static part of a recorded solve, which holds no arrays.

    - `states`: the state source, with its arrays removed.
    - `parts`: the pure functions that a step calls, by name.
    - `saves`: how each save computes its rows.
    - `statistics`: what the gradient collects of layers (`layer_statistics.py`), or
      `None`.
    - `dense`, `event`: whether there are dense output and an event.
    - `throw`: whether a failure raises.
    """

    states: AbstractStateSource
    parts: dict[str, Part]
    saves: list[PureSave]
    # `Any`: the class is in `_reverse`, which this sub-package must not import.
    statistics: Any
    dense: bool
    event: bool
    throw: bool

    @property
    def jaxprs(self) -> list[Any]:
        """The traced functions of the steps and of the saves."""
        fns: list[Any] = [*self.parts.values()]
        fns += [fn for save in self.saves for fn in (save.at_end, save.inside) if fn]
        return [fn.jaxpr for fn in fns]


class Inputs(eqx.Module):
    """What a recorded solve depends on.

    Each solve of a batch has its own:

    - `y`, `replay_state`: the state before the first step.

    Solves of a batch may share:

    - `first_start`, `first_end`: the times of the first attempted step.
    - `constants`: the arrays that every part of a step depends on, by part.
    - `save_constants`: for every save, the arrays that its two functions depend on.
    - `grid`: the grid of step times.
    - `ts`: for every save, the times to save at, or `None`.
    - `statistics`: the arrays that the statistics of layers depend on.

    The same structure also holds tangents and cotangents (`None` for those that are
    zero), `Axes`, and booleans. So most leaves are annotated as `Any`.
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

    @property
    def clock(self) -> Clock:
        """What the times of the steps depend on."""
        return Clock(self.grid, self.first_start, self.first_end)


class Saved(eqx.Module):
    """The rows of one save: times and values; `None` if it saves none in the loop."""

    ts: Any
    ys: PyTree


class Outputs(eqx.Module):
    """What depends on `Inputs` after the loop; also its tangents and cotangents.

    A field is `None` if the solve does not have it.

    - `y`, `replay_state`: the state after the last step.
    - `saved`: the rows of every save.
    - `dense_ts`, `dense_infos`: dense output.
    - `event_start`, `event_end`, `event_info`: the step in which an event was found.
    - `rows`, `ends`, `starts`: the stored states and times of the trajectory. Only
      second derivatives use their tangents.
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

    - `plan`: its static part, the same for all solves of the batch.
    - `inputs`: what the solve depends on.
    - `trajectory`: its accepted steps.
    - `batch`: the levels of `vmap` around the solve.
    - `axes`: for every array of `inputs`, the levels of `batch` it has axes for.
    - `wrt`: for every array of `inputs`, whether to differentiate by it.
    """

    plan: Plan = eqx.field(static=True)
    inputs: Inputs
    trajectory: Trajectory
    batch: Batch
    # Static: these decide how the pullbacks are mapped and what they differentiate.
    axes: Inputs = eqx.field(static=True)
    wrt: Inputs = eqx.field(static=True)

    @property
    def wrt_times(self) -> bool:
        """Whether to differentiate by any time that the steps depend on."""
        return moving_times(self.wrt)

    @property
    def steps(self) -> RecordedSteps:
        """The part of this that a state source needs."""
        # With an event most solves end apart.
        moves = self.wrt_times or self.plan.event
        shares = not moves and self._have_one_clock()
        num_steps = self.trajectory.num_steps
        return RecordedSteps(
            trajectory=self.trajectory,
            clock=self.inputs.clock,
            clock_axes=self.axes.clock,
            ends_apart=jnp.any(num_steps < jnp.max(num_steps)) if shares else None,
            parts=self.plan.parts,
            constants=self.inputs.constants,
            axes=self.axes.constants,
            wrt=self.wrt.constants,
            wrt_times=self.wrt_times,
            y0=self.inputs.y,
            replay_state0=self.inputs.replay_state,
            batch=self.batch,
        )

    def _have_one_clock(self) -> bool:
        """Whether all solves of the batch make their steps at the same times."""
        separate = any(any(a.batched) for a in jax.tree.leaves(self.axes.clock))
        recorded = jax.tree.leaves(
            (self.trajectory.log.ends, self.trajectory.log.starts)
        )
        return bool(self.batch.sizes) and not separate and not recorded


def moving_times(perturbed: Inputs) -> bool:
    """Whether `perturbed`, booleans, marks any time that the step times depend on."""
    # The other fields of a grid (`AdaptiveGrid.ends`, ...) have no derivatives.
    first = perturbed.first_start or perturbed.first_end
    return bool(first or perturbed.grid.anchors)


def all_axes(inputs: Inputs, batch: Batch) -> Inputs:
    """Returns axes for every level of `batch`, for every array of `inputs`."""
    axes: Axes = batch.all_axes
    return jax.tree.map(lambda _: axes, inputs)


def none_like(tree: PyTree[Array]) -> PyTree[None]:
    """Returns `tree` with `None` in place of its arrays."""
    return jax.tree.map(lambda _: None, tree)
