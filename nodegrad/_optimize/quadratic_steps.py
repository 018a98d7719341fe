"""The optax transformation whose steps minimise a quadratic model of the loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .._internal.tree import (
    add,
    all_finite,
    at_least_float32,
    where,
    widest,
    zeros_like,
)
from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer
from .preconditioner import LayerState, precondition_rest, Rule, Scalar
from .quadratic_model import (
    adapted_damping,
    after_batch,
    after_step,
    best_step,
    combined,
    curvature_in,
    curvature_scale,
    first_damping,
    inner,
    length_growth,
    noise,
    products,
    Progress,
    ratio_of,
    trust,
)
from .scale_by_snopt import (
    Chosen,
    initial_snopt_state,
    preconditioned,
    refreshed,
    SNOptState,
)


# Of the running mean of gradients. The step for the gradient of one batch fits that
# batch: with a mean the digits have a lower test loss, and the circles need fewer
# steps. With 0.9 the mean is too old. On a whole set, as on the discs, there is nothing
# to average, and it costs steps. docs/tried.md has the numbers.
_DECAY = 0.7


class SNOptModelState(NamedTuple):
    r"""The state of `nodegrad.snopt` without a learning rate. All leaves are arrays.

    **Arguments:**

    - `preconditioner`: a `nodegrad.SNOptState`.
    - `previous`: the last update, a tree like the parameters.
    - `mean`: the running mean of gradients, a tree like the parameters.
    - `rest`: running means of the squared gradients of parameters outside of layers;
      `None` in place of the others.
    - `damping`: $\lambda$, which is zero before the first curvature.
    - `scale`: the curvature of the loss along the direction, per squared length.
    - `length`: the last coefficient of the preconditioned mean.
    - `progress`: how far the loss fell, and how far the parameters scatter around their
      running mean. The mean is `progress.average`, and mostly has the lower test loss.
    - `accepted`: whether the last step was taken. If not, it was zero. If its loss or
      its gradient was not finite, nothing else changed.
    - `ratio`: the last change of the loss, divided by that which the model predicted;
      NaN if no decrease was predicted, or one below the rounding of the loss.
    - `weight_decay`: the state of `optax.add_decayed_weights`.
    """

    preconditioner: SNOptState
    previous: PyTree[Array]
    mean: PyTree[Array]
    rest: PyTree[Array]
    damping: Float[Array, ""]
    scale: Float[Array, ""]
    length: Float[Array, ""]
    progress: Progress
    accepted: Bool[Array, ""]
    ratio: Float[Array, ""]
    weight_decay: Any


class QuadraticSteps(NamedTuple):
    """The optimiser of `nodegrad.snopt` without a learning rate.

    - `rule`, `chosen`: of the preconditioner.
    - `momentum`: the greatest coefficient of the last step, or `None` for none.
    - `decay`: `optax.add_decayed_weights`, or `None`.
    """

    rule: Rule
    chosen: Chosen
    momentum: Scalar | None
    decay: optax.GradientTransformation | None

    # States are `Any` for type checkers: Optax's type of states excludes named tuples.
    def init(self, params: PyTree) -> Any:
        """Returns the state before the first step."""
        _check_whole(params)
        state = initial_snopt_state(self.rule, self.chosen, params)
        dtype = _damping_dtype(state)
        # Arrays of their own, so that the parameters and the state may be donated.
        zero = lambda: jnp.zeros((), dtype)
        average = jax.tree.map(jnp.copy, params)
        return SNOptModelState(
            preconditioner=state,
            previous=zeros_like(params),
            mean=zeros_like(params),
            rest=_zero_moments(_outside(params, self.chosen(params))),
            damping=zero(),
            scale=zero(),
            length=jnp.ones((), dtype),
            progress=Progress(average, zero(), zero(), zero()),
            accepted=jnp.array(True),
            ratio=jnp.ones((), dtype),
            weight_decay=None if self.decay is None else self.decay.init(params),
        )

    def update(
        self,
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        value: Array | None = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        grad: PyTree | None = None,
        curvature: Mapping[str, KroneckerFactors] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        """Returns the step, and the next state."""
        del extra
        if params is None or value is None or value_fn is None:
            raise ValueError(_NO_MODEL)
        gradient, decay_state = self._decayed(updates, state.weight_decay, params)
        # Slopes are those of the loss: transformations before this one do not count.
        raw = updates if grad is None else grad
        slope, _ = self._decayed(raw, state.weight_decay, params)
        objective, value = self._penalised(value_fn, value, state, params)
        # A loss or a gradient that is not finite says nothing, and would stay in the
        # means. The loss is not evaluated at parameters that are not finite.
        usable = jnp.isfinite(value) & all_finite((gradient, slope))
        gradient = where(usable, gradient, zeros_like(gradient))
        slope = where(usable, slope, zeros_like(slope))
        mean = jax.tree.map(_average, state.mean, gradient)
        preconditioner, rest, direction = self._preconditioned(
            gradient, mean, state, curvature
        )
        count = state.preconditioner.count
        progress = after_batch(state.progress, params, slope, value, count)
        directions = self._directions(direction, state)
        slopes = products(directions, [slope])[:, 0]
        matrix = curvature_in(directions, slopes, objective, value, params)
        scale = curvature_scale(state.scale, matrix, directions, value)
        is_refreshed = _is_refreshed(preconditioner)
        damping = first_damping(state.damping, scale, is_refreshed)
        step = best_step(
            directions, slopes, trust(progress), matrix, damping, self.momentum
        )

        update, actual, accepted = _tried(step.update, objective, params, value, usable)
        ratio = ratio_of(actual, step.predicted.astype(actual.dtype), value)
        adapted = adapted_damping(damping, scale, ratio, accepted)
        growth = length_growth(step.coefficients, slopes, value, accepted)
        new = SNOptModelState(
            preconditioner=preconditioner,
            previous=update,
            mean=mean,
            rest=rest,
            damping=jnp.where(is_refreshed, adapted, damping),
            scale=scale,
            length=state.length * growth[0].astype(state.length.dtype),
            progress=after_step(progress, add(params, update), count),
            accepted=accepted,
            ratio=ratio.astype(damping.dtype),
            weight_decay=decay_state,
        )
        return update, where(usable, new, state._replace(accepted=accepted))

    def _directions(self, direction: PyTree, state: Any) -> list[PyTree]:
        """Returns the directions of the model, the step before as the last one."""
        # The model is fitted at the ends of the directions. So these should be about as
        # long as the step will be.
        first = combined(-state.length[None], [direction])
        return [first] if self.momentum is None else [first, state.previous]

    def _penalised(
        self,
        value_fn: Callable[[PyTree], Array],
        value: Array,
        state: Any,
        params: PyTree,
    ) -> tuple[Callable[[PyTree], Array], Array]:
        """Returns the loss with the penalty of the weight decay, and its value."""
        if self.decay is None:
            return value_fn, value

        def penalty(params: PyTree) -> Array:
            zeros = zeros_like(params)
            shrunk, _ = self._decayed(zeros, state.weight_decay, params)
            return (inner(params, shrunk) / 2).astype(value.dtype)

        objective = lambda params: value_fn(params) + penalty(params)
        return objective, value + penalty(params)

    def _decayed(
        self, updates: PyTree, state: Any, params: PyTree
    ) -> tuple[PyTree, Any]:
        if self.decay is None:
            return updates, state
        return self.decay.update(updates, state, params)

    def _preconditioned(
        self,
        gradient: PyTree,
        mean: PyTree,
        state: Any,
        curvature: Mapping[str, KroneckerFactors] | None,
    ) -> tuple[Any, PyTree, PyTree]:
        """Returns the next state, moments of the rest, and a direction."""
        preconditioner = state.preconditioner
        if curvature is not None:
            preconditioner = refreshed(
                self.rule, self.chosen, gradient, preconditioner, curvature
            )
        direction, preconditioner = preconditioned(
            self.rule, self.chosen, gradient, preconditioner, mean
        )
        steps, rest = self._rest(gradient, mean, state.rest, preconditioner)
        return preconditioner, rest, eqx.combine(steps, direction)

    def _rest(
        self, gradient: PyTree, mean: PyTree, moments: PyTree, preconditioner: Any
    ) -> tuple[PyTree, PyTree]:
        """Returns the direction of parameters outside of layers, and new moments."""
        leaves, structure = jax.tree.flatten(moments)
        layers = self.chosen(gradient)
        outside = lambda tree: jax.tree.leaves(_outside(tree, layers))
        at = (
            _num_samples(preconditioner),
            preconditioner.count,
            ~_is_refreshed(preconditioner),
        )
        pairs = [
            precondition_rest(self.rule, moment, g, m, *at)
            for moment, g, m in zip(
                leaves, outside(gradient), outside(mean), strict=True
            )
        ]
        steps, new = [step for step, _ in pairs], [moment for _, moment in pairs]
        return jax.tree.unflatten(structure, steps), jax.tree.unflatten(structure, new)


def _tried(
    update: PyTree,
    objective: Callable[[PyTree], Array],
    params: PyTree,
    value: Array,
    usable: Bool[Array, ""],
) -> tuple[PyTree, Array, Bool[Array, ""]]:
    """Returns the step to take, the change of the loss, and whether it is accepted.

    A step that is not is zero. `usable` is whether one may be.
    """
    zeros, usable = zeros_like(update), usable & all_finite(update)
    update = where(usable, update, zeros)
    actual = objective(add(params, update)) - value
    accepted = usable & jnp.isfinite(actual) & (actual <= noise(value))
    return where(accepted, update, zeros), actual, accepted


def _average(mean: Array, gradient: Array) -> Array:
    return (_DECAY * mean + (1 - _DECAY) * gradient).astype(mean.dtype)


_NO_MODEL = (
    "`nodegrad.snopt()` without a learning rate needs `params` and the extra arguments "
    "`value` and `value_fn` in `update`. `nodegrad.make_steps` passes them. Or pass a "
    "`learning_rate`."
)


def _check_whole(params: PyTree) -> None:
    """Raises a `ValueError` if a mask of Optax has hidden parameters."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        msg = (
            "`nodegrad.snopt()` without a learning rate needs all parameters, since "
            "its model is one of the loss: it cannot be part of `optax.partition` or "
            "`optax.masked`. To freeze parameters, set their gradients to zero before "
            "it: `optax.chain(optax.masked(optax.set_to_zero(), frozen), "
            "nodegrad.snopt())`, and exempt them from weight decay by its `mask`. Or "
            "pass a `learning_rate`."
        )
        raise ValueError(msg)


