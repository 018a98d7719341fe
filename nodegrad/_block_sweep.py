"""The reverse sweep with second derivatives: one expansion pulled through every step.

The states come from where the first-order sweep has them from: `_replay.py` for stored
ones, `_inversion.py` for ones that are reconstructed. What is carried from step to step
is an `Expansion` of the loss in the state of the solver (what it keeps besides $y$
included) and in the floating point arrays of `args`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._inversion import walk_back
from ._log import Record
from ._quadratic import expand, Expansion, pull_back
from ._record import Solve
from ._replay import replay_back
from ._sweep import SweepInputs
from ._tree import as_arrays, flatten


class Rows(eqx.Module):
    """The expansion at each of some times, and the state there.

    A time belongs to a *node* of the grid: node `i` is where step `i` starts, and the
    last one is where the last step ends.

    - `nodes`: that of each time; they ascend.
    - `missed`: whether no node is at some time.
    """

    nodes: Array
    missed: Array
    expansion: PyTree[Array]
    state: PyTree[Array]

    @classmethod
    def init(cls, ts: Array, times: Array, last, expansion: Expansion, state: Array):
        """Rows of zeros for expansions and states like these.

        `times` are those of the nodes, of which number `last` is the last.
        """
        times = jnp.where(jnp.arange(len(times)) <= last, times, jnp.inf)
        right = jnp.minimum(jnp.maximum(jnp.searchsorted(times, ts), 1), last)
        left = jnp.maximum(right - 1, 0)
        is_left = ts - times[left] <= times[right] - ts
        nodes = jnp.where(is_left, left, right)
        # Times may be off by rounding.
        unit = jnp.finfo(ts.dtype).eps * jnp.max(jnp.abs(ts))
        allowed = jnp.minimum(100 * unit, 0.01 * (times[right] - times[left]))
        missed = ~jnp.all(jnp.abs(times[nodes] - ts) <= allowed)
        empty = lambda x: jnp.zeros((len(ts), *x.shape), x.dtype)
        return cls(nodes, missed, *jax.tree.map(empty, (expansion, state)))

    def write(self, node, expansion: Expansion, state: Array) -> "Rows":
        """With the row of the first time at `node`, if there is one."""
        row = jnp.searchsorted(self.nodes, node)
        is_here = self.nodes.at[row].get(mode="fill", fill_value=-1) == node
        row = jnp.where(is_here, row, len(self.nodes))
        set_row = lambda rows, x: rows.at[row].set(x, mode="drop")
        old = self.expansion, self.state
        expansion, state = jax.tree.map(set_row, old, (expansion, state))
        return replace(self, expansion=expansion, state=state)

    def finished(self, successful) -> "Rows":
        """With the rows of all times; raises if one is missed, but for a failure."""
        first = jnp.searchsorted(self.nodes, self.nodes)
        rows = self.expansion, self.state
        expansion, state = jax.tree.map(lambda x: x[first], rows)
        rows = replace(self, expansion=expansion, state=state)
        msg = (
            "The `ts` of `nodegrad.hessian_blocks` must be ends of steps, and no step "
            "ended at one of them. Pass `stepsize_controller=diffrax.StepTo(...)` with "
            "all of them among its times."
        )
        return eqx.error_if(rows, successful & self.missed, msg)


class Carry(eqx.Module):
    """What the sweep carries from step to step."""

    expansion: Expansion
    rows: Rows | None


class BlockSweep(eqx.Module):
    """A recorded solve, ready to be swept back through with second derivatives.

    It stands in for `_sweep.Sweep` where states are replayed or reconstructed.

    - `solve`, `record`, `init_state`, `final_state`: what was solved, and what the
      forward pass wrote down of it.
    - `u`, `solve_at`: the parameters, and the solve to be differentiated as a function
      of them. It has the values of `solve`, not necessarily all of its derivatives.
    - `curved`: whether second derivatives of its steps count.
    """

    solve: Solve
    record: Record
    init_state: PyTree
    final_state: PyTree
    u: Array
    solve_at: Callable[[Array], Solve] = eqx.field(static=True)
    curved: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    lanes: ClassVar[bool] = False
    wrt_times: ClassVar[bool] = False

    def __call__(self, terminal: Callable, ts: Array | None) -> Carry:
        """The expansion at the start of the solve, and along `ts`.

        `terminal` is the loss as a function of the final `y`.
        """
        state = self.final_state
        kept = self.solve.kept(state.solver_state, state.made_jump)
        s, unravel = flatten((state.y, kept), self.u.dtype)
        expansion = expand(lambda s, _: terminal(unravel(s)[0]), s, self.u)
        rows = None
        if ts is not None:
            last, grid = self.record.num_steps, self.solve.grid
            end = jax.vmap(lambda index: self.record.end(grid, index))
            times = end(jnp.arange(self.max_steps + 1) - 1)
            rows = Rows.init(ts, times, last, expansion, s).write(last, expansion, s)
        walk = replay_back if self.solve.reversal is None else walk_back
        carry = walk(self, Carry(expansion, rows))
        y0, _ = flatten(self.init_state.y, self.u.dtype)
        expansion = pull_back(carry.expansion, self._start, y0, self.u, self.curved)
        return replace(carry, expansion=expansion)

    def pull_back_step(self, carry: Carry, index, live, args, outputs, pull) -> Carry:
        """The expansion before step `index`, from the one after it."""
        del live, outputs, pull
        start, end, y, kept = args
        s, unravel = flatten((y, kept), self.u.dtype)
        step = lambda s, u: self._step(index, start, end, unravel(s), u)
        expansion = pull_back(carry.expansion, step, s, self.u, self.curved)
        rows = carry.rows
        if rows is not None:
            rows = rows.write(index, expansion, s)
        return Carry(expansion, rows)

    def _step(self, index, t0, t1, state, u) -> Array:
        """The state after step `index`."""
        solve, (y, kept) = self.solve_at(u), state
        if solve.reversal is None:
            y1, kept1, _ = solve.step.replay(t0, t1, y, kept, False)
        else:
            made_jump = self.record.made_jump(index)
            memory: Any = self.solve.memory
            restart = memory.is_restart(index, self.record.taken, made_jump)
            parts = solve.reversal.parts()
            evaluate = lambda part, _, *args: parts[part](*args)
            forward: Any = solve.reversal.forward
            y1, kept1, _ = forward(evaluate, t0, t1, y, kept, restart)
        return flatten((y1, kept1), u.dtype)[0]

    def _start(self, y0, u) -> Array:
        """The state before the first step."""
        solve, state = self.solve_at(u), self.init_state
        _, unravel = flatten(state.y, u.dtype)
        y0 = unravel(y0)
        solver_state = solve.step.start(state.tprev, state.tnext, y0)
        kept = solve.kept(solver_state, state.made_jump)
        return flatten((y0, kept), u.dtype)[0]

    # What `_replay.py` and `_inversion.py` ask of a sweep.

    @property
    def pure_step(self) -> Any:
        """The step, or its parts, with nothing split off that it closes over."""
        pure = lambda fn: lambda _, *args: as_arrays(fn(*args))
        if self.solve.reversal is None:
            replay = self.solve.step.replay
            return pure(lambda t0, t1, y, kept: replay(t0, t1, y, kept, False))
        return {name: pure(fn) for name, fn in self.solve.reversal.parts().items()}

    @property
    def inputs(self) -> SweepInputs:
        """The start and the grid, and no constants."""
        parts = () if self.solve.reversal is None else self.solve.reversal.parts()
        consts: Any = {name: [] for name in parts}
        return SweepInputs(
            init_state=self.init_state,
            step_consts=consts,
            save_consts=[],
            grid=self.solve.grid,
            ts=[],
        )

    @property
    def wrt(self) -> SweepInputs:
        """Nothing is differentiated by pullbacks."""
        return self.inputs

    def pullback(self, pure, consts, wrt_consts, args, spec):
        """`pure(consts, *args)`, and no pullback: `pull_back_step` needs none."""
        del wrt_consts, spec
        return pure(consts, *args), None

    def step_spec(self, args) -> PyTree:
        """Nothing is differentiated by pullbacks."""
        return jax.tree.map(lambda _: False, args)

    def while_loop(self, is_live, body, init, buffers=None):
        """The loop of the sweep."""
        return eqxi.while_loop(is_live, body, init, buffers=buffers, kind="lax")

    def idle_at_zero(self, live, index):
        """`index`: the only lane is never idle."""
        del live
        return index
