r"""Second-order expansions of a loss, and how they change under a map.

With a loss $Q_1(s_1, u)$ known to second order at a point, and a map $s_1 = \Phi(s, u)$
that leads there, $Q(s, u) = Q_1(\Phi(s, u), u)$ is known to second order where the map
came from. With $\lambda, \Lambda$ for the first and second derivatives of $Q_1$ in
$s_1$, the chain rule is

$$Q_{ss} = \Phi_s^\top \Lambda\, \Phi_s + \sum_k \lambda_k\, \partial_{ss} \Phi_k$$

and likewise for the blocks with $u$. Without the second term, this is Gauss-Newton.

The reverse sweep with second derivatives: one expansion pulled through every step.

This is a visitor of a state source, as the gradient is (`gradient.py`). What is
carried from step to step is an `Expansion` of the loss in the state of the solver (the
replay state included) and in the floating point arrays of `args`.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._internal.tree import flatten
from .._reverse.plan import Solve
from .._trajectory.recording import Recording
from .._trajectory.state_source import BackwardStep
from .._trajectory.step_times import StepTimes
from .._trajectory.trajectory import refuse


class Expansion(eqx.Module):
    """First and second derivatives of a loss in the state $s$ and parameters $u$."""

    s: Float[Array, " s"]
    u: Float[Array, " u"]
    ss: Float[Array, "s s"]
    su: Float[Array, "s u"]
    uu: Float[Array, "u u"]

    def of_first(self, size: int) -> tuple[Array, Array]:
        """Gradient and Hessian in the first `size` numbers of $s$ and all of $u$."""
        s, su = slice(None, size), self.su[:size]
        gradient = jnp.concatenate([self.s[s], self.u])
        hessian = jnp.block([[self.ss[s, s], su], [su.T, self.uu]])
        return gradient, hessian


def expand(fn: Callable, s: Array, u: Array) -> Expansion:
    """The expansion of `fn(s, u)`, which returns a scalar."""
    size = len(s)

    def gradient(z):
        out = jax.grad(lambda z: fn(z[:size], z[size:]))(z)
        return out, out

    h, g = jax.jacfwd(gradient, has_aux=True)(jnp.concatenate([s, u]))
    return Expansion(
        g[:size], g[size:], h[:size, :size], h[:size, size:], h[size:, size:]
    )


def pull_back(
    after: Expansion, fn: Callable, s: Array, u: Array, curved: bool
) -> Expansion:
    """The expansion before the map `s1 = fn(s, u)`, from the one after it.

    Without the second derivatives of `fn`, unless `curved`.
    """
    out = _pull_back_curved if curved else _pull_back_flat
    before = out(after, fn, s, u)
    # Not through `fn`: nothing is multiplied by the identity that `u` passes through.
    return eqx.tree_at(
        lambda e: (e.u, e.uu), before, (before.u + after.u, before.uu + after.uu)
    )


def _pull_back_curved(after: Expansion, fn: Callable, s, u) -> Expansion:
    s1 = fn(s, u)

    def model(x, v):
        x1 = fn(x, v)
        ds, du = x1 - s1, v - u
        return after.s @ x1 + ds @ (0.5 * (after.ss @ ds) + after.su @ du)

    return expand(model, s, u)


def _pull_back_flat(after: Expansion, fn: Callable, s, u) -> Expansion:
    jacobian = jax.jacrev if len(s) < len(u) else jax.jacfwd
    by_s, by_u = jacobian(fn, argnums=(0, 1))(s, u)
    crossed = by_u.T @ after.su
    return Expansion(
        s=after.s @ by_s,
        u=after.s @ by_u,
        ss=by_s.T @ after.ss @ by_s,
        su=by_s.T @ (after.ss @ by_u + after.su),
        uu=by_u.T @ after.ss @ by_u + crossed + crossed.T,
    )


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
