"""The optax transformation whose steps minimise a quadratic model of the loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .._internal.tree import add, all_finite, where, zeros_like
from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer
from .preconditioner import LayerState, Rule, Scalar
from .quadratic_model import (
    adapted_damping,
    after_batch,
    after_step,
    best_step,
    combined,
    curvature_in,
    inner,
    length_growth,
    NOISE,
    products,
    Progress,
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
# batch: without a mean the digits have a test loss of 0.13 and not 0.10, and the
# circles need 73 steps and not 57 to Adam's loss. With 0.9 the mean is too old. On a
# whole set there is nothing to average, and it costs steps: discs need 98 and not 78.
_DECAY = 0.7


class SNOptModelState(NamedTuple):
    r"""The state of `nodegrad.snopt` without a learning rate. All leaves are arrays.

    **Arguments:**

    - `preconditioner`: a `nodegrad.SNOptState`.
    - `previous`: the last update, a tree like the parameters.
    - `mean`: the running mean of gradients, a tree like the parameters.
    - `damping`: $\lambda$, which is zero before the first curvature.
    - `lengths`: the last coefficients of the preconditioned mean, of its part in layers
      and of the rest.
    - `progress`: how far the loss fell, and how far the parameters scatter around their
      running mean. The mean is `progress.average`, and mostly has the lower test loss.
    - `accepted`: whether the last step was taken. If not, it was zero. If its loss or
      its gradient was not finite, nothing else changed.
    - `ratio`: the last change of the loss, divided by that which the model predicted;
      NaN if no decrease was predicted.
    - `weight_decay`: the state of `optax.add_decayed_weights`.
    """

    preconditioner: SNOptState
    previous: PyTree[Array]
    mean: PyTree[Array]
    damping: Float[Array, ""]
    lengths: Float[Array, " parts"]
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
        state = initial_snopt_state(self.rule, self.chosen, params)
        dtype = _damping_dtype(state)
        zero = jnp.zeros((), dtype)
        # A copy, so that buffers of the parameters may be donated.
        average = jax.tree.map(jnp.copy, params)
        return SNOptModelState(
            preconditioner=state,
            previous=zeros_like(params),
            mean=zeros_like(params),
            damping=zero,
            lengths=jnp.ones(len(_separated(params, self.chosen(params))), dtype),
            progress=Progress(average, zero, zero, zero),
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
        curvature: Mapping[str, KroneckerFactors] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        """Returns the step, and the next state."""
        del extra
        if params is None or value is None or value_fn is None:
            raise ValueError(_NO_MODEL)
        gradient, decay_state = self._decayed(updates, state.weight_decay, params)

        objective, value = self._penalised(value_fn, value, state, params)
        # A loss or a gradient that is not finite says nothing, and would stay in the
        # means. The loss is not evaluated at parameters that are not finite.
        usable = jnp.isfinite(value) & all_finite(gradient)
        gradient = where(usable, gradient, zeros_like(gradient))
        mean = jax.tree.map(_average, state.mean, gradient)
        preconditioner, damping, parts = self._preconditioned(
            gradient, mean, state, curvature
        )
        count = state.preconditioner.count
        progress = after_batch(state.progress, params, gradient, value, count)
        directions = self._directions(parts, state)
        slopes = products(directions, [gradient])[:, 0]
        matrix = curvature_in(directions, slopes, objective, value, params)
        step = best_step(
            directions, slopes, trust(progress), matrix, damping, self.momentum
        )

        finite = all_finite(step.update)
        update = where(finite, step.update, zeros_like(step.update))
        actual = objective(add(params, update)) - value
        predicted = step.predicted.astype(actual.dtype)
        noise = NOISE * jnp.abs(value)
        accepted = usable & finite & jnp.isfinite(actual) & (actual <= noise)
        update = where(accepted, update, zeros_like(update))
        ratio = actual / jnp.where(predicted < 0, predicted, jnp.nan)
        scale = _mean_moment(preconditioner)
        adapted = adapted_damping(damping, scale, ratio, accepted)
        growth = length_growth(step.coefficients, slopes, noise, accepted)
        new = SNOptModelState(
            preconditioner=preconditioner,
            previous=update,
            mean=mean,
            damping=jnp.where(_is_refreshed(preconditioner), adapted, damping),
            lengths=state.lengths * growth[: len(parts)].astype(state.lengths.dtype),
            progress=after_step(progress, add(params, update), count),
            accepted=accepted,
            ratio=ratio.astype(damping.dtype),
            weight_decay=decay_state,
        )
        return update, where(usable, new, state._replace(accepted=accepted))

    def _directions(self, parts: list[PyTree], state: Any) -> list[PyTree]:
        """Returns the directions of the model, the step before as the last one."""
        # The model is fitted at the ends of the directions. So these should be about as
        # long as the step will be.
        directions = [
            combined(-length[None], [part])
            for length, part in zip(state.lengths, parts, strict=True)
        ]
        return directions if self.momentum is None else [*directions, state.previous]

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
    ) -> tuple[Any, Float[Array, ""], list[PyTree]]:
        """Returns the next state, the damping, and the parts of the direction."""
        preconditioner = state.preconditioner
        if curvature is not None:
            preconditioner = refreshed(
                self.rule, self.chosen, gradient, preconditioner, curvature
            )
        # The first curvature sets the scale: at the start the model is trusted little.
        damping = jnp.where(
            _is_refreshed(preconditioner) & ~_is_refreshed(state.preconditioner),
            _mean_moment(preconditioner),
            state.damping,
        )
        direction, preconditioner = preconditioned(
            self.rule, self.chosen, gradient, preconditioner, mean
        )
        return preconditioner, damping, _separated(direction, self.chosen(gradient))


def _average(mean: Array, gradient: Array) -> Array:
    return (_DECAY * mean + (1 - _DECAY) * gradient).astype(mean.dtype)


_NO_MODEL = (
    "`nodegrad.snopt()` without a learning rate needs `params` and the extra arguments "
    "`value` and `value_fn` in `update`. `nodegrad.make_steps` passes them. Or pass a "
    "`learning_rate`."
)


def _separated(direction: PyTree, layers: list[Layer]) -> list[PyTree]:
    """Returns `direction` as the part in layers, and the rest if there is one.

    The rest is a plain mean of gradients. So its scale is unrelated to that of the
    first part.
    """
    inside = {layer.weight for layer in layers} | {layer.bias for layer in layers}
    paths = jax.tree_util.tree_flatten_with_path(direction)[0]
    is_inside = [jax.tree_util.keystr(path) in inside for path, _ in paths]
    if all(is_inside) or not any(is_inside):
        return [direction]

    def part(wanted: bool) -> PyTree:
        leaves, structure = jax.tree.flatten(direction)
        kept = [
            x if found == wanted else jnp.zeros_like(x)
            for x, found in zip(leaves, is_inside, strict=True)
        ]
        return jax.tree.unflatten(structure, kept)

    return [part(True), part(False)]


def _states(state: Any) -> list[LayerState]:
    return list(state.layers.values()) if isinstance(state.layers, dict) else []


def _damping_dtype(state: Any) -> Any:
    # The widest: strict dtype promotion refuses to combine them.
    moments = [layer.second_moment.dtype for layer in _states(state)]
    return max(moments, key=lambda d: jnp.finfo(d).bits, default=jnp.dtype("float32"))


def _mean_moment(state: Any) -> Float[Array, ""]:
    """Returns the mean of the eigenvalues of the curvature of all layers."""
    moments = [layer.second_moment for layer in _states(state)]
    dtype = _damping_dtype(state)
    total = sum((jnp.sum(x).astype(dtype) for x in moments), jnp.zeros((), dtype))
    return total / max(sum(x.size for x in moments), 1)


def _is_refreshed(state: Any) -> Bool[Array, ""]:
    """Returns whether a layer has a curvature."""
    counts = [jnp.any(layer.num_refreshes > 0) for layer in _states(state)]
    return jnp.any(jnp.stack(counts)) if counts else jnp.array(False)
