r"""Statistics of the layers inside a solve, collected by its sweep.

A layer that is used in the vector field is used in every stage of every step. The
stages are no sample of anything: their cotangents carry the weights of the method,
which differ from method to method and may be negative. What has a limit are the inputs
$a(t)$ of the layer along the solution and the gradients
$g(t) = (\partial F / \partial h)^\top \lambda(t)$ with respect to its outputs $h$,
where $\lambda(t)$ is the cotangent of the state. So, while the sweep walks back, the
vector field is evaluated once more at both ends of every step with the cotangent that
the state has there, and integrals over time are sums with the weights of the
trapezoidal rule. That is the only place where a solve makes statistics: a *payload* of
the sweep. (What jumps inside a step, because the step saved something there, is taken
to jump at its end.)

Nothing of this exists in a solve whose vector field has no `tap`, nor where nobody
differentiates with respect to the probes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params, Literal
from jaxtyping import Array, PyTree

from ._diffrax import is_sde
from ._hoist import as_struct, hoist, Pure
from ._tap import tap_p, Use
from ._tree import add, each, zeros_like


# Where a layer's probes are among the constants of a function, in the order of `Probe`.
Slots = tuple[int, ...]

# What may happen to a probe between a model and its use, say in a `jax.lax.scan` over
# stacked layers.
_STRUCTURAL = frozenset(
    "broadcast_in_dim convert_element_type copy dynamic_slice gather pvary reshape "
    "slice squeeze transpose".split()
)


def find_taps(jaxpr: Jaxpr) -> list[tuple[Slots, Use]]:
    """Every use of a layer, with the constants that its probes are."""
    found: list[tuple[tuple[int | None, ...], Use]] = []
    _walk(jaxpr, {v: i for i, v in enumerate(jaxpr.constvars)}, found)
    out = []
    for slots, use in found:
        known = tuple(slot for slot in slots if slot is not None)
        if len(known) != len(slots):
            msg = (
                f"The layer {use.key} inside a vector field was computed from other "
                "arrays before it was used, so its curvature cannot be told. Leave it "
                "out with `value_grad_and_curvature(..., layers=...)`."
            )
            raise ValueError(msg)
        out.append((known, use))
    return out


def _has_tap(jaxpr: Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive is tap_p:
            return True
        for inner in jaxprs_in_params(eqn.params):
            if _has_tap(getattr(inner, "jaxpr", inner)):
                return True
    return False


def _walk(jaxpr: Jaxpr, roots: dict[Any, int], found: list) -> dict[Any, int]:
    """Follows constants, by `roots`, to the taps; returns where all of them went."""
    root = lambda v: None if isinstance(v, Literal) else roots.get(v)
    for eqn in jaxpr.eqns:
        if eqn.primitive is tap_p:
            _, _, *probes = eqn.invars
            found.append((tuple(map(root, probes)), eqn.params["use"]))
        elif eqn.primitive.name in _STRUCTURAL:
            source = root(eqn.invars[0])
            if source is not None:
                roots[eqn.outvars[0]] = source
        for inner in jaxprs_in_params(eqn.params):
            inner = getattr(inner, "jaxpr", inner)
            # Of all primitives with a body the last operands are its arguments.
            outer = eqn.invars[len(eqn.invars) - len(inner.invars) :]
            pairs = zip(inner.invars, map(root, outer), strict=True)
            reached = _walk(inner, {v: i for v, i in pairs if i is not None}, found)
            if len(inner.outvars) == len(eqn.outvars):
                for v, out in zip(inner.outvars, eqn.outvars, strict=True):
                    if not isinstance(v, Literal) and v in reached:
                        roots[out] = reached[v]
    return roots


def without_statistics(fn: Callable, *args: PyTree) -> PyTree:
    """`fn(*args)`, from which no statistics are collected."""
    consts, pure = hoist(fn, *args)
    for slots, _ in find_taps(pure.jaxpr):
        for slot in slots:
            consts[slot] = jax.lax.stop_gradient(consts[slot])
    return pure(consts, *args)


class NodeStatistics(eqx.Module):
    """The payload of a sweep that collects statistics at the ends of steps.

    - `field`: the vector field, a function of `(step start, step end, t, y)`.
    - `kept`: what a solver keeps besides the state, as a function of `(t, t1, y)`.
    - `slots`: the probes among the constants of `field`.
    - `probes_of_step`: which constants of the sweep's steps are probes.
    """

    field: Pure = eqx.field(static=True)
    kept: Pure = eqx.field(static=True)
    slots: tuple[Slots, ...] = eqx.field(static=True)
    probes_of_step: PyTree[bool] = eqx.field(static=True)
    reduction: str = eqx.field(static=True)

    def joined(self, sweep: Any) -> Any:
        """`sweep` with this payload, if anybody wants it; without statistics of stages.

        It is wanted if somebody differentiates with respect to a probe.
        """
        wrt_field, _ = sweep.wrt.statistics
        is_wanted = any(wrt_field[slot] for slots in self.slots for slot in slots)
        but_not = lambda w, is_probe: w and not is_probe
        consts = jax.tree.map(but_not, sweep.wrt.step_consts, self.probes_of_step)
        wrt = replace(sweep.wrt, step_consts=consts)
        return replace(sweep, wrt=wrt, payload=self if is_wanted else None)

    @property
    def _collected(self) -> slice:
        """Which statistics the sweep carries."""
        # Of a sum over time only the sum is squared.
        return slice(3, 6) if self.reduction == "reduce" else slice(1, 4)

    def initial(self, sweep: Any) -> list[list[Array]]:
        """No statistics yet."""
        consts, _ = sweep.inputs.statistics
        zeros = [
            [jnp.zeros_like(consts[slot]) for slot in slots[self._collected]]
            for slots in self.slots
        ]
        if sweep.lanes and self.reduction == "reduce":
            lanes = len(sweep.final_state.tprev)
            per_lane = lambda x: jnp.broadcast_to(x, (lanes, *x.shape))
            zeros = jax.tree.map(per_lane, zeros)
        return zeros

    def visit(self, sweep: Any, total, live, args, y1, cts_start, cts_end):
        """`total` with the statistics of the two ends of a step.

        `cts_start` and `cts_end` are the cotangents of the state, and of what is kept
        besides, at the ends.
        """
        start, end, y0, _ = args
        y1 = eqx.combine(y1, y0)
        both = lambda a, b: jax.tree.map(lambda a, b: jnp.stack([a, b]), a, b)
        nodes = both((start, y0, cts_start), (end, y1, cts_end))
        over_nodes = lambda fn, *axes: jax.vmap(each(sweep.lanes, fn), in_axes=axes)
        ct_y = over_nodes(self._whole_cotangent(sweep), 0, None)(nodes, end)
        size = end - start
        weight = jnp.where(live, size / 2, 0)
        if self.reduction == "expand":
            weight = jnp.where(live, jnp.full_like(size, 0.5), 0)
            ct_y = over_nodes(_scaled, 0, None)(ct_y, size)
        t, y, _ = nodes
        weight = over_nodes(_of_use, None, 0)(weight, ct_y)

        def field(probes, weight, start, end, t, y):
            consts = self._consts(sweep, probes, weight)
            out = self.field(consts, start, end, t, y)
            return eqx.filter(out, eqx.is_inexact_array)

        def all_nodes(probes):
            fn = field
            if sweep.lanes:
                has_lanes = 0 if self.reduction == "reduce" else None
                fn = jax.vmap(fn, in_axes=(has_lanes, 0, 0, 0, 0, 0))
            fn = jax.vmap(fn, in_axes=(None, 0, None, None, 0, 0))
            return fn(probes, weight, start, end, t, y)

        _, pull = jax.vjp(all_nodes, zeros_like(total))
        (statistics,) = pull(ct_y)
        return add(total, statistics)

    def _consts(self, sweep, probes, weight) -> list[Array]:
        """The constants of `field`, with these probes and this weight among them."""
        consts, _ = sweep.inputs.statistics
        consts = list(consts)
        for slots, probe in zip(self.slots, probes, strict=True):
            for slot, value in zip(slots[self._collected], probe, strict=True):
                consts[slot] = value
            offset = (weight + 1).astype(consts[slots[0]].dtype)
            consts[slots[0]] = jnp.broadcast_to(offset, consts[slots[0]].shape)
        return consts

    def _whole_cotangent(self, sweep) -> Callable:
        """The cotangent of the solution, from those of all copies that solvers keep."""
        _, consts = sweep.inputs.statistics

        def whole(node, t1):
            t, y, (ct_y, ct_kept) = node
            if not jax.tree.leaves(ct_kept):
                return ct_y
            diff, static = eqx.partition(y, eqx.is_inexact_array)

            def kept(diff):
                out = self.kept(consts, t, t1, eqx.combine(diff, static))
                return eqx.filter(out, eqx.is_inexact_array)

            _, pull = jax.vjp(kept, diff)
            return add(ct_y, *pull(ct_kept))

        return whole

    def finish(self, sweep: Any, total) -> Any:
        """The cotangents of the constants of `field` and of `kept`."""
        consts, kept_consts = sweep.inputs.statistics
        cts: list[Any] = [None] * len(consts)
        for slots, statistics in zip(self.slots, total, strict=True):
            _, inputs, outputs, count, *_ = slots
            if self.reduction == "reduce":
                statistics = _products(*statistics)
                if sweep.lanes:
                    statistics = [jnp.sum(x, axis=0) for x in statistics]
            for slot, value in zip((inputs, outputs, count), statistics, strict=True):
                cts[slot] = value if cts[slot] is None else cts[slot] + value
        return cts, [None] * len(kept_consts)


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
    solve: Any, state: PyTree, step_consts: PyTree[Array], pure_step: PyTree[Pure]
) -> Any:
    """`(constants, NodeStatistics)` of a solve, or `(None, None)` if it has no taps."""
    parts = list(pure_step.values()) if isinstance(pure_step, dict) else [pure_step]
    if not any(_has_tap(part.jaxpr) for part in parts):
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

    def kept(t, t1, y):
        solver_state = solve.step.start(t, t1, y)
        return eqx.filter(
            solve.kept(solver_state, jnp.array(False)), eqx.is_inexact_array
        )

    field_consts, pure_field = hoist(field, t, t, t, y)
    kept_consts, pure_kept = hoist(kept, t, t, y)
    taps = find_taps(pure_field.jaxpr)
    slots = tuple(dict.fromkeys(slots for slots, _ in taps))
    reduction = taps[0][1].reduction
    if reduction == "reduce":
        for _, use in taps:
            _check_one_sample(use)
    probes = [field_consts[slot] for layer in slots for slot in layer]
    is_probe = lambda x: any(x is probe for probe in probes)
    payload = NodeStatistics(
        field=pure_field,
        kept=pure_kept,
        slots=slots,
        probes_of_step=jax.tree.map(is_probe, step_consts),
        reduction=reduction,
    )
    return (field_consts, kept_consts), payload


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
