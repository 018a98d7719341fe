"""Walking back through a solve by undoing its steps, instead of remembering them.

The other source of states for the sweep, next to `_replay.py`. The sweep carries the
state after the step that it is about to pull back through, undoes the step, and pulls
back on the way, so that nothing is evaluated twice (`_reversal.py`).

What is stored is the state before every restart, and the start of the solve. There the
state found by walking back is compared with the one stored, and then replaced by it:
the greatest difference, relative to the state, is the *reconstruction error*, which
tells whether the gradient can be trusted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._hoist import as_struct, hoist
from ._magnitude import magnitudes, relative_size, size
from ._reversal import is_regular_restart
from ._tree import add, each, inexact_spec, lent, take, where, zeros_like


# A gradient is refused if the way back misses a known state by more, relatively, ...
_MAX_ERROR = 1e-3
# ... unless that is as little as this many units of rounding of the largest state.
_MAX_ROUNDING = 1e3
# The part of its largest value that a number is taken to have at least.
_USUAL = 0.1

_UNTRUSTED = (
    "Walking back through a solve with `nodegrad.ReversibleAdjoint` missed a state "
    f"that is known by more than a relative {_MAX_ERROR}: rounding has grown on the "
    "way, and the gradient would be wrong. Pass `resync_every=10` or so to the solver, "
    "take fewer steps or a `coupling_parameter` closer to one, or use "
    "`nodegrad.ACAAdjoint()`."
)

_LOST = (
    "The solve whose gradient was asked for ended before `t1`, because its two copies "
    "had come apart. Pass `resync_every=10` or so to the solver; or, for the gradient "
    "of the part that was solved, `throw=False` to the solve."
)


class Restarts(eqx.Module):
    """Where the states before restarts are stored: a row for each.

    First come those of every `every` steps, then those of jumps, of which there is one
    at most between two of the grid's anchors, then a row that nobody reads. The solve
    may continue one of `taken` steps, and may start (`first_jump`) at a jump.
    """

    every: int | None = eqx.field(static=True)
    jumps: int = eqx.field(static=True)
    first_jump: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    @property
    def regular(self) -> int:
        """Rows for the regular restarts."""
        return 0 if self.every is None else (self.max_steps - 1) // self.every + 2

    @property
    def rows(self) -> int:
        """Rows to allocate; none if there are no restarts."""
        rows = self.regular + self.jumps
        return rows + 1 if rows else 0

    def is_restart(self, index, taken, made_jump):
        """Whether step `index` begins with a restart; `False` where none does."""
        restart = is_regular_restart(self.every, index + taken)
        return restart | made_jump if self.jumps or self.first_jump else restart

    def row_to_write(self, index, taken, start, made_jump, grid):
        """Where the state before step `index` is stored, or a row nobody reads."""
        row = jnp.full_like(index, self.rows - 1)
        if self.jumps:
            passed = jnp.sum(grid.anchors <= start, dtype=row.dtype)
            row = jnp.where(made_jump, self.regular + passed, row)
        if self.every is not None:
            regular = (index + taken) // self.every - taken // self.every
            is_regular = is_regular_restart(self.every, index + taken)
            row = jnp.where(is_regular, regular, row)
        return row


class _Walk(eqx.Module):
    """Where the walk is: the state after the next step to undo.

    - `peak`: the largest absolute values met, number by number.
    - `error`: the largest reconstruction error.
    """

    y: PyTree[Array]
    kept: PyTree[Array]
    peak: PyTree[Array]
    error: Array


def walk_back(sweep: Any, carry: Any) -> Any:
    """Pulls `carry` back through every step of a solve, last to first."""
    reversal = sweep.solve.reversal

    def pull_back(index, live, times, walk, carry):
        calls = _Calls(sweep, times)
        args, restart, error = _undo(sweep, calls, index, times, walk)
        step = lambda evaluate, *args: reversal.forward(evaluate, *args, restart)
        linearized = calls.linearize(step, args)
        carry = sweep.pull_back_step(carry, index, live, args, *linearized)
        return args, error, carry

    carry, error = _walk(sweep, pull_back, carry)
    return _trusted(sweep, carry, error)


def reconstruction_error(sweep: Any) -> Array:
    """By how much, relatively, the way back misses known states, at most."""

    def evaluate(part, _, *args):
        call, consts = sweep.pure_step[part], sweep.inputs.step_consts[part]
        if sweep.lanes:
            call = jax.vmap(call, in_axes=(None,) + (0,) * len(args))
        return call(consts, *args)

    def only_undo(index, live, times, walk, carry):
        del live
        args, _, error = _undo(sweep, evaluate, index, times, walk)
        return args, error, carry

    _, error = _walk(sweep, only_undo, None)
    return error


def _walk(sweep, step_back: Callable, carry: Any) -> tuple[Any, Array]:
    """Takes every step back: `(carry, reconstruction error)`."""
    reversal, final = sweep.solve.reversal, sweep.final_state
    num_steps = sweep.record.num_steps
    error = jnp.zeros_like(each(sweep.lanes, size)(_inexact(final.y)))
    peak = zeros_like(magnitudes(_inexact(final.y)))
    walk = _Walk(final.y, reversal.kept(final.solver_state), peak, error)
    if sweep.lanes:
        walk = lent(num_steps == 0, walk)

    def body(index__walk__carry):
        index, walk, carry = index__walk__carry
        live = index >= 0
        at = sweep.idle_at_zero(live, index)
        peak = magnitudes(walk.peak, _inexact(walk.y))
        walk = replace(walk, peak=peak)
        args, error, carry = step_back(at, live, _times(sweep, at), walk, carry)
        error = jnp.maximum(walk.error, jnp.where(live, error, 0))
        _, _, y, kept = args
        if sweep.lanes:
            # A lane that is through stays after its first step, which can be undone.
            y, kept = where(live & (at > 0), (y, kept), (walk.y, walk.kept))
        return index - 1, _Walk(y, kept, peak, error), carry

    init = num_steps - 1, walk, carry
    _, walk, carry = sweep.while_loop(lambda c: c[0] >= 0, body, init)
    return carry, walk.error


def _undo(sweep, evaluate: Callable, index, times: "_Times", walk: _Walk):
    """Undoes step `index`: `(arguments of the step, whether it restarts, error)`."""
    reversal, restarts = sweep.solve.reversal, sweep.solve.memory
    t0, t1, before, made_jump, row = times
    found = reversal.backward(evaluate, t0, t1, before, walk.y, walk.kept)
    restart = restarts.is_restart(index, sweep.record.taken, made_jump)
    is_known, known = (index == 0) | restart, _known(sweep, index, row)
    error = each(sweep.lanes, _relative_error)(
        reversal.untouched(*found), reversal.untouched(*known), walk.peak
    )
    error = jnp.where(is_known, error, 0)
    return (t0, t1, *where(is_known, known, found)), restart, error


class _Calls:
    """The calls of the parts during one step, each evaluated and linearised once."""

    def __init__(self, sweep, times: "_Times"):
        self.sweep = sweep
        self.times = times[:3]
        self.made: dict[tuple[str, str], _Call] = {}

    def __call__(self, part, key, *args):
        if (part, key) not in self.made:
            sweep = self.sweep
            spec = inexact_spec(args)
            if not sweep.wrt_times:
                # Not everything can be differentiated with respect to time.
                is_time = lambda x: any(x is t for t in self.times)
                spec = tuple(
                    False if is_time(x) else s for x, s in zip(args, spec, strict=True)
                )
            pure, consts = sweep.pure_step[part], sweep.inputs.step_consts[part]
            wrt = sweep.wrt.step_consts[part]
            value, pull = sweep.pullback(pure, consts, wrt, args, spec)
            self.made[part, key] = _Call(spec, value, pull)
        return self.made[part, key].value

    def linearize(self, step: Callable, args: PyTree) -> tuple[PyTree, Callable]:
        """`step(evaluate, *args)` and its pullback to the constants and to `args`.

        Besides the calls a step is arithmetic, and it is this that is differentiated
        here: with the values of the calls for inputs and their arguments for outputs.
        """
        order = []

        def ordered(*call):
            order.append(call[:2])
            return self(*call)

        step(ordered, *args)
        spec = self.sweep.step_spec(args)
        wanted, fixed = eqx.partition(args, spec)

        def arithmetic(wanted, values):
            call_args = {}

            def recall(part, key, *part_args):
                call = self.made[part, key]
                call_args[part, key] = eqx.filter(part_args, call.spec)
                return values[part, key]

            out = step(recall, *eqx.combine(wanted, fixed))
            return eqx.filter(out, eqx.is_inexact_array), call_args

        values = {name: call.value for name, call in self.made.items()}
        (outputs, call_args), pull_arithmetic = jax.vjp(arithmetic, wanted, values)

        def pull(cts):
            ct_args, ct_consts = zeros_like(call_args), {}
            # An argument of a call depends on the values of earlier ones only.
            for part, key in reversed(order):
                _, ct_values = pull_arithmetic((cts, ct_args))
                ct_part, ct_args[part, key] = self.made[part, key].pull(
                    ct_values[part, key]
                )
                ct_consts[part] = (
                    add(ct_consts[part], ct_part) if part in ct_consts else ct_part
                )
            ct_wanted, _ = pull_arithmetic((cts, ct_args))
            return ct_consts, ct_wanted

        return outputs, pull


class _Call(NamedTuple):
    """What became of a call: its value and its pullback to the constants and `spec`."""

    spec: PyTree[bool]
    value: PyTree[Array]
    pull: Callable


class _Times(NamedTuple):
    """When a step was, when the step `before` it started, and what it did at first."""

    start: Array
    end: Array
    before: Array
    made_jump: Array
    row: Array


def _times(sweep, index) -> _Times:
    grid, memory = sweep.inputs.grid, sweep.solve.memory

    def read(record, index):
        start, end = record.start(grid, index), record.end(grid, index)
        before = record.start(grid, jnp.maximum(index - 1, 0))
        made_jump = record.made_jump(index)
        row = memory.row_to_write(index, record.taken, start, made_jump, grid)
        return _Times(start, end, before, made_jump, row)

    return each(sweep.lanes, read)(sweep.record, index)


def _known(sweep, index, row):
    """The state stored for step `index`, which may be one that nobody wrote."""
    init = sweep.inputs.init_state
    start = init.y, sweep.solve.reversal.kept(init.solver_state)
    if sweep.solve.memory.rows == 0:
        return start
    stored = each(sweep.lanes, take)(sweep.record.rows, row)
    return where(index == 0, start, stored)


def _inexact(y: PyTree) -> PyTree[Array]:
    return jax.lax.stop_gradient(eqx.filter(y, eqx.is_inexact_array))


def _relative_error(found: PyTree, known: PyTree, peak: PyTree) -> Array:
    """How far `found` is from `known`, relatively, as a whole or number by number."""
    found, known = _inexact(found), _inexact(known)
    error = jax.tree.map(jnp.subtract, found, known)
    unit = jnp.finfo(size(error).dtype).eps
    least = _MAX_ROUNDING / _MAX_ERROR * unit * size(peak)
    overall = size(error) / jnp.maximum(size(known), least)
    # A number that is zero just there is compared with what it is elsewhere.
    usual = magnitudes(known, jax.tree.map(lambda x: _USUAL * x, peak))
    worst = jnp.maximum(overall, relative_size(error, usual))
    return jnp.where(size(error) == 0, 0, worst)


def _trusted(sweep, carry: Any, error: Array) -> Any:
    """`carry`, unless the error is too large: then an exception, or NaNs."""
    bad = ~(error <= _MAX_ERROR)
    if sweep.solve.throw:
        # JAX may have dropped the exception of the solve, if nobody looks at its value.
        lost = sweep.solve.reversal.lost(sweep.final_state.solver_state)
        which = jnp.where(jnp.any(lost), 1, 0)
        failed = jnp.any(bad | lost)
        return eqx.branched_error_if(carry, failed, which, [_UNTRUSTED, _LOST])
    return sweep.nan_where(bad, carry)


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
        none = jnp.array(0)
        restart = solve.memory.is_restart(none, none, jnp.array(False))
        return reversal.forward(evaluate, t0, t1, y0, kept0, restart)

    eqx.filter_eval_shape(step, t, t, y, kept)
    hoisted = {name: hoist(parts[name], *examples[name]) for name in examples}
    consts = {name: consts for name, (consts, _) in hoisted.items()}
    pure = {name: pure for name, (_, pure) in hoisted.items()}
    return consts, pure, step
