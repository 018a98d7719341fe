"""Walking back through a solve by undoing its steps, instead of remembering them.

The other source of states for the sweep, next to `_replay.py`. The sweep carries the
state after the step that it is about to pull back through, undoes the step, and pulls
back on the way, so that nothing is evaluated twice (`_reversal.py`).

What is stored is the state before every restart, and the start of the solve. There the
state found by walking back is compared with the one stored, and then replaced by it:
the greatest difference is the *residual*, which tells whether the gradient can be
trusted.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._coupling_monitor import size
from ._hoist import as_struct, hoist
from ._tree import add, each, inexact_spec, take, where, zeros_like


# A gradient is refused if the way back misses a known state by more, relatively.
_MAX_RESIDUAL = 1e-3

_UNTRUSTED = (
    "Walking back through a solve with `nodegrad.ReversibleAdjoint` missed a state "
    f"that is known by more than a relative {_MAX_RESIDUAL}: rounding has grown on the "
    "way, and the gradient would be wrong. Pass `resync_every=10` or so to the solver, "
    "take fewer steps or a `coupling_parameter` closer to one, or use "
    "`nodegrad.ACAAdjoint()`."
)


class Restarts(eqx.Module):
    """Where the states before restarts are stored: a row for each.

    First come those of every `every` steps, then those of jumps, of which there is one
    at most between two of the grid's anchors, then a row that nobody reads.
    """

    every: int | None = eqx.field(static=True)
    jumps: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @property
    def regular(self) -> int:
        """Rows for the regular restarts."""
        return 0 if self.every is None else (self.max_steps - 1) // self.every

    @property
    def rows(self) -> int:
        """Rows to allocate; none if there are no restarts."""
        rows = self.regular + self.jumps
        return rows + 1 if rows else 0

    def is_restart(self, index, made_jump):
        """Whether step `index` begins with a restart; `False` where none does."""
        restart = False
        if self.every is not None:
            restart = (index % self.every == 0) & (index > 0)
        return restart | made_jump if self.jumps else restart

    def row_to_write(self, index, start, made_jump, grid):
        """Where the state before step `index` is stored, or a row nobody reads."""
        row = jnp.full_like(index, self.rows - 1)
        if self.jumps:
            passed = jnp.sum(grid.anchors <= start, dtype=row.dtype)
            row = jnp.where(made_jump, self.regular + passed, row)
        if self.every is not None:
            regular = (index % self.every == 0) & (index > 0)
            row = jnp.where(regular, index // self.every - 1, row)
        return row


class _Walk(eqx.Module):
    """Where the walk is: the state after the next step to undo, and the residual."""

    y: PyTree[Array]
    kept: PyTree[Array]
    residual: Array


def walk_back(sweep: Any, carry: Any) -> Any:
    """Pulls `carry` back through every step of a solve, last to first."""
    reversal, final = sweep.solve.reversal, sweep.final_state
    # Nothing leads back from a solve that ended because its copies came apart.
    lost = reversal.lost(final.solver_state)
    num_steps = jnp.where(lost, 0, sweep.record.num_steps)
    carry = sweep.map_carry(ft.partial(where, ~lost), add, carry, zeros_like(carry))
    walk = _Walk(
        y=final.y,
        kept=reversal.kept(final.solver_state),
        residual=jnp.zeros_like(final.tprev),
    )
    if sweep.lanes:
        walk = _with_safe_state(walk, num_steps)

    def body(index__walk__carry):
        index, walk, carry = index__walk__carry
        live = index >= 0
        at = sweep.idle_at_zero(live, index)
        residual, args, linearized = _undo(sweep, at, walk)
        carry = sweep.pull_back_step(carry, at, live, args, *linearized)
        residual = jnp.maximum(walk.residual, jnp.where(live, residual, 0))
        _, _, y, kept = args
        if sweep.lanes:
            # A lane that is through stays after its first step, which can be undone.
            y, kept = where(live & (at > 0), (y, kept), (walk.y, walk.kept))
        return index - 1, _Walk(y, kept, residual), carry

    init = num_steps - 1, walk, carry
    _, walk, carry = sweep.while_loop(lambda c: c[0] >= 0, body, init)
    return _trusted(sweep, carry, walk.residual)


def _undo(sweep, index, walk: _Walk):
    """Undoes step `index`: `(residual, its arguments, (outputs, pull))`."""
    reversal, restarts = sweep.solve.reversal, sweep.solve.memory
    consts, wrt = sweep.inputs.step_consts, sweep.wrt.step_consts
    t0, t1, before, made_jump, row = _times(sweep, index)
    memory: dict[tuple[str, str], Any] = {}

    def evaluate(part, key, *args):
        spec = inexact_spec(args)
        pure = sweep.pure_step[part]
        linearized = sweep.pullback(pure, consts[part], wrt[part], args, spec)
        memory[part, key] = linearized
        return linearized[0]

    found = reversal.backward(evaluate, t0, t1, before, walk.y, walk.kept)
    restart = restarts.is_restart(index, made_jump)
    is_known, known = (index == 0) | restart, _known(sweep, index, row)
    residual = jnp.where(is_known, each(sweep.lanes, _residual)(found, known), 0)
    args = (t0, t1, *where(is_known, known, found))

    def forward(consts, *args):
        def recall(part, key, *part_args):
            if (part, key) not in memory:
                call = sweep.pure_step[part]
                if sweep.lanes:
                    call = jax.vmap(call, in_axes=(None,) + (0,) * len(part_args))
                return call(consts[part], *part_args)
            wanted = eqx.filter(consts[part], wrt[part])
            differentiable = eqx.filter(part_args, eqx.is_inexact_array)
            return _recalled(*memory[part, key])(wanted, differentiable)

        return reversal.forward(recall, *args, restart)

    spec = sweep.step_spec(args)
    linearized = sweep.pullback(forward, consts, wrt, args, spec, mapped=False)
    return residual, args, linearized


def _times(sweep, index):
    """`(start, end, start of the step before, whether it jumped, row)` of a step."""
    grid, memory = sweep.inputs.grid, sweep.solve.memory

    def read(record, index):
        start, end = record.start(grid, index), record.end(grid, index)
        before = record.start(grid, jnp.maximum(index - 1, 0))
        made_jump = record.made_jump(grid, index)
        row = memory.row_to_write(index, start, made_jump, grid)
        return start, end, before, made_jump, row

    return each(sweep.lanes, read)(sweep.record, index)


def _known(sweep, index, row):
    """The state stored for step `index`, which may be one that nobody wrote."""
    init = sweep.inputs.init_state
    start = init.y, sweep.solve.reversal.kept(init.solver_state)
    if sweep.solve.memory.rows == 0:
        return start
    stored = each(sweep.lanes, take)(sweep.record.rows, row)
    return where(index == 0, start, stored)


def _residual(found: PyTree, known: PyTree) -> Array:
    """How far `found` is from `known`, relatively."""
    found, known = jax.lax.stop_gradient((found, known))
    found, known = (eqx.filter(x, eqx.is_inexact_array) for x in (found, known))
    error = size(jax.tree.map(jnp.subtract, found, known))
    return jnp.where(error == 0, 0, error / size(known))


def _recalled(value: PyTree, pull: Callable) -> Callable:
    """A function of anything whose value and pullback are these."""

    @jax.custom_vjp
    def recalled(consts, args):
        del consts, args
        return value

    # Not by a call of `recalled`: forward mode could not pass that.
    recalled.defvjp(lambda *_: (value, None), lambda _, ct: pull(ct))
    return recalled


def _with_safe_state(walk: _Walk, num_steps: Array) -> _Walk:
    """`walk`, in which lanes that made no step have the state of one that did.

    They only ride along, see `Record.with_safe_first_step`.
    """
    none = num_steps == 0
    donor = jnp.argmax(~none)
    patch = lambda x: where(none, jnp.broadcast_to(x[donor], x.shape), x)
    return jax.tree.map(patch, walk)


def _trusted(sweep, carry: Any, residual: Array) -> Any:
    """`carry`, unless the residual is too large: then an error, or NaNs."""
    bad = ~(residual <= _MAX_RESIDUAL)
    if sweep.solve.throw:
        return eqx.error_if(carry, bad, _UNTRUSTED)
    nan = lambda x: x * jnp.nan if eqx.is_inexact_array(x) else x
    per_lane = lambda x: where(bad, nan(x), x)
    shared = lambda x: where(jnp.any(bad), nan(x), x)
    return sweep.map_carry(per_lane, shared, carry)


def hoist_reversal(solve: Any, t, y, kept) -> tuple[Any, Any, Callable]:
    """The parts of the reversal as pure functions.

    `(constants, functions, step)`: the first two by name, the last a function of
    `(t0, t1, y, kept)` that makes a whole step.
    """
    reversal = solve.reversal
    parts, examples = reversal.parts(), {}

    def evaluate(part, key, *args):
        del key
        examples[part] = as_struct(args)
        return parts[part](*args)

    def step(t0, t1, y0, kept0):
        restart = solve.memory.is_restart(jnp.array(0), jnp.array(False))
        return reversal.forward(evaluate, t0, t1, y0, kept0, restart)

    eqx.filter_eval_shape(step, t, t, y, kept)
    hoisted = {name: hoist(parts[name], *examples[name]) for name in examples}
    consts = {name: consts for name, (consts, _) in hoisted.items()}
    pure = {name: pure for name, (_, pure) in hoisted.items()}
    return consts, pure, step
