"""Running a solver loop so that it can be differentiated: record, then sweep back.

`recorded_loop` takes the place of the `while` loop of a solver, be it Diffrax's
(`ACAAdjoint` inside `diffrax.diffeqsolve`) or our own (`odesolve`). The forward pass
runs that loop unchanged, search for the step sizes included, and writes down for every
accepted step its times and (thinned, see `_checkpoints.py`) the state it started from.
The backward pass is the one sweep of `_sweep.py`.

What the loop state must have is what Diffrax's has: `y`, `tprev`, `tnext`, `made_jump`,
`solver_state`, `num_accepted_steps`, `save_state` (with `ts`, `ys`, `save_index` and
`saveat_ts_index`), `dense_ts`, `dense_infos`, and, with events, `event_tprev`,
`event_tnext`, `event_dense_info`.

Second derivatives: the forward rule below calls undecorated code and both directions
are `lax.while_loop`s, so forward mode passes through the whole gradient: use
`jax.jvp(jax.grad(f), ...)` or `jax.hessian(f)`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._checkpoints import Checkpoints
from ._grid import AbstractGrid, AdaptiveGrid, RATIO
from ._hoist import hoist
from ._modes import reverse_mode_only, REVERSE_OVER_REVERSE
from ._save import Save, save_states
from ._step import AbstractStep, SolverStep
from ._sweep import Sweep, SweepInputs
from ._tree import as_arrays, where


class Log(eqx.Module):
    """What is known of every accepted step; each field has one row a step.

    `starts` is kept only where a step may start elsewhere than the last one ended (a
    jump), `origins` only for grids that need to know (see `_grid.py`).
    """

    ends: Array
    starts: Array | None
    origins: Array | None


class Record(eqx.Module):
    """The forward pass as the sweep sees it."""

    checkpoints: Checkpoints
    rows: PyTree[Array]
    log: Log
    tprev0: Array
    tnext0: Array
    num_steps: Array

    def end(self, index):
        """Where step `index` ended; `index = -1` is the start of the solve."""
        end = self.log.ends[jnp.maximum(index, 0)]
        return jnp.where(index < 0, self.tprev0, end)

    def start(self, index):
        """Where step `index` started."""
        if self.log.starts is None:
            return self.end(index - 1)
        return self.log.starts[index]

    def previous_size(self, index):
        """The size before that of step `index`, as the controller saw it."""
        previous = self.end(index - 1) - self.start(jnp.maximum(index - 1, 0))
        return jnp.where(index == 0, self.tnext0 - self.tprev0, previous)

    def origin(self, grid: AbstractGrid, index):
        """The origin of the size of step `index`."""
        logged = None if self.log.origins is None else self.log.origins[index]
        return grid.origin_of(index, logged)

    def with_safe_first_step(self) -> "Record":
        """A batch in which every lane has a first step that can be pulled back.

        A lane that made none (its `y0` may be a NaN) gets that of one that did. It only
        rides along: its cotangents are zero, but zero times NaN would not be.
        """
        none = self.num_steps == 0
        donor = jnp.argmax(~none)
        patch = lambda x: where(none, jnp.broadcast_to(x[donor], x.shape), x)
        patch_first = lambda x: x.at[:, 0].set(patch(x[:, 0]))
        return replace(
            self,
            rows=jax.tree.map(patch_first, self.rows),
            log=jax.tree.map(patch_first, self.log),
            tprev0=patch(self.tprev0),
            tnext0=patch(self.tnext0),
        )


class Solve(eqx.Module):
    """What a loop solves: everything that the forward and the backward pass share."""

    step: AbstractStep
    interpolation_cls: Callable = eqx.field(static=True)
    saves: list[Save]
    grid: AbstractGrid
    checkpoints: Checkpoints
    dense: bool = eqx.field(static=True)
    event: bool = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    lanes: bool = eqx.field(static=True)
    args: PyTree
    t0: Array
    t1: Array

    @property
    def needs_dense_info(self) -> bool:
        """Whether anything reads between the ends of a step."""
        reads = any(save.ts is not None for save in self.saves)
        return reads or self.dense or self.event


def recorded_loop(
    solve: Solve,
    cond_fun: Callable,
    body_fun: Callable,
    init_state: PyTree,
    *,
    max_steps: int,
    buffers: Callable,
) -> PyTree:
    """`while cond_fun(state): state = body_fun(state)`, with our gradient.

    **Arguments:**

    - `solve`: the step, the saves and the grid that the loop is made of.
    - `cond_fun`, `body_fun`, `max_steps`, `buffers`: as for
      `equinox.internal.while_loop`; one iteration attempts one step. They act on one
      solve, also if `solve.lanes`.
    - `init_state`: the state before the first step, with a leading axis if
      `solve.lanes`.

    **Returns:**

    The final state. Its `y`, the outputs saved so far, and what an event needs are
    differentiable; everything else is constant.
    """
    init_state = as_arrays(init_state)
    example = _one_lane(init_state) if solve.lanes else init_state

    def run(state):
        return _run_recording(solve, cond_fun, body_fun, state, max_steps, buffers)

    loop_consts, pure_run = hoist(run, example)
    step_consts, pure_step, save_consts, pure_saves = _hoist_parts(solve, example)
    inputs = SweepInputs(
        init_state=init_state,
        step_consts=step_consts,
        save_consts=save_consts,
        grid=solve.grid,
        ts=[save.ts for save in solve.saves],
    )

    differentiable_run = _differentiable(solve, pure_run, pure_step, pure_saves)
    final_state = differentiable_run(reverse_mode_only((loop_consts, inputs)))
    return _only_differentiable(solve, init_state, final_state)


def _differentiable(solve: Solve, pure_run, pure_step, pure_saves) -> Callable:
    """`(loop constants, inputs) -> final state`, with the sweep for a gradient."""

    def forward(loop_consts__inputs):
        loop_consts, inputs = loop_consts__inputs
        run_all = jax.vmap(pure_run, in_axes=(None, 0)) if solve.lanes else pure_run
        return run_all(loop_consts, inputs.init_state)

    @eqx.filter_custom_vjp
    def differentiable_run(loop_consts__inputs):
        final_state, _ = forward(loop_consts__inputs)
        return final_state

    @differentiable_run.def_fwd
    def _forward_rule(perturbed, loop_consts__inputs):
        del perturbed
        final_state, (rows, log) = forward(loop_consts__inputs)
        return final_state, (final_state, rows, log)

    @differentiable_run.def_bwd
    def _backward_rule(residuals, ct_state, perturbed, loop_consts__inputs):
        final_state, rows, log = residuals
        loop_consts, inputs = loop_consts__inputs
        record = Record(
            checkpoints=solve.checkpoints,
            rows=rows,
            log=log,
            tprev0=inputs.init_state.tprev,
            tnext0=inputs.init_state.tnext,
            num_steps=final_state.num_accepted_steps,
        )
        sweep = Sweep(
            solve=solve,
            record=record,
            pure_step=pure_step,
            pure_saves=pure_saves,
            final_state=final_state,
            ct_state=ct_state,
            inputs=inputs,
            wrt=perturbed[1],
        )
        # The loop's own constants are the step's, whose cotangents are among `inputs`.
        out = (jax.tree.map(lambda _: None, loop_consts), sweep())
        return eqxi.nondifferentiable_backward(out, msg=REVERSE_OVER_REVERSE)

    return differentiable_run


def _one_lane(tree: PyTree) -> PyTree:
    struct = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.tree.map(lambda x: struct(x) if eqx.is_array(x) else x, tree)


def _run_recording(solve, cond_fun, body_fun, init_state, max_steps, buffers):
    """The loop itself: `(final state, (rows, log))`."""
    checkpoints, grid = solve.checkpoints, solve.grid
    logs_origin = isinstance(grid, AdaptiveGrid)
    kept = solve.step.kept(init_state.solver_state, init_state.made_jump)
    stored = (init_state.y, eqx.filter(kept, eqx.is_array))
    rows = jax.tree.map(
        lambda x: jnp.zeros((checkpoints.rows, *x.shape), x.dtype), as_arrays(stored)
    )
    empty = jnp.zeros(max_steps, init_state.tprev.dtype)
    log = Log(
        ends=empty,
        starts=empty if solve.jumps else None,
        origins=jnp.zeros(max_steps, grid.origin_dtype) if logs_origin else None,
    )
    origin = jnp.asarray(RATIO, jnp.int32) if logs_origin else None

    def body(carry):
        state, rows, log, origin = carry
        index = state.num_accepted_steps
        row = checkpoints.row_to_write(index)
        kept = solve.step.kept(state.solver_state, state.made_jump)
        stored = (state.y, eqx.filter(as_arrays(kept), eqx.is_array))
        # A rejected attempt is overwritten by the next one.
        rows = _set(rows, row, stored)
        now = Log(
            ends=state.tnext,
            starts=state.tprev if solve.jumps else None,
            origins=origin.astype(grid.origin_dtype) if logs_origin else None,
        )
        log = _set(log, index, now)
        new_state = body_fun(state)
        if logs_origin:
            accepted = new_state.num_accepted_steps != state.num_accepted_steps
            origin = grid.origin(new_state.tprev, new_state.tnext, origin, accepted)
        return new_state, rows, log, origin

    final_state, rows, log, _ = eqxi.while_loop(
        lambda carry: cond_fun(carry[0]),
        body,
        (init_state, rows, log, origin),
        max_steps=max_steps,
        buffers=lambda carry: (buffers(carry[0]), carry[1], carry[2]),
        kind="lax",
    )
    return final_state, (rows, log)


def _set(buffers: PyTree, index, values: PyTree) -> PyTree:
    is_buffer = lambda x: hasattr(x, "at")
    return jax.tree.map(
        lambda buffer, x: buffer.at[index].set(x), buffers, values, is_leaf=is_buffer
    )


def _hoist_parts(solve: Solve, state: PyTree):
    """The replayed step and the save functions as pure functions."""
    kept = as_struct(solve.step.kept(state.solver_state, state.made_jump))
    t, y = as_struct(state.tprev), as_struct(state.y)
    dense = solve.needs_dense_info

    def replay(t0, t1, y, kept):
        y1, kept, info = solve.step.replay(t0, t1, y, kept, dense)
        return y1, as_arrays(kept), info

    step_consts, pure_step = hoist(replay, t, t, y, kept)
    dense_info = None
    if any(save.ts is not None for save in solve.saves):
        _, _, dense_info = eqx.filter_eval_shape(replay, t, t, y, kept)
    saves = [_hoist_save(solve, save, t, y, dense_info) for save in solve.saves]
    save_consts = [[consts for consts, _ in parts] for parts in saves]
    pure_saves = [[pure for _, pure in parts] for parts in saves]
    return step_consts, pure_step, save_consts, pure_saves


def _hoist_save(solve: Solve, save: Save, t, y, dense_info) -> list[tuple[Any, Any]]:
    """How `save` computes its rows at the end of a step, and inside of one."""

    def at_end(t, y):
        return save.fn(t, y, solve.args)

    def inside(t, start, end, info):
        interpolation = solve.interpolation_cls(t0=start, t1=end, **info)
        return save.fn(t, interpolation.evaluate(t), solve.args)

    nothing = None, None
    return [
        hoist(at_end, t, y) if save.steps else nothing,
        nothing if save.ts is None else hoist(inside, t, t, t, dense_info),
    ]


def as_struct(tree: PyTree) -> PyTree:
    """Shapes and dtypes of the numbers in `tree`."""

    def struct(x):
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))

    return jax.tree.map(
        lambda x: (
            struct(x)
            if eqx.is_array_like(x) or isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        tree,
    )


def _only_differentiable(solve: Solve, init_state, final_state):
    """Makes constant what has no gradient, and leaves alone what the loop never wrote.

    The time reached moves with `t1` if it is `t1`, else with `t0`.
    """
    reached = final_state.tprev == solve.t1
    stopped = jax.lax.stop_gradient(final_state.tprev)
    moving = stopped + (solve.t0 - jax.lax.stop_gradient(solve.t0))
    new: dict[str, Any] = {"tprev": jnp.where(reached, solve.t1, moving)}
    constant = ["tnext", "controller_state", "event_values", "progress_meter_state"]
    if not isinstance(solve.step, SolverStep):
        constant.append("solver_state")
    for name in constant:
        new[name] = jax.lax.stop_gradient(getattr(final_state, name, None))
    new = {name: value for name, value in new.items() if hasattr(final_state, name)}
    final_state = replace(final_state, **new)
    idle = [save.ts is None and save.steps == 0 for save in solve.saves]
    get = lambda s: [x for x, skip in zip(save_states(s), idle, strict=True) if skip]
    return eqx.tree_at(get, final_state, get(init_state))
