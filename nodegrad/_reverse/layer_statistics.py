r"""Statistics of the layers inside a vector field, collected by the reverse sweep.

A solve evaluates its vector field, and every layer inside it, in each stage of each
step. Stage cotangents are scaled by the solver's tableau weights, which may be
negative, so averages over stages depend on the solver. Two functions of time have a
limit for small steps: the input $a(t)$ of a layer along the solution, and the gradient
$g(t) = (\partial F / \partial h)^\top \lambda(t)$ with respect to its output $h$, where
$F$ is the vector field and $\lambda(t)$ the cotangent of the state.

At every step, the sweep therefore evaluates the vector field again at both ends of the
step, and pulls back the cotangent that the state has there. Integrals over time are
trapezoidal sums. The statistics of the stages are not used. (If a row was saved inside
a step, $\lambda$ jumps there; it is treated as if it jumped at the end of the step.)

A vector field without `layer_product`s has no statistics. They are also left out where
the probes are not differentiated.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from .._internal.batch import Axes
from .._internal.closure_convert import as_struct, closure_convert, Pure
from .._internal.compat import is_sde
from .._internal.tree import add, zeros_like
from .._layers.factors import Statistics
from .._layers.find_products import find_products, has_products, Slots
from .._layers.use import Use
from .._trajectory.recording import Recording
from .._trajectory.state_source import BackwardStep, Part


class NodeStatistics(eqx.Module):
    """Collects the statistics at the two ends ("nodes") of every step.

    - `field`: computes the vector field from `(step start, step end, t, y)`.
    - `replay_state`: computes the replay state of a fresh solver from `(t, t1, y)`.
    - `slots`: for every layer, the positions of its probes among the constants of
      `field`.
    - `probes_of_step`: for every constant of a step, whether it is a probe.
    - `reduction`: `"integral"`, `"expand"` or `"reduce"`, see
      `nodegrad.value_grad_and_curvature`.
    """

    field: Pure = eqx.field(static=True)
    replay_state: Pure = eqx.field(static=True)
    slots: tuple[Slots, ...] = eqx.field(static=True)
    probes_of_step: PyTree[bool] = eqx.field(static=True)
    reduction: str = eqx.field(static=True)

    def joined(self, recording: Recording) -> "tuple[Recording, NodeStatistics | None]":
        """Returns `recording` without the statistics of stages, and `self`.

        The second result is `None` if no probe is differentiated.
        """
        wrt_field, _ = recording.wrt.statistics
        is_wanted = any(wrt_field[slot] for slot in jax.tree.leaves(self.slots))
        # Steps must not differentiate their probes: those would be stage statistics.
        but_not = lambda w, is_probe: w and not is_probe
        constants = jax.tree.map(but_not, recording.wrt.constants, self.probes_of_step)
        wrt = replace(recording.wrt, constants=constants)
        return replace(recording, wrt=wrt), self if is_wanted else None

    def _carried(self, statistics: Statistics) -> Statistics:
        """Returns those of `statistics` that the sweep carries; the others are `None`.

        The items are arrays, axes or positions.
        """
        # "reduce" squares after integrating over time, so it carries only sums, of
        # shapes `(..., d_in)` and `(..., d_out)`, instead of outer products.
        if self.reduction == "reduce":
            return statistics._replace(inputs=None, outputs=None)
        return statistics._replace(x_sum=None, g_sum=None)

    def initial(self, recording: Recording) -> list[Statistics]:
        """Returns zeros for the statistics of every layer, before the last step."""
        consts, _ = recording.inputs.statistics
        axes, _ = recording.axes.statistics
        batch = recording.batch

        def zero(slot: int) -> Array:
            zeros = jnp.zeros_like(consts[slot])
            if self.reduction == "reduce":
                # Each solve has its own sums: they are squared before solves are added.
                zeros = batch.expand(zeros, axes[slot], batch.all_axes)
            return zeros

        return [
            jax.tree.map(zero, self._carried(slots.statistics)) for slots in self.slots
        ]

    def visit(
        self,
        recording: Recording,
        total: list[Statistics],
        step: BackwardStep,
        y1: PyTree,
        cts_start: PyTree,
        cts_end: PyTree,
    ) -> list[Statistics]:
        """Returns `total` plus the statistics of the two ends of a step.

        **Arguments:**

        - `total`: the carried statistics of each layer.
        - `y1`: the state at the end of the step; `None` where it is not inexact.
        - `cts_start`, `cts_end`: the cotangents of `(y, replay state)` at the ends.
        """
        start, end = step.times.start, step.times.end
        # Leaves that are not floating point numbers are the same at both ends.
        y1 = eqx.combine(y1, step.y)
        both = lambda a, b: jax.tree.map(lambda a, b: jnp.stack([a, b]), a, b)
        # From here on, arrays of the nodes have the shape `(2, *batch, ...)`.
        nodes = both((start, step.y, cts_start), (end, y1, cts_end))
        over_nodes = lambda fn, *axes: jax.vmap(recording.batch.map(fn), in_axes=axes)
        ct_y = self._whole_cotangents(recording, nodes, end)
        size = end - start
        # The trapezoidal rule. Solves that did not take this step get no weight.
        weight = jnp.where(step.active, size / 2, 0)
        if self.reduction == "expand":
            # A step is one use of the layer with the gradient `h g`, half of it at
            # each end. So the step size `h` scales the cotangent, and not the weight.
            weight = jnp.where(step.active, jnp.full_like(size, 0.5), 0)
            ct_y = over_nodes(_scaled, 0, None)(ct_y, size)
        t, y, _ = nodes
        weight = over_nodes(_of_use, None, 0)(weight, ct_y)
        # The "cotangents" of probes are the statistics (see `layer_product.py`), summed
        # over the nodes, and over those solves that share a probe.
        values, axes = recording.inputs.statistics[0], recording.axes.statistics[0]
        probe_axes = self._probe_axes(recording, axes)

        def field(
            shared: tuple[list[Statistics], list[Array]],
            weight: Float[Array, ""],
            start: Real[Array, ""],
            end: Real[Array, ""],
            t: Real[Array, ""],
            y: PyTree[Array],
        ) -> PyTree[Array]:
            probes, values = shared
            consts = self._consts(values, probes, weight)
            out = self.field(consts, start, end, t, y)
            return eqx.filter(out, eqx.is_inexact_array)

        def all_nodes(probes: list[Statistics]) -> PyTree[Array]:
            shared, shared_axes = (probes, values), (probe_axes, axes)
            fn = recording.batch.map_shared(field, shared, shared_axes)
            return jax.vmap(fn, in_axes=(0, None, None, 0, 0))(weight, start, end, t, y)

        _, pull = jax.vjp(all_nodes, zeros_like(total))
        (statistics,) = pull(ct_y)
        return add(total, statistics)

    def _probe_axes(self, recording: Recording, axes: list[Axes]) -> list[Statistics]:
        """Returns the batch axes of the carried statistics of each layer."""

        def axes_of(slot: int) -> Axes:
            # As in `initial`.
            is_summed_later = self.reduction == "reduce"
            return recording.batch.all_axes if is_summed_later else axes[slot]

        carried = [self._carried(slots.statistics) for slots in self.slots]
        return jax.tree.map(axes_of, carried)

    def _consts(
        self,
        values: list[Array],
        probes: list[Statistics],
        weight: Float[Array, ""],
    ) -> list[Array]:
        """Returns the constants of `field`, with `probes` and `weight` put in."""
        consts = list(values)
        for slots, probe in zip(self.slots, probes, strict=True):
            carried = jax.tree.leaves(self._carried(slots.statistics))
            for slot, value in zip(carried, jax.tree.leaves(probe), strict=True):
                consts[slot] = value
            # In the vector field of another solve, the offset is the weight of a node
            # of that one. An offset of zero means a weight of one.
            outer = consts[slots.offset]
            factor = jnp.where(outer == 0, 1, jnp.maximum(outer, 0))
            product = factor * weight.astype(outer.dtype)
            consts[slots.offset] = jnp.where(product > 0, product, -1)
        return consts

    def _whole_cotangents(
        self, recording: Recording, nodes: tuple, t1: Real[Array, "..."]
    ) -> PyTree[Array]:
        """Returns the cotangents of the solution at the nodes.

        A replay state also depends on the solution: it is $f(t, y)$ of a method that
        shares its last stage with the next step, and the second copy of a reversible
        solver. Its cotangent is pulled back to `y`, as if the solver started there.

        **Arguments:**

        - `nodes`: `(t, y, (cotangent of y, cotangent of the replay state))`.
        - `t1`: the end of the step, of shape `(*batch,)`.
        """
        consts, axes = recording.inputs.statistics[1], recording.axes.statistics[1]

        def whole(consts: list[Any], node: tuple, t1: Real[Array, ""]) -> PyTree[Array]:
            t, y, (ct_y, ct_kept) = node
            if not jax.tree.leaves(ct_kept):
                return ct_y
            diff, static = eqx.partition(y, eqx.is_inexact_array)

            def replay_state(diff: PyTree[Array]) -> PyTree[Array]:
                out = self.replay_state(consts, t, t1, eqx.combine(diff, static))
                return eqx.filter(out, eqx.is_inexact_array)

            _, pull = jax.vjp(replay_state, diff)
            return add(ct_y, *pull(ct_kept))

        fn = recording.batch.map_shared(whole, consts, axes)
        return jax.vmap(fn, in_axes=(0, None))(nodes, t1)

    def finish(self, recording: Recording, total: list[Statistics]) -> Any:
        """Returns the cotangents of the constants of `field` and of `replay_state`.

        Those of probes are the statistics `total`; all others are `None`.
        """
        consts, replay_state_consts = recording.inputs.statistics
        axes, _ = recording.axes.statistics
        batch = recording.batch
        cts: list[Any] = [None] * len(consts)
        for slots, statistics in zip(self.slots, total, strict=True):
            if self.reduction != "reduce":
                reported = self._carried(slots.statistics)
            else:
                # Square the sums of each solve, then add the solves that share a layer.
                # The sums are for another solve around this one: it squares its own.
                reported = slots.statistics
                statistics = jax.tree.map(
                    lambda slot, x: batch.total(x, batch.all_axes, axes[slot]),
                    reported,
                    _with_products(statistics),
                )
            positions, values = jax.tree.leaves(reported), jax.tree.leaves(statistics)
            # Two entries of `slots` may share a probe. Their statistics add up.
            for slot, value in zip(positions, values, strict=True):
                cts[slot] = value if cts[slot] is None else cts[slot] + value
        return cts, [None] * len(replay_state_consts)


def _with_products(sums: Statistics) -> Statistics:
    """Returns the sums with the `inputs` and `outputs` of `reduction="reduce"`.

    They are the outer products of the mean input and of the summed gradient with
    themselves. Batch axes come first in every array.
    """
    # Without any use the sums are zero, and the mean should be zero, too.
    is_any = sums.count > 0
    x_mean = sums.x_sum / jnp.where(is_any, sums.count, 1)[..., None]
    return sums._replace(inputs=_outer(x_mean), outputs=_outer(sums.g_sum))


def _outer(x: Float[Array, "... d"]) -> Float[Array, "... d d"]:
    return x[..., :, None] * x[..., None, :]


def _of_use(weight: Float[Array, ""], ct: PyTree[Array]) -> Float[Array, ""]:
    """Returns `weight`, or zero if `ct`, the cotangent of the state, is zero.

    The result must be batched wherever `ct` is. Otherwise a layer with the same input
    for the whole batch would be counted once, with the summed gradient.
    """
    is_used = jnp.array(False)
    for x in jax.tree.leaves(ct):
        is_used = is_used | jnp.any(x != 0)
    return jnp.where(is_used, weight, 0)


def _scaled(tree: PyTree[Array], size: Real[Array, ""]) -> PyTree[Array]:
    return jax.tree.map(lambda x: x * size.astype(x.dtype), tree)


def make_statistics(
    solve: Any, state: PyTree, step_consts: dict[str, list[Any]], parts: dict[str, Part]
) -> Any:
    """Returns `(constants, NodeStatistics)`, or `(None, None)` without layer products.

    **Arguments:**

    - `solve`: the `Solve`. (`plan.py`, where that class is, imports this module.)
    - `state`: the state of the loop before the first step.
    - `step_consts`, `parts`: the pure functions of a step, and their constants.
    """
    if not any(has_products(part.jaxpr) for part in parts.values()):
        return None, None
    terms, args = solve.step.terms, solve.step.args
    _check_terms(terms)
    t, y = as_struct(state.tprev), as_struct(state.y)

    def field(
        start: Real[Array, ""],
        end: Real[Array, ""],
        t: Real[Array, ""],
        y: PyTree[Array],
    ) -> PyTree[Array]:
        # Divided by the step size, so that sums over steps are integrals over time.
        per_time = lambda x: x / (end - start).astype(x.dtype)
        control = jax.tree.map(per_time, terms.contr(start, end))
        out = terms.prod(terms.vf(t, y, args), control)
        # The cotangents that are pulled back have the shapes and dtypes of the state.
        like = lambda f, y: jnp.broadcast_to(f, y.shape).astype(y.dtype)
        return jax.tree.map(like, out, y)

    def replay_state(
        t: Real[Array, ""], t1: Real[Array, ""], y: PyTree[Array]
    ) -> PyTree[Array]:
        solver_state = solve.step.start(t, t1, y)
        return eqx.filter(
            solve.states.replay_state(solver_state, jnp.array(False)),
            eqx.is_inexact_array,
        )

    field_consts, pure_field = closure_convert(field, t, t, t, y)
    replay_state_consts, pure_replay_state = closure_convert(replay_state, t, t, y)
    products = find_products(pure_field.jaxpr)
    # A layer that is used twice in the field is listed once.
    slots = tuple(dict.fromkeys(slots for slots, _ in products))
    reduction = products[0][1].reduction
    if reduction == "reduce":
        for _, use in products:
            _check_one_sample(use)
    # The same arrays, by identity, are among the constants of the steps.
    probes = [field_consts[slot] for slot in jax.tree.leaves(slots)]
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
    """Raises unless the terms have one vector field without noise."""
    if not hasattr(terms, "vf_prod"):
        msg = (
            "The curvature of layers inside a solve is defined for a solver with one "
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
    """Raises if a layer is applied to all samples of the batch inside of one solve.

    With `reduction="reduce"`, its sums over time would mix the samples.
    """
    # The axes of a use are the `vmap`s around it and, for a matrix, its positions.
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
