"""The reverse sweep with second derivatives: one expansion pulled through every step.

This is a visitor of a state source, as the gradient is (`_gradient.py`). What is
carried from step to step is an `Expansion` of the loss in the state of the solver (the
replay state included) and in the floating point arrays of `args`.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._expansion import expand, Expansion, pull_back
from ._grid import StepTimes
from ._plan import Solve
from ._recording import Recording
from ._state_source import BackwardStep
from ._trajectory import refuse
from ._tree import flatten


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
        node = node.astype(self.nodes.dtype)
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


class ExpansionVisitor(eqx.Module):
    """Pulls the expansion of a loss back through every step of one solve.

    - `recording`, `init_state`: the solve, and its loop state before the first step.
    - `u`, `solve_at`: the parameters, and the solve to be differentiated as a function
      of them. It has the values of the recorded one, not necessarily all of its
      derivatives.
    - `curved`: whether second derivatives of its steps count.
    """

    recording: Recording
    init_state: PyTree
    u: Array
    solve_at: Callable[[Array], Solve] = eqx.field(static=True)
    curved: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __call__(self, terminal: Callable, ts: Array | None) -> Carry:
        """The expansion at the start of the solve, and along `ts`.

        `terminal` is the loss as a function of the final `y`.
        """
        trajectory, grid = self.recording.trajectory, self.recording.inputs.grid
        state = trajectory.y, trajectory.replay_state
        s, unravel = flatten(state, self.u.dtype)
        expansion = expand(lambda s, _: terminal(unravel(s)[0]), s, self.u)
        rows = None
        if ts is not None:
            last = trajectory.num_steps
            end = jax.vmap(lambda index: trajectory.end(grid, index))
            times = end(jnp.arange(self.max_steps + 1) - 1)
            rows = Rows.init(ts, times, last, expansion, s).write(last, expansion, s)
        states, steps = self.recording.plan.states, self.recording.steps
        carry = Carry(expansion, rows)
        carry, error = states.walk(steps, self.visit, carry, linearizes=False)
        carry = states.guarded(carry, steps, error, True, _nan_where)
        carry = _nan_where(refuse(trajectory.is_cut, True), carry)
        y0, _ = flatten(self.init_state.y, self.u.dtype)
        expansion = pull_back(carry.expansion, self._start, y0, self.u, self.curved)
        return replace(carry, expansion=expansion)

    def visit(self, carry: Carry, step: BackwardStep) -> Carry:
        """The expansion before a step, from the one after it."""
        s, unravel = flatten((step.y, step.replay_state), self.u.dtype)
        again = lambda s, u: self._step(step.times, unravel(s), u)
        expansion = pull_back(carry.expansion, again, s, self.u, self.curved)
        rows = carry.rows
        if rows is not None:
            rows = rows.write(step.index, expansion, s)
        return Carry(expansion, rows)

    def _step(self, times: StepTimes, state: PyTree, u: Array) -> Array:
        """The state after a step."""
        states, (y, replay_state) = self.solve_at(u).states, state
        parts = states.parts()
        evaluate = lambda part, _, *args: parts[part](*args)
        y1, replay_state1, _ = states.step(
            evaluate, times, times.start, times.end, y, replay_state
        )
        return flatten((y1, replay_state1), u.dtype)[0]

    def _start(self, y0: Array, u: Array) -> Array:
        """The state before the first step."""
        solve, state = self.solve_at(u), self.init_state
        _, unravel = flatten(state.y, u.dtype)
        y0 = unravel(y0)
        solver_state = solve.step.start(state.tprev, state.tnext, y0)
        replay_state = solve.states.replay_state(solver_state, state.made_jump)
        return flatten((y0, replay_state), u.dtype)[0]


def _nan_where(failed: Array, carry: Carry) -> Carry:
    nan = lambda x: jnp.where(failed, jnp.nan, x) if eqx.is_inexact_array(x) else x
    return jax.tree.map(nan, carry)
