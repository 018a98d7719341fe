r"""The gradient of a recorded solve: a pullback through every step, last to first.

With $\Phi_i$ the map of accepted step $i$, from $y_i$ over $[s_i, e_i]$ to $y_{i+1}$
and to the information $d_i$ that dense output interpolates, the reverse sweep is

$$(\lambda_{y_i}, \lambda_{s_i}, \lambda_{e_i}, \Delta\lambda_\theta)
  = \Phi_i^* (\lambda_{y_{i+1}}, \lambda_{d_i}),$$

where $\lambda_{d_i}$ collects what was saved from inside the step (`saves.py`) and
$\theta$ is everything the step closes over: `args`, the terms, closures. Cotangents of
times go through `_grid.pull_back_times`. A cotangent is named `ct_...` throughout.

All this is for one solve or for a batch of them, which go back over step $i$ together.
Cotangents of what solves share are summed over these inside every pullback. A solve
that took no step $i$ waits, with zero cotangents.
"""

import functools as ft
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._internal.tree import add, filled_like, where, zeros_like
from .._trajectory.recording import Inputs, none_like, Outputs, Recording
from .._trajectory.state_source import BackwardStep
from .._trajectory.step_times import pull_back_times
from .._trajectory.trajectory import refuse
from .saves import pull_back_saves, SaveCarry, StepCotangents


class Carry(eqx.Module):
    """The cotangents that the sweep carries from step to step.

    `y` and `replay_state` are those of the state after the step, `start` and `size`
    those of the next step's, see `_grid.pull_back_times`, `anchors` those of the times
    that steps are made to end at. `constants` are those of the step's constants, which
    solves may share. `statistics` are those of layers, see `layer_statistics.py`.
    """

    y: PyTree
    replay_state: PyTree
    start: Real[Array, "..."]
    size: Real[Array, "..."]
    anchors: Array
    saves: list[SaveCarry]
    constants: PyTree
    statistics: PyTree


