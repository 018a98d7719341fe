r"""The gradient of a recorded solve: the pullbacks of its steps, from last to first.

With $\Phi_i$ the map of accepted step $i$, from $y_i$ over $[s_i, e_i]$ to $y_{i+1}$
and to the information $d_i$ that dense output interpolates, the reverse sweep is

$$(\lambda_{y_i}, \lambda_{s_i}, \lambda_{e_i}, \Delta\lambda_\theta)
  = \Phi_i^* (\lambda_{y_{i+1}}, \lambda_{d_i}),$$

where $\lambda_{d_i}$ is the cotangent of rows saved inside the step (`saves.py`), and
$\theta$ stands for all arrays that the step closes over: `args`, the terms, closures.
Cotangents of times go through `step_times.pull_back_times`. Names of cotangents start
with `ct_`.

The code is for one solve or for a batch, whose solves visit step $i$ together.
Cotangents of arrays that solves share are summed inside of each pullback. A solve
that took fewer steps is inactive until its last step: it adds zeros.
"""

import functools as ft
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._internal.batch import Axes
from .._internal.tree import filled_like, where, with_fields, zeros_like
from .._trajectory.recording import Inputs, none_like, Outputs, Recording
from .._trajectory.state_source import BackwardStep
from .._trajectory.step_times import pull_back_times
from .._trajectory.trajectory import refuse
from .layer_statistics import NodeStatistics
from .saves import pull_back_saves, SaveCarry, StepCotangents


