r"""Second-order expansions of a loss, pulled back through the steps of a solve.

Let $s_1 = \Phi(s, u)$ be a step, with the state $s$ and the parameters $u$, and
$Q_1(s_1, u)$ the loss as a function of the state after it. Then
$Q(s, u) = Q_1(\Phi(s, u), u)$ is the loss as a function of the state before it. With
$\lambda, \Lambda$ for the first and second derivatives of $Q_1$ in $s_1$, the chain
rule gives

$$Q_{ss} = \Phi_s^\top \Lambda\, \Phi_s + \sum_k \lambda_k\, \partial_{ss} \Phi_k$$

and likewise for the blocks with $u$. Without the second term, this is Gauss-Newton.

`ExpansionVisitor` is a visitor of a state source, as the gradient is (`gradient.py`).
It carries an `Expansion` of the loss from step to step. The state is `y` and the replay
state of the solver, and the parameters are the floating point arrays of `args`, each
flattened to a vector.
"""

import functools as ft
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from .._internal.batch import Axes
from .._internal.closure_convert import as_struct
from .._internal.tree import filled_like, flatten, inexact_spec
from .._reverse.plan import Solve
from .._steps.increment import closure_convert_part
from .._trajectory.linearized_calls import LinearizedCalls
from .._trajectory.recording import Recording
from .._trajectory.state_source import BackwardStep, closure_convert_parts
from .._trajectory.step_times import StepTimes
from .._trajectory.trajectory import refuse


class Expansion(eqx.Module):
    """The first and second derivatives of a loss in the state $s$ and parameters $u$.

    Along `ts` every array has a leading axis for the times.
    """

    s: Float[Array, " s"]
    u: Float[Array, " u"]
    ss: Float[Array, "s s"]
    su: Float[Array, "s u"]
    uu: Float[Array, "u u"]

    def of_first(self, size: int) -> tuple[Float[Array, " z"], Float[Array, "z z"]]:
        """Returns gradient and Hessian in the first `size` numbers of $s$ and in $u$.

        Here `z = size + len(u)`: the state first, the parameters after it.
        """
        s, su = slice(None, size), self.su[:size]
        gradient = jnp.concatenate([self.s[s], self.u])
        hessian = jnp.block([[self.ss[s, s], su], [su.T, self.uu]])
        return gradient, hessian


def expand(
    fn: Callable[[Array, Array], Array], s: Float[Array, " s"], u: Float[Array, " u"]
) -> Expansion:
    """Returns the expansion of `fn(s, u)`, which is a scalar."""
    return _of_gradient(jax.grad(fn, argnums=(0, 1)), s, u)


def _of_gradient(
    gradient: Callable[[Array, Array], tuple[Array, Array]],
    s: Float[Array, " s"],
    u: Float[Array, " u"],
) -> Expansion:
    """Returns the expansion with this gradient in `s` and `u`."""
    size = len(s)

    def twice(z: Float[Array, " z"]) -> tuple[Array, Array]:
        # `jacfwd` differentiates the first, and returns the second as it is.
        out = jnp.concatenate(gradient(z[:size], z[size:]))
        return out, out

    h, g = jax.jacfwd(twice, has_aux=True)(jnp.concatenate([s, u]))
    return Expansion(
        g[:size], g[size:], h[:size, :size], h[:size, size:], h[size:, size:]
    )


def pull_back(
    after: Expansion,
    fn: Callable[[Array, Array], Array],
    s: Float[Array, " s"],
    u: Float[Array, " u"],
    curved: bool,
    linearize: Callable[[Array, Array], tuple[Array, Callable]] | None = None,
) -> Expansion:
    """Returns the expansion before the map `s1 = fn(s, u)`, from the one after it.

    The second derivatives of `fn` are included if `curved`. `linearize(s, u)` returns
    the value of `fn` and its pullback; `jax.vjp` does so by default.
    """
    linearize = ft.partial(jax.vjp, fn) if linearize is None else linearize
    if curved:
        before = _pull_back_curved(after, linearize, s, u)
    else:
        before = _pull_back_flat(after, fn, linearize, s, u)
    # The loss also depends on `u` directly. The derivative of `u` by itself is the
    # identity, so these blocks are added without any product of matrices.
    return eqx.tree_at(
        lambda e: (e.u, e.uu), before, (before.u + after.u, before.uu + after.uu)
    )