class GradientVisitor(eqx.Module):
    """Pulls the cotangents of everything that a solve returned back to its inputs.

    - `ct`: these cotangents; `None` where one is known to be zero.
    - `statistics`: what else to collect, see `layer_statistics.py`, or `None`.
    """

    recording: Recording
    ct: Outputs
    statistics: Any = eqx.field(static=True, default=None)

    def initial(self) -> Carry:
        """The cotangents after the last step."""
        recording, ct = self.recording, self.ct
        inputs, trajectory = recording.inputs, recording.trajectory
        zero = jnp.zeros_like(trajectory.first_start)
        # One for every solve, also where solves share the array itself.
        each = lambda x, axes: recording.batch.expand(
            jnp.zeros_like(x), axes, recording.batch.all_axes
        )
        wanted = lambda consts, wrt: zeros_like(eqx.filter(consts, wrt))
        saves = [
            SaveCarry(
                cursor=cursor,
                at_end=wanted(consts[0], wrt[0]),
                inside=wanted(consts[1], wrt[1]),
                ts=None if ts is None else each(ts, axes),
            )
            for cursor, consts, wrt, ts, axes in zip(
                trajectory.last_cursors,
                inputs.save_constants,
                recording.wrt.save_constants,
                inputs.ts,
                recording.axes.ts,
                strict=True,
            )
        ]
        return Carry(
            y=filled_like(ct.y, trajectory.y),
            replay_state=filled_like(ct.replay_state, trajectory.replay_state),
            start=zero,
            size=zero,
            anchors=each(inputs.grid.anchors, recording.axes.grid.anchors),
            saves=saves,
            constants=wanted(inputs.constants, recording.wrt.constants),
            statistics=None
            if self.statistics is None
            else self.statistics.initial(recording),
        )

    def visit(self, carry: Carry, step: BackwardStep) -> Carry:
        """The cotangents before a step, from those after it."""
        recording, batch = self.recording, self.recording.batch
        outputs, pull = step.linearize()
        y1, _, info = outputs
        zero = jnp.zeros_like(step.times.start)
        cts = StepCotangents(y1=carry.y, info=zeros_like(info), start=zero, end=zero)
        saves, cts = pull_back_saves(
            recording, self.ct, carry.saves, cts, step, y1, info
        )
        cts = batch.mask_inactive(step.active, cts)
        ct_state1 = batch.mask_inactive(step.active, carry.replay_state)
        ct_consts, ct_args = pull((cts.y1, ct_state1, cts.info))
        ct_start, ct_end, ct_y, ct_state = ct_args
        new = replace(
            carry,
            y=ct_y,
            replay_state=ct_state,
            saves=saves,
            constants=add(carry.constants, ct_consts),
        )
        if recording.wrt_times:
            start, end = cts.start + ct_start, cts.end + ct_end
            new = self._pull_back_times(new, step, start, end)
        if self.statistics is not None:
            at_start, at_end = (ct_y, ct_state), (cts.y1, ct_state1)
            statistics = self.statistics.visit(
                recording, carry.statistics, step, y1, at_start, at_end
            )
            new = replace(new, statistics=statistics)
        # Solves that took fewer steps wait: all that they add is zero.
        y, replay_state = batch.where_active(
            step.active,
            (new.y, new.replay_state),
            (carry.y, carry.replay_state),
        )
        return replace(new, y=y, replay_state=replay_state)

    def _pull_back_times(self, carry: Carry, step: BackwardStep, ct_start, ct_end):
        recording = self.recording
        pull = recording.batch.map_shared(
            pull_back_times, recording.inputs.grid, recording.axes.grid
        )
        cts = ct_start, ct_end, carry.start, carry.size
        anchors, start, size = pull(carry.anchors, step.times, cts)
        return replace(carry, anchors=anchors, start=start, size=size)

    def nan_where(self, failed: Bool[Array, "..."], carry: Carry) -> Carry:
        """`carry`, but NaN for solves that `failed`, and in whatever they add to."""
        nan = lambda x: x * jnp.nan if eqx.is_inexact_array(x) else x
        each = ft.partial(jax.tree.map, lambda x: where(failed, nan(x), x))
        shared = ft.partial(jax.tree.map, lambda x: where(jnp.any(failed), nan(x), x))
        return Carry(
            y=each(carry.y),
            replay_state=each(carry.replay_state),
            start=each(carry.start),
            size=each(carry.size),
            anchors=each(carry.anchors),
            saves=[
                SaveCarry(
                    cursor=save.cursor,
                    at_end=shared(save.at_end),
                    inside=shared(save.inside),
                    ts=each(save.ts),
                )
                for save in carry.saves
            ],
            constants=shared(carry.constants),
            statistics=shared(carry.statistics),
        )

    def finish(self, carry: Carry) -> Inputs:
        """The cotangents of the inputs."""
        recording, wrt = self.recording, self.recording.wrt
        batch, axes = recording.batch, recording.axes
        ct_grid = none_like(recording.inputs.grid)
        first_start, first_end = None, None
        if recording.wrt_times:
            first_start, first_end = carry.start - carry.size, carry.size
            anchors = batch.total_over_batch(carry.anchors, axes.grid.anchors)
            ct_grid = replace(ct_grid, anchors=anchors)
        ct_ts = [
            batch.total_over_batch(save.ts, a) if w else None
            for save, a, w in zip(carry.saves, axes.ts, wrt.ts, strict=True)
        ]
        return Inputs(
            y=carry.y,
            replay_state=carry.replay_state,
            first_start=first_start,
            first_end=first_end,
            constants=carry.constants,
            save_constants=[[save.at_end, save.inside] for save in carry.saves],
            grid=ct_grid,
            ts=ct_ts,
            statistics=none_like(recording.inputs.statistics)
            if self.statistics is None
            else self.statistics.finish(recording, carry.statistics),
        )


def pull_back(recording: Recording, ct: Outputs) -> Inputs:
    """The cotangents of `recording.inputs`, from those of all that the solve returned.

    Only what `recording.wrt` marks is complete.
    """
    statistics = None
    if recording.plan.statistics is not None:
        recording, statistics = recording.plan.statistics.joined(recording)
    visitor = GradientVisitor(recording, ct, statistics)
    states, steps = recording.plan.states, recording.steps
    carry, error = states.walk(steps, visitor.visit, visitor.initial(), True)
    throw, trajectory = recording.plan.throw, recording.trajectory
    carry = states.guarded(carry, steps, error, throw, visitor.nan_where)
    is_cut = recording.batch.map(lambda trajectory: trajectory.is_cut)
    failed = refuse(is_cut(trajectory), throw)
    if throw and not recording.plan.event:
        # JAX drops the exception of a solve whose value is not used, as in
        # `jax.jit(jax.grad(loss))` of a loss that is linear in it.
        failed = failed | ~jnp.all(trajectory.at_end)
    return visitor.finish(visitor.nan_where(failed, carry))