class Carry(eqx.Module):
    """The cotangents that the sweep carries from step to step.

    - `y`, `replay_state`: of the state after the step to visit next.
    - `start`, `size`: of the start of the step visited last (the next one in time), and
      of the size of the step to visit next (see `step_times.pull_back_times`).
    - `anchors`: of the times that steps are made to end at, separately for each solve.
    - `saves`: of the outputs, save by save.
    - `constants`: of the constants of a step, which solves may share.
    - `statistics`: statistics of layers (see `layer_statistics.py`), or `None`.
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
    """Pulls the cotangents of all outputs of a solve back to its inputs.

    - `ct`: the cotangents of the outputs; `None` where known to be zero.
    - `statistics`: the statistics of layers to collect, or `None`.
    """

    recording: Recording
    ct: Outputs
    statistics: NodeStatistics | None = eqx.field(static=True, default=None)

    def initial(self) -> Carry:
        """Returns the cotangents after the last step."""
        recording, ct = self.recording, self.ct
        inputs, trajectory = recording.inputs, recording.trajectory
        zero = jnp.zeros(trajectory.num_steps.shape, inputs.first_start.dtype)
        # A separate cotangent for every solve, also where solves share the array: in a
        # step they add to different positions of it. `finish` sums over the solves.
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
        """Returns the cotangents before a step, given those after it."""
        recording, batch = self.recording, self.recording.batch
        outputs, pull = step.linearize()
        y1, _, info = outputs
        # Add the cotangents of the rows that this step saved.
        zero = jnp.zeros_like(step.times.start)
        cts = StepCotangents(y1=carry.y, info=zeros_like(info), start=zero, end=zero)
        saves, cts = pull_back_saves(
            recording, self.ct, carry.saves, cts, step, y1, info
        )
        # Pull back through the step. Inactive solves have the times of some other step
        # of theirs, and zero cotangents, so they add zeros to shared constants.
        cts = batch.mask_inactive(step.active, cts)
        ct_state1 = batch.mask_inactive(step.active, carry.replay_state)
        ct_results = cts.y1, ct_state1, cts.info
        constants, ct_args = pull(ct_results, carry.constants)
        ct_start, ct_end, ct_y, ct_state = ct_args
        new = replace(
            carry,
            y=ct_y,
            replay_state=ct_state,
            saves=saves,
            constants=constants,
        )
        # The times of the step depend on the previous step, and on the anchors.
        if recording.wrt_times:
            start, end = cts.start + ct_start, cts.end + ct_end
            new = self._pull_back_times(new, step, start, end)
        if self.statistics is not None:
            at_start, at_end = (ct_y, ct_state), (cts.y1, ct_state1)
            statistics = self.statistics.visit(
                recording, carry.statistics, step, y1, at_start, at_end
            )
            new = replace(new, statistics=statistics)
        # Inactive solves keep the cotangents of their final state.
        y, replay_state = batch.where_active(
            step.active,
            (new.y, new.replay_state),
            (carry.y, carry.replay_state),
        )
        return replace(new, y=y, replay_state=replay_state)

    def _pull_back_times(
        self,
        carry: Carry,
        step: BackwardStep,
        ct_start: Real[Array, "..."],
        ct_end: Real[Array, "..."],
    ) -> Carry:
        """Returns `carry` with the cotangents of times before the step."""
        recording = self.recording
        pull = recording.batch.map_shared(
            pull_back_times, recording.inputs.grid, recording.axes.grid
        )
        cts = ct_start, ct_end, carry.start, carry.size
        anchors, start, size = pull(carry.anchors, step.times, cts)
        return replace(carry, anchors=anchors, start=start, size=size)

    def nan_where(self, failed: Bool[Array, "..."], carry: Carry) -> Carry:
        """Sets the cotangents of `failed` solves to NaN, and all sums with them."""
        batch, axes = self.recording.batch, self.recording.axes
        nan = lambda x: x * jnp.nan if eqx.is_inexact_array(x) else x
        each = ft.partial(jax.tree.map, lambda x: where(failed, nan(x), x))

        def shared(cts: PyTree[Array], axes: PyTree[Axes]) -> PyTree[Array]:
            # Only what a failed solve has a share in: samples may have parameters of
            # their own.
            return jax.tree.map(
                lambda a, x: (
                    x
                    if x is None
                    else where(batch.any_that_share(failed, a), nan(x), x)
                ),
                axes,
                cts,
            )

        return Carry(
            y=each(carry.y),
            replay_state=each(carry.replay_state),
            start=each(carry.start),
            size=each(carry.size),
            anchors=each(carry.anchors),
            saves=[
                SaveCarry(
                    cursor=save.cursor,
                    at_end=shared(save.at_end, consts[0]),
                    inside=shared(save.inside, consts[1]),
                    ts=each(save.ts),
                )
                for save, consts in zip(carry.saves, axes.save_constants, strict=True)
            ],
            constants=shared(carry.constants, axes.constants),
            statistics=jax.tree.map(
                lambda x: where(jnp.any(failed), nan(x), x), carry.statistics
            ),
        )

    def finish(self, carry: Carry) -> Inputs:
        """Returns the cotangents of the inputs, from those before the first step."""
        recording, wrt = self.recording, self.recording.wrt
        batch, axes = recording.batch, recording.axes
        # Sum over the solves that share anchors, or times to save at.
        ct_grid = none_like(recording.inputs.grid)
        first_start, first_end = None, None
        if recording.wrt_times:
            # The first size is `first_end - first_start`.
            first_start, first_end = batch.total_over_batch(
                (carry.start - carry.size, carry.size),
                (axes.first_start, axes.first_end),
            )
            anchors = batch.total_over_batch(carry.anchors, axes.grid.anchors)
            ct_grid = with_fields(ct_grid, anchors=anchors)
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
    """Returns the cotangents of `recording.inputs`, given those of the outputs.

    Only the cotangents of arrays that `recording.wrt` marks may be used: others are
    `None`, or miss some contributions. The cotangents of a solve that has no derivative
    are NaN; with `plan.throw` that is an error.
    """
    statistics = None
    # Statistics are an additional "gradient", with respect to the probes of layers.
    if recording.plan.statistics is not None:
        recording, statistics = recording.plan.statistics.joined(recording)
    visitor = GradientVisitor(recording, ct, statistics)
    states, steps = recording.plan.states, recording.steps
    carry, error = states.walk(steps, visitor.visit, visitor.initial(), True)
    throw, trajectory = recording.plan.throw, recording.trajectory
    # There is no derivative if states could not be reconstructed, if some steps were
    # not recorded, or (with `throw`) if the solve ended before `t1`.
    carry = states.guarded(carry, steps, error, throw, visitor.nan_where)
    is_cut = recording.batch.map(lambda trajectory: trajectory.is_cut)
    failed = refuse(is_cut(trajectory), throw)
    if throw and not recording.plan.event:
        # JAX drops the error of a solve whose value is not used, as in
        # `jax.jit(jax.grad(loss))` of a loss that is linear in the value.
        failed = failed | ~jnp.all(trajectory.at_end)
    return visitor.finish(visitor.nan_where(failed, carry))
