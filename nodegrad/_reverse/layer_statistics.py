r"""Statistics of the layers inside a solve, collected by its sweep.

A layer that is used in the vector field is used in every stage of every step. The
stages are no sample of anything: their cotangents carry the weights of the method,
which differ from method to method and may be negative. What has a limit are the inputs
$a(t)$ of the layer along the solution and the gradients
$g(t) = (\partial F / \partial h)^\top \lambda(t)$ with respect to its outputs $h$,
where $\lambda(t)$ is the cotangent of the state. So, while the sweep walks back, the
vector field is evaluated once more at both ends of every step with the cotangent that
the state has there, and integrals over time are sums with the weights of the
trapezoidal rule. That is the only place where a solve makes statistics: the gradient
visits its steps with them. (What jumps inside a step, because the step saved something
there, is taken to jump at its end.)

Nothing of this exists in a solve whose vector field has no `layer_product`, nor where
the probes are not differentiated.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.batch import Axes
from .._internal.closure_convert import as_struct, closure_convert, Pure
from .._internal.compat import is_sde
from .._internal.tree import add, zeros_like
from .._layers.find_products import find_products, has_products, Slots
from .._layers.layer_product import Use
from .._trajectory.recording import Recording
from .._trajectory.state_source import BackwardStep, Part


class NodeStatistics(eqx.Module):
    """Collects statistics at the ends of steps, for the gradient.

    - `field`: the vector field, a function of `(step start, step end, t, y)`.
    - `replay_state`: the part of the solver state that a replay needs, of `(t, t1, y)`.
    - `slots`: the probes among the constants of `field`.
    - `probes_of_step`: which constants of the sweep's steps are probes.
    """

    field: Pure = eqx.field(static=True)
    replay_state: Pure = eqx.field(static=True)
    slots: tuple[Slots, ...] = eqx.field(static=True)
    probes_of_step: PyTree[bool] = eqx.field(static=True)
    reduction: str = eqx.field(static=True)

    def joined(self, recording: Recording) -> tuple[Recording, Any]:
        """`recording` without statistics of stages, and this if it is wanted.

        It is wanted if a probe is differentiated.
        """
        wrt_field, _ = recording.wrt.statistics
        is_wanted = any(wrt_field[slot] for slots in self.slots for slot in slots)
        but_not = lambda w, is_probe: w and not is_probe
        constants = jax.tree.map(but_not, recording.wrt.constants, self.probes_of_step)
        wrt = replace(recording.wrt, constants=constants)
        return replace(recording, wrt=wrt), self if is_wanted else None

    @property
    def _collected(self) -> slice:
        """Which statistics the sweep carries."""
        # Of a sum over time only the sum is squared.
        return slice(3, 6) if self.reduction == "reduce" else slice(1, 4)

    def initial(self, recording: Recording) -> list[list[Array]]:
        """No statistics yet."""
        consts, _ = recording.inputs.statistics
        axes, _ = recording.axes.statistics
        batch = recording.batch

        def zero(slot):
            zeros = jnp.zeros_like(consts[slot])
            if self.reduction == "reduce":
                # One for every solve: their products are summed, not they.
                zeros = batch.expand(zeros, axes[slot], batch.all_axes)
            return zeros

        return [[zero(slot) for slot in slots[self._collected]] for slots in self.slots]

    def visit(
        self,
        recording: Recording,
        total: list[list[Array]],
        step: BackwardStep,
        y1: PyTree,
        cts_start: PyTree,
        cts_end: PyTree,
    ) -> list[list[Array]]:
        """`total` with the statistics of the two ends of a step.

        `cts_start` and `cts_end` are the cotangents of `(y, replay state)` at the ends.
        """
        start, end = step.times.start, step.times.end
        y1 = eqx.combine(y1, step.y)
        both = lambda a, b: jax.tree.map(lambda a, b: jnp.stack([a, b]), a, b)
        # The two ends are one more axis, in front of those of the batch.
        nodes = both((start, step.y, cts_start), (end, y1, cts_end))
        over_nodes = lambda fn, *axes: jax.vmap(recording.batch.map(fn), in_axes=axes)
        ct_y = self._whole_cotangents(recording, nodes, end)
        size = end - start
        weight = jnp.where(step.active, size / 2, 0)
        if self.reduction == "expand":
            weight = jnp.where(step.active, jnp.full_like(size, 0.5), 0)
            ct_y = over_nodes(_scaled, 0, None)(ct_y, size)
        t, y, _ = nodes
        weight = over_nodes(_of_use, None, 0)(weight, ct_y)
        values, axes = recording.inputs.statistics[0], recording.axes.statistics[0]
        probe_axes = self._probe_axes(recording, axes)

        def field(shared, weight, start, end, t, y):
            probes, values = shared
            consts = self._consts(values, probes, weight)
            out = self.field(consts, start, end, t, y)
            return eqx.filter(out, eqx.is_inexact_array)

        def all_nodes(probes):
            shared, shared_axes = (probes, values), (probe_axes, axes)
            fn = recording.batch.map_shared(field, shared, shared_axes)
            return jax.vmap(fn, in_axes=(0, None, None, 0, 0))(weight, start, end, t, y)

        _, pull = jax.vjp(all_nodes, zeros_like(total))
        (statistics,) = pull(ct_y)
        return add(total, statistics)

    def _probe_axes(self, recording: Recording, axes: list[Axes]) -> list[list[Axes]]:
        """The axes of the collected statistics."""
        if self.reduction == "reduce":
            every = recording.batch.all_axes
            return [[every for _ in slots[self._collected]] for slots in self.slots]
        return [[axes[slot] for slot in slots[self._collected]] for slots in self.slots]

    def _consts(self, values: list[Array], probes, weight) -> list[Array]:
        """The constants of `field`, with these probes and this weight among them."""
        consts = list(values)
        for slots, probe in zip(self.slots, probes, strict=True):
            for slot, value in zip(slots[self._collected], probe, strict=True):
                consts[slot] = value
            offset = (weight + 1).astype(consts[slots[0]].dtype)
            consts[slots[0]] = jnp.broadcast_to(offset, consts[slots[0]].shape)
        return consts

    def _whole_cotangents(self, recording: Recording, nodes, t1) -> PyTree:
        """The cotangents of the solution, from those of all copies a solver keeps."""
        consts, axes = recording.inputs.statistics[1], recording.axes.statistics[1]

        def whole(consts, node, t1):
            t, y, (ct_y, ct_kept) = node
            if not jax.tree.leaves(ct_kept):
                return ct_y
            diff, static = eqx.partition(y, eqx.is_inexact_array)

            def replay_state(diff):
                out = self.replay_state(consts, t, t1, eqx.combine(diff, static))
                return eqx.filter(out, eqx.is_inexact_array)

            _, pull = jax.vjp(replay_state, diff)
            return add(ct_y, *pull(ct_kept))

        fn = recording.batch.map_shared(whole, consts, axes)
        return jax.vmap(fn, in_axes=(0, None))(nodes, t1)

    def finish(self, recording: Recording, total: list[list[Array]]) -> Any:
        """The cotangents of the constants of `field` and of `replay_state`."""
        consts, replay_state_consts = recording.inputs.statistics
        axes, _ = recording.axes.statistics
        cts: list[Any] = [None] * len(consts)
        for slots, statistics in zip(self.slots, total, strict=True):
            _, inputs, outputs, count, *_ = slots
            if self.reduction == "reduce":
                statistics = [
                    recording.batch.total(x, recording.batch.all_axes, axes[slot])
                    for x, slot in zip(
                        _products(*statistics), (inputs, outputs, count), strict=True
                    )
                ]
            for slot, value in zip((inputs, outputs, count), statistics, strict=True):
                cts[slot] = value if cts[slot] is None else cts[slot] + value
        return cts, [None] * len(replay_state_consts)


def _products(count: Array, x_sum: Array, g_sum: Array) -> list[Array]:
    """Of the mean of inputs and the sum of gradients; one if there are any."""
    is_any = count > 0
    x_mean = x_sum / jnp.where(is_any, count, 1)[..., None]
    return [_outer(x_mean), _outer(g_sum), is_any.astype(count.dtype)]


def _outer(x: Array) -> Array:
    return x[..., :, None] * x[..., None, :]


def _of_use(weight: Array, ct: PyTree) -> Array:
    """`weight`, or zero where nothing depends on the state any more.

    So it has an axis for every `vmap` for which `ct` has one. A layer whose input is
    the same for all of a batch would else be taken to be used once, by a sum of
    samples.
    """
    is_used = jnp.array(False)
    for x in jax.tree.leaves(ct):
        is_used = is_used | jnp.any(x != 0)
    return jnp.where(is_used, weight, 0)


def _scaled(tree: PyTree, size: Array) -> PyTree:
    return jax.tree.map(lambda x: x * size.astype(x.dtype), tree)


def make_statistics(
    solve: Any, state: PyTree, step_consts: PyTree[Array], parts: dict[str, Part]
) -> Any:
    """`(constants, NodeStatistics)`, or `(None, None)` without layer products."""
    if not any(has_products(part.jaxpr) for part in parts.values()):
        return None, None
    terms, args = solve.step.terms, solve.step.args
    _check_terms(terms)
    t, y = as_struct(state.tprev), as_struct(state.y)

    def field(start, end, t, y):
        per_time = lambda x: x / (end - start).astype(x.dtype)
        control = jax.tree.map(per_time, terms.contr(start, end))
        out = terms.prod(terms.vf(t, y, args), control)
        like = lambda f, y: jnp.broadcast_to(f, y.shape).astype(y.dtype)
        return jax.tree.map(like, out, y)

    def replay_state(t, t1, y):
        solver_state = solve.step.start(t, t1, y)
        return eqx.filter(
            solve.states.replay_state(solver_state, jnp.array(False)),
            eqx.is_inexact_array,
        )

    field_consts, pure_field = closure_convert(field, t, t, t, y)
    replay_state_consts, pure_replay_state = closure_convert(replay_state, t, t, y)
    products = find_products(pure_field.jaxpr)
    slots = tuple(dict.fromkeys(slots for slots, _ in products))
    reduction = products[0][1].reduction
    if reduction == "reduce":
        for _, use in products:
            _check_one_sample(use)
    probes = [field_consts[slot] for layer in slots for slot in layer]
    is_probe = lambda x: any(x is probe for probe in probes)
    payload = NodeStatistics(
        field=pure_field,
        replay_state=pure_replay_state,
        slots=slots,
        probes_of_step=jax.tree.map(is_probe, step_consts),
        reduction=reduction,
    )
    return (field_consts, replay_state_consts), payload


def _check_terms(terms: PyTree) -> None:
    if not hasattr(terms, "vf_prod"):
        msg = (
            "The curvature of layers inside a solve is known for a solver with one "
            f"term; this one has {terms}. Use a Runge-Kutta method for the whole state."
        )
        raise ValueError(msg)
    if is_sde(terms):
        msg = (
            "The curvature of layers inside a stochastic differential equation has no "
            "limit for small steps. Leave them out with "
            "`value_grad_and_curvature(..., layers=...)`."
        )
        raise ValueError(msg)


def _check_one_sample(use: Use) -> None:
    """Sums over time may not mix samples."""
    sizes = [level.size for level in use.levels]
    if use.conv is None:
        sizes += use.shape[1:]
    if use.samples > 1 and use.samples in sizes:
        msg = (
            f"`reduction='reduce'` sums over time sample by sample, but {use.key} is "
            f"applied to all {use.samples} samples inside of one solve. Solve for one "
            "sample, with `odesolve(..., batched=True)` or `jax.vmap` around it; or "
            "take `reduction='integral'`."
        )
        raise ValueError(msg)
