"""Running a solver loop so that it can be differentiated: record, then sweep back.

`recorded_loop` takes the place of the `while` loop of a solver, be it Diffrax's
(`_door.py`) or our own (`odesolve`). The forward pass runs that loop unchanged, search
for the step sizes included, and writes down for every accepted step its times and
(thinned, see `_checkpoints.py`) the state it started from. The backward pass is the one
sweep of `_sweep.py`.

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
from ._diffrax import is_unsafe_sde
from ._grid import AbstractGrid, AdaptiveGrid, RATIO
from ._hoist import as_struct, hoist
from ._inversion import hoist_reversal, reconstruction_error, Restarts
from ._log import Log, Record
from ._modes import reverse_mode_only, REVERSE_OVER_REVERSE
from ._reversal import AbstractReversal
from ._save import Save, save_states
from ._statistics import make_statistics
from ._step import AbstractStep, SolverStep
from ._sweep import Sweep, SweepInputs
from ._tree import as_arrays, put


class Solve(eqx.Module):
    """What a loop solves: everything that the forward and the backward pass share.

    `memory` says which states are stored. They are all that the backward pass has, or,
    with a `reversal`, where it starts to walk back anew. `check` asks for a walk back
    for its error alone.
    """

    step: AbstractStep
    reversal: AbstractReversal | None
    interpolation_cls: Callable = eqx.field(static=True)
    saves: list[Save]
    grid: AbstractGrid
    memory: Checkpoints | Restarts
    throw: bool = eqx.field(static=True)
    check: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    event: bool = eqx.field(static=True)
    jumps: bool = eqx.field(static=True)
    lanes: bool = eqx.field(static=True)
    args: PyTree
    t0: Array
    t1: Array

    def kept(self, solver_state, made_jump):
        """What a step hands to the next besides `y`, to replay it or to undo it."""
        if self.reversal is not None:
            return self.reversal.kept(solver_state)
        return self.step.kept(solver_state, made_jump)

    @property
    def stores_times(self) -> bool:
        """Whether the ends of steps are written down rather than computed again."""
        if self.reversal is None or isinstance(self.grid, AdaptiveGrid):
            return True
        # These give the same noise only for the very same times.
        return is_unsafe_sde(self.reversal.terms)

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
) -> tuple[PyTree, Array | None]:
    """`while cond_fun(state): state = body_fun(state)`, with our gradient.

    **Arguments:**

    - `solve`: the step, the saves and the grid that the loop is made of.
    - `cond_fun`, `body_fun`, `max_steps`, `buffers`: as for
      `equinox.internal.while_loop`; one iteration attempts one step. They act on one
      solve, also if `solve.lanes`.
    - `init_state`: the state before the first step, with a leading axis if
      `solve.lanes`.

    **Returns:**

    - The final state. Its `y`, the outputs saved so far, and what an event needs are
      differentiable; everything else is constant.
    - The reconstruction error, if `solve.check`.
    """
    init_state = as_arrays(init_state)
    example = _one_lane(init_state) if solve.lanes else init_state

    def run(state):
        return run_recording(solve, cond_fun, body_fun, state, max_steps, buffers)

    loop_consts, pure_run = hoist(run, example)
    step_consts, pure_step, save_consts, pure_saves = _hoist_parts(solve, example)
    statistics_consts, payload = make_statistics(solve, example, step_consts, pure_step)
    inputs = SweepInputs(
        init_state=init_state,
        step_consts=step_consts,
        save_consts=save_consts,
        grid=solve.grid,
        ts=[save.ts for save in solve.saves],
        statistics=statistics_consts,
    )

    pure = pure_run, pure_step, pure_saves, payload
    differentiable_run = _differentiable(solve, *pure)
    final_state, written = differentiable_run(reverse_mode_only((loop_consts, inputs)))
    error = None
    if solve.check:
        constants = final_state, written, inputs
        final, written, inputs = _constant(constants)
        sweep = _make_sweep(solve, pure_step, pure_saves, final, written, inputs)
        error = reconstruction_error(sweep)
    return _only_differentiable(solve, init_state, final_state), error


def _differentiable(solve: Solve, pure_run, pure_step, pure_saves, payload) -> Callable:
    """`(loop constants, inputs) -> final state`, with the sweep for a gradient."""

    def forward(loop_consts__inputs):
        loop_consts, inputs = loop_consts__inputs
        run_all = jax.vmap(pure_run, in_axes=(None, 0)) if solve.lanes else pure_run
        return run_all(loop_consts, inputs.init_state)

    @eqx.filter_custom_vjp
    def differentiable_run(loop_consts__inputs):
        final_state, written = forward(loop_consts__inputs)
        return final_state, written if solve.check else None

    @differentiable_run.def_fwd
    def _forward_rule(perturbed, loop_consts__inputs):
        del perturbed
        final_state, written = forward(loop_consts__inputs)
        return (final_state, written if solve.check else None), (final_state, written)

    @differentiable_run.def_bwd
    def _backward_rule(residuals, ct, perturbed, loop_consts__inputs):
        loop_consts, inputs = loop_consts__inputs
        final_state, written = residuals
        sweep = _make_sweep(solve, pure_step, pure_saves, final_state, written, inputs)
        sweep = replace(sweep, ct_state=ct[0], wrt=perturbed[1])
        if payload is not None:
            sweep = payload.joined(sweep)
        # The loop's own constants are the step's, whose cotangents are among `inputs`.
        out = (jax.tree.map(lambda _: None, loop_consts), sweep())
        return eqxi.nondifferentiable_backward(out, msg=REVERSE_OVER_REVERSE)

    return differentiable_run


def _make_sweep(solve: Solve, pure_step, pure_saves, final_state, written, inputs):
    """A sweep, without cotangents yet."""
    return Sweep(
        solve=solve,
        record=make_record(inputs.init_state, final_state, written),
        pure_step=pure_step,
        pure_saves=pure_saves,
        final_state=final_state,
        ct_state=None,
        inputs=inputs,
        wrt=jax.tree.map(lambda _: False, inputs),
    )


def make_record(init_state: PyTree, final_state: PyTree, written) -> Record:
    """What `run_recording` has written down, with what else the sweep needs."""
    rows, log, at_end = written
    return Record(
        rows=rows,
        log=log,
        tprev0=init_state.tprev,
        tnext0=init_state.tnext,
        made_jump0=init_state.made_jump,
        num_steps=final_state.num_accepted_steps,
        at_end=at_end,
        taken=_steps_taken(init_state),
    )


def _constant(tree: PyTree) -> PyTree:
    stop = lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x
    return jax.tree.map(stop, tree)


def _one_lane(tree: PyTree) -> PyTree:
    struct = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.tree.map(lambda x: struct(x) if eqx.is_array(x) else x, tree)


def run_recording(solve, cond_fun, body_fun, init_state, max_steps, buffers):
    """The loop itself: `(final state, (rows, log, whether it came to its end))`."""
    memory, grid, taken = solve.memory, solve.grid, _steps_taken(init_state)
    logs_origin = isinstance(grid, AdaptiveGrid)
    rows = jax.tree.map(
        lambda x: jnp.zeros((memory.rows, *x.shape), x.dtype),
        _to_store(solve, init_state),
    )
    empty = jnp.zeros(max_steps, init_state.tprev.dtype)
    log = Log(
        ends=empty if solve.stores_times else None,
        starts=empty if solve.jumps else None,
        made_jumps=empty.astype(bool) if solve.jumps else None,
        origins=jnp.zeros(max_steps, grid.origin_dtype) if logs_origin else None,
    )
    origin = jnp.asarray(RATIO, jnp.int32) if logs_origin else None

    def body(carry):
        state, rows, log, origin = carry
        index = state.num_accepted_steps
        row = memory.row_to_write(index, taken, state.tprev, state.made_jump, grid)
        # A rejected attempt is overwritten by the next one.
        rows = put(rows, row, _to_store(solve, state))
        now = Log(
            ends=state.tnext if solve.stores_times else None,
            starts=state.tprev if solve.jumps else None,
            made_jumps=state.made_jump if solve.jumps else None,
            origins=origin.astype(grid.origin_dtype) if logs_origin else None,
        )
        log = put(log, index, now)
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
    return final_state, (rows, log, final_state.tprev >= solve.t1)


def _steps_taken(init_state: PyTree) -> Array:
    """The steps that the solver has taken before this solve, as it counts them."""
    zero = jnp.zeros_like(init_state.num_accepted_steps)
    count = getattr(init_state.solver_state, "steps_taken", zero)
    return count.astype(zero.dtype)


def _to_store(solve: Solve, state: PyTree) -> PyTree[Array]:
    """The arrays to store of the state before a step, if any."""
    if solve.memory.rows == 0:
        return None
    kept = solve.kept(state.solver_state, state.made_jump)
    return eqx.filter(as_arrays((state.y, kept)), eqx.is_array)


def _hoist_parts(solve: Solve, state: PyTree):
    """The step to pull back through and the save functions as pure functions."""
    kept = as_struct(solve.kept(state.solver_state, state.made_jump))
    t, y = as_struct(state.tprev), as_struct(state.y)
    if solve.reversal is None:
        dense = solve.needs_dense_info

        def replay(t0, t1, y, kept):
            y1, kept, info = solve.step.replay(t0, t1, y, kept, dense)
            return y1, as_arrays(kept), info

        step_consts, pure_step = hoist(replay, t, t, y, kept)
        step = replay
    else:
        step_consts, pure_step, step = hoist_reversal(solve, t, y, kept)
    dense_info = None
    if any(save.ts is not None for save in solve.saves):
        _, _, dense_info = eqx.filter_eval_shape(step, t, t, y, kept)
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