def _pull_back_curved(
    after: Expansion,
    linearize: Callable[[Array, Array], tuple[Array, Callable]],
    s: Float[Array, " s"],
    u: Float[Array, " u"],
) -> Expansion:
    """Returns the blocks through a map, with its second derivatives."""

    def gradient(x: Float[Array, " s"], v: Float[Array, " u"]) -> tuple[Array, Array]:
        # Of a quadratic function with the derivatives of the loss after the map,
        # without those by `u` alone.
        x1, pull = linearize(x, v)
        ds, du = _change(x1), v - u
        by_s, by_u = pull(after.s + after.ss @ ds + after.su @ du)
        return by_s, by_u + ds @ after.su

    return _of_gradient(gradient, s, u)


@jax.custom_jvp
def _change(x: Array) -> Array:
    """Returns `x` minus its value: zero, with the derivative of `x`.

    That is so in the innermost derivative. In one around it the result is constant, as
    the value moves with `x`.
    """
    return jnp.zeros_like(x)


@_change.defjvp
def _jvp_change(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jnp.zeros_like(primals[0]), tangents[0]


def _pull_back_flat(
    after: Expansion,
    fn: Callable[[Array, Array], Array],
    linearize: Callable[[Array, Array], tuple[Array, Callable]],
    s: Float[Array, " s"],
    u: Float[Array, " u"],
) -> Expansion:
    """Returns the blocks through `fn`, as if `fn` were affine (Gauss-Newton)."""
    # `len(after.s)` pullbacks, or `len(s) + len(u)` pushforwards, which are cheaper:
    # nothing has to be stored for a transposition.
    if len(s) < len(u):
        by_s, by_u = jax.vmap(linearize(s, u)[1])(jnp.eye(len(after.s), dtype=s.dtype))
    else:
        by_s, by_u = jax.jacfwd(fn, argnums=(0, 1))(s, u)
    crossed = by_u.T @ after.su
    return Expansion(
        s=after.s @ by_s,
        u=after.s @ by_u,
        ss=by_s.T @ after.ss @ by_s,
        su=by_s.T @ (after.ss @ by_u + after.su),
        uu=by_u.T @ after.ss @ by_u + crossed + crossed.T,
    )


class Rows(eqx.Module):
    """The expansions and the states at the times `ts`, one row for each time.

    A time belongs to a *node* of the grid: node `i` is the start of step `i`, and the
    last node is the end of the last step.

    - `nodes`: the nearest node of each time, in ascending order.
    - `missed`: whether any time is not at a node.
    - `expansion`, `state`: arrays with a leading axis for the times.
    """

    nodes: Int[Array, " times"]
    missed: Bool[Array, ""]
    # An `Expansion` and a vector, each with one more axis.
    expansion: PyTree[Array]
    state: PyTree[Array]

    @classmethod
    def init(
        cls,
        ts: Real[Array, " times"],
        times: Real[Array, " nodes"],
        last: Int[Array, ""],
        expansion: Expansion,
        state: Float[Array, " s"],
    ) -> "Rows":
        """Returns rows of zeros, in the shapes of `expansion` and `state`.

        `times` are the times of the nodes; the solve has nodes 0 to `last`.
        """
        # Find the nearest node. Those after `last` hold no times of this solve.
        times = jnp.where(jnp.arange(len(times)) <= last, times, jnp.inf)
        right = jnp.minimum(jnp.maximum(jnp.searchsorted(times, ts), 1), last)
        left = jnp.maximum(right - 1, 0)
        is_left = ts - times[left] <= times[right] - ts
        nodes = jnp.where(is_left, left, right)
        # A step may miss its time by rounding errors. An error of up to 100 units of
        # rounding is allowed, but only a small part of the step, so that a time inside
        # a very short step is not taken for its end.
        unit = jnp.finfo(ts.dtype).eps * jnp.max(jnp.abs(ts))
        allowed = jnp.minimum(100 * unit, 0.01 * (times[right] - times[left]))
        missed = ~jnp.all(jnp.abs(times[nodes] - ts) <= allowed)
        empty = lambda x: jnp.zeros((len(ts), *x.shape), x.dtype)
        return cls(nodes, missed, *jax.tree.map(empty, (expansion, state)))

    def write(
        self, node: Int[Array, ""], expansion: Expansion, state: Float[Array, " s"]
    ) -> "Rows":
        """Returns these rows with that of the first time at `node`, if there is one."""
        node = node.astype(self.nodes.dtype)
        row = jnp.searchsorted(self.nodes, node)
        is_here = self.nodes.at[row].get(mode="fill", fill_value=-1) == node
        # A row after the last one is dropped.
        row = jnp.where(is_here, row, len(self.nodes))
        set_row = lambda rows, x: rows.at[row].set(x, mode="drop")
        old = self.expansion, self.state
        expansion, state = jax.tree.map(set_row, old, (expansion, state))
        return replace(self, expansion=expansion, state=state)

    def finished(self, successful: Bool[Array, ""]) -> "Rows":
        """Returns these rows with equal rows for equal times.

        Raises an error if a time is not at a node, unless the solve failed: then it may
        have ended before that time.
        """
        # `write` has written the first row of each node only.
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
    """What the sweep carries from step to step; `rows` is `None` without `ts`."""

    expansion: Expansion
    rows: Rows | None


class ExpansionVisitor(eqx.Module):
    """Pulls the expansion of a loss back through every step of one solve.

    - `recording`, `init_state`: the solve, and its loop state before the first step.
    - `u`: the parameters.
    - `solve_at`: the solve to differentiate, as a function of the parameters. At `u` it
      has the values of the recorded one, but it may have other second derivatives.
    - `curved`: whether to include the second derivatives of its steps.
    """

    recording: Recording
    init_state: PyTree
    u: Float[Array, " u"]
    solve_at: Callable[[Array], Solve] = eqx.field(static=True)
    curved: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __call__(
        self, terminal: Callable[[PyTree], Array], ts: Real[Array, " times"] | None
    ) -> Carry:
        """Returns the expansion at the start of the solve, and along `ts`.

        `terminal` is the loss as a function of the final `y`.
        """
        # Expand the loss at the end of the solve.
        trajectory, clock = self.recording.trajectory, self.recording.inputs.clock
        state = trajectory.y, trajectory.replay_state
        s, unravel = flatten(state, self.u.dtype)
        expansion = expand(lambda s, _: terminal(unravel(s)[0]), s, self.u)
        rows = None
        if ts is not None:
            last = trajectory.num_steps
            end = jax.vmap(lambda index: trajectory.end(clock, index))
            # Step -1 ends at the start of the solve, which is node 0.
            times = end(jnp.arange(self.max_steps + 1) - 1)
            rows = Rows.init(ts, times, last, expansion, s).write(last, expansion, s)

        # Visit the steps. It is an error if a reconstructed state was not exact, or if
        # there were more steps than could be recorded.
        states, steps = self.recording.plan.states, self.recording.steps
        carry = Carry(expansion, rows)
        carry, error = states.walk(steps, self.visit, carry, linearizes=False)
        carry = states.guarded(carry, steps, error, True, _nan_where)
        carry = _nan_where(refuse(trajectory.is_cut, True), carry)

        # The replay state before the first step is a function of `y0` and `u`.
        y0, _ = flatten(self.init_state.y, self.u.dtype)
        expansion = pull_back(carry.expansion, self._start, y0, self.u, self.curved)
        return replace(carry, expansion=expansion)

    def visit(self, carry: Carry, step: BackwardStep) -> Carry:
        """Returns the expansion before a step, from the one after it."""
        s, unravel = flatten((step.y, step.replay_state), self.u.dtype)
        again = lambda s, u: self._step(step.times, unravel(s), u)
        linearize = lambda s, u: self._linearize(step.times, unravel, s, u)
        expansion = pull_back(carry.expansion, again, s, self.u, self.curved, linearize)
        rows = carry.rows
        if rows is not None:
            rows = rows.write(step.index, expansion, s)
        return Carry(expansion, rows)

    def _step(
        self, times: StepTimes, state: PyTree, u: Float[Array, " u"]
    ) -> Float[Array, " s"]:
        """Returns the state after a step, from the state before it and `u`."""
        states, (y, replay_state) = self.solve_at(u).states, state
        parts = states.parts()

        def evaluate(part: str, key: str, *args: Any) -> Any:
            # No call is shared with another one: the key is not needed.
            del key
            # The converted form of an increment loops over the stages where that pays:
            # second derivatives of unrolled stages take long to compile.
            consts, pure = closure_convert_part(parts[part], *args)
            return pure(consts, *args)

        y1, replay_state1, _ = states.step(
            evaluate, times, times.start, times.end, y, replay_state
        )
        return flatten((y1, replay_state1), u.dtype)[0]

    def _linearize(
        self,
        times: StepTimes,
        unravel: Callable[[Array], PyTree],
        s: Float[Array, " s"],
        u: Float[Array, " u"],
    ) -> tuple[Float[Array, " s"], Callable]:
        """Returns the state after a step and its pullback, as `jax.vjp` of `_step`.

        The pullback of the increment is the one that a gradient uses. That of JAX would
        store the intermediate values of all stages.
        """
        states, parts = self.solve_at(u).states, {}
        y, replay_state = unravel(s)
        shapes = as_struct((times.start, y, replay_state))

        def constants(u: Float[Array, " u"]) -> tuple[PyTree[Array], PyTree[Array]]:
            nonlocal parts
            source = self.solve_at(u).states
            consts, parts, _ = closure_convert_parts(source, *shapes)
            return eqx.partition(consts, eqx.is_inexact_array)

        moving, pull_constants, fixed = jax.vjp(constants, u, has_aux=True)
        consts = eqx.combine(moving, fixed)
        steps = replace(
            self.recording.steps,
            parts=parts,
            constants=consts,
            axes=jax.tree.map(lambda _: Axes(()), consts),
            wrt=inexact_spec(consts),
        )

        def step(evaluate: Callable, *args: Any) -> tuple[PyTree, PyTree]:
            return states.step(evaluate, times, *args)[:2]

        args = times.start, times.end, y, replay_state
        after, pull = LinearizedCalls(steps, times).linearize(step, args)
        s1, flat = flatten(after, u.dtype)

        def pull_back(ct: Float[Array, " s"]) -> tuple[Array, Array]:
            ct_constants, ct_args = pull(eqx.filter(flat(ct), eqx.is_inexact_array))
            (ct_u,) = pull_constants(filled_like(ct_constants, moving))
            return flatten(ct_args[2:], u.dtype)[0], ct_u

        return s1, pull_back

    def _start(
        self, y0: Float[Array, " y"], u: Float[Array, " u"]
    ) -> Float[Array, " s"]:
        """Returns the state before the first step, from `y0` and `u`."""
        solve, state = self.solve_at(u), self.init_state
        _, unravel = flatten(state.y, u.dtype)
        y0 = unravel(y0)
        solver_state = solve.step.start(state.tprev, state.tnext, y0)
        replay_state = solve.states.replay_state(solver_state, state.made_jump)
        return flatten((y0, replay_state), u.dtype)[0]


def _nan_where(failed: Bool[Array, ""], carry: Carry) -> Carry:
    """Returns `carry`, or NaNs in its place if `failed`."""
    nan = lambda x: jnp.where(failed, jnp.nan, x) if eqx.is_inexact_array(x) else x
    return jax.tree.map(nan, carry)