def _outside(tree: PyTree, layers: list[Layer]) -> PyTree:
    """Returns `tree` with `None` in place of what belongs to `layers`."""
    inside = {layer.weight for layer in layers} | {layer.bias for layer in layers}
    keep = lambda path, x: None if jax.tree_util.keystr(path) in inside else x
    return jax.tree_util.tree_map_with_path(keep, tree)


def _zero_moments(params: PyTree[Array]) -> PyTree[Array]:
    """Returns second moments of zero: real numbers, also of complex parameters."""

    def zeros(x: Array) -> Array:
        return jnp.zeros(x.shape, at_least_float32(jnp.finfo(x.dtype).dtype))

    return jax.tree.map(zeros, params)


def _states(state: Any) -> list[LayerState]:
    return list(state.layers.values()) if isinstance(state.layers, dict) else []


def _damping_dtype(state: Any) -> Any:
    return widest(layer.second_moment.dtype for layer in _states(state))


def _is_refreshed(state: Any) -> Bool[Array, ""]:
    """Returns whether a layer has a curvature."""
    counts = [jnp.any(layer.num_refreshes > 0) for layer in _states(state)]
    return jnp.any(jnp.stack(counts)) if counts else jnp.array(False)


def _num_samples(state: Any) -> Float[Array, ""]:
    """Returns the batch size of the last refresh; 1 before it, or without layers."""
    # A layer that is not used keeps the number it started with, which is 1.
    numbers = [jnp.max(layer.num_samples) for layer in _states(state)]
    return jnp.max(jnp.stack(numbers)) if numbers else jnp.ones(())
