"""`snopt`: the optimiser, with steps from a quadratic model or with a learning rate."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .._internal.tree import check_numbers
from .._internal.tree import add, where, zeros_like
from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer
from .preconditioner import LayerState, Rule, Scalar
from .quadratic_model import adapted_damping, best_step, combined, curvature_in, inner
from .scale_by_snopt import (
    chosen_layers,
    initial_snopt_state,
    preconditioned,
    refreshed,
    rule_of,
    scale_by_snopt,
    SNOptState,
)


# The greatest coefficient of the step before. On batches of 128 of the digits the loss
# after 300 steps is 8e-5 with it, 2e-4 without momentum and 9e-4 without a bound.
_MOMENTUM = 0.9


class SNOptModelState(NamedTuple):
    r"""The state of `nodegrad.snopt` without a learning rate. All leaves are arrays.

    **Arguments:**

    - `preconditioner`: a `nodegrad.SNOptState`.
    - `previous`: the last update, a tree like the parameters.
    - `damping`: $\lambda$, or a negative number before the first curvature.
    - `lengths`: the last coefficients of the preconditioned gradient, of that in layers
      and of the rest.
    - `accepted`: whether the last step was taken. If not, it was zero.
    - `ratio`: the last change of the loss, divided by that which the model predicted.
    - `weight_decay`: the state of `optax.add_decayed_weights`.
    """

    preconditioner: SNOptState
    previous: PyTree[Array]
    damping: Float[Array, ""]
    lengths: Float[Array, " parts"]
    accepted: Bool[Array, ""]
    ratio: Float[Array, ""]
    weight_decay: Any


def snopt(
    learning_rate: optax.ScalarOrSchedule | None = None,
    preset: str = "robust",
    *,
    momentum: Scalar | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], Any] | None = None,
    moment: str | None = None,
    decay: Scalar | None = None,
    damping: Scalar | None = None,
    damping_mode: str | None = None,
    power: Scalar | None = None,
    factor_decay: Scalar | None = None,
    kl_clip: Scalar | None = None,
    layers: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The SNOpt optimiser: preconditioned gradients, and steps of the right length.

    *Without a learning rate* every step minimises a quadratic model of the loss of its
    batch. The step is a combination of the preconditioned gradient $\Delta W$ of
    `nodegrad.scale_by_snopt` and of the step before,

    $$\delta = -\alpha\, \Delta W + \mu\, \delta_{\mathrm{before}}, \qquad
      \min_{\alpha,\, 0 \le \mu \le \mu_{\max}} \langle g, \delta \rangle
      + \tfrac{1}{2} \langle \delta, (C + \lambda)\, \delta \rangle.$$

    $C$ is the curvature of the loss of the batch along these two directions, from its
    values at their ends. The damping $\lambda$, which is also the $\varepsilon$ of
    `scale_by_snopt`, starts at the mean eigenvalue of the curvature. It falls where the
    model predicts the loss well, and grows where it does not (Levenberg and Marquardt).
    A step that raises the loss of its batch is not taken. Nothing is left to tune.

    *With a learning rate* $\eta$ the optimiser is the chain
    `scale_by_snopt`, weight decay, momentum, learning rate:

    $$W \leftarrow W - \eta\, m, \qquad m \leftarrow \mu m + \Delta W + \gamma W.$$

    ```python
    import equinox as eqx
    import jax
    import nodegrad

    x = jax.numpy.linspace(-1, 1, 32)[:, None]
    y = jax.numpy.sin(3 * x)
    model = eqx.nn.MLP(1, 1, 16, 2, jax.numpy.tanh, key=jax.random.PRNGKey(0))
    loss = lambda model, x, y: ((jax.vmap(model)(x) - y) ** 2)[:, 0]
    optim = nodegrad.snopt()
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    step, refresh = nodegrad.make_steps(optim, loss, moments=True)
    for i in range(60):
        run = refresh if i % 20 == 0 else step
        model, state, value = run(model, state, x, y, key=jax.random.PRNGKey(i))
    print(value < 1e-3)  # True
    ```

    **Arguments:**

    - `learning_rate`: `None`, or $\eta$, or a schedule.
    - `momentum`: $\mu$, and `None` for no momentum. Without a learning rate:
      $\mu_{\max}$, and `None` for 0.9; 0 saves one direction.
    - `weight_decay`: $\gamma$; `mask` selects the leaves, as in
      `optax.add_decayed_weights`. Without a learning rate it is a penalty
      $\frac{\gamma}{2} |W|^2$ of the loss, and part of the model.
    - `preset`, `moment`, `decay`, `power`, `factor_decay`, `layers`: as in
      `nodegrad.scale_by_snopt`.
    - `damping`, `damping_mode`, `kl_clip`: as there, with a learning rate only.

    **Returns:** an `optax.GradientTransformationExtraArgs`; see
    `nodegrad.scale_by_snopt` for the argument `curvature` of its `update`. Without a
    learning rate `update` also needs `params`, and the extra arguments `value`, the
    loss of the batch at `params`, and `value_fn`, the loss of the batch as a function
    of parameters. `nodegrad.make_steps` passes all of these.

    **Raises:** as `nodegrad.scale_by_snopt`; `ValueError` for missing arguments of
    `update`, and for arguments that need a learning rate.

    **Cost:** with a learning rate that of `nodegrad.scale_by_snopt`, and of SGD.
    Without one also four evaluations of the loss (seven for a model with parameters
    outside of layers), three of them at once: a step takes about twice as long as one
    of Adam.

    **When not to use it:** as `nodegrad.scale_by_snopt`. Without a learning rate: with
    batches of fewer samples than the loss needs to be told from noise (about a
    hundred); as a part of `optax.partition`, because the model is one of all
    parameters; in `optax.MultiSteps`. With a learning rate: for parameters outside of
    layers, which get plain gradient steps; use a separate optimiser for them with
    `optax.partition`. (Without one their step has a length of its own.)

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021. Martens,
        Grosse: Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, ICML 2015, sections 6 and 7 (step, momentum and damping).
    """
    given = dict(
        moment=moment,
        decay=decay,
        damping=damping,
        power=power,
        factor_decay=factor_decay,
        kl_clip=kl_clip,
    )
    if learning_rate is None:
        unused = dict(damping=damping, damping_mode=damping_mode, kl_clip=kl_clip)
        unused = [f"`{name}`" for name, x in unused.items() if x is not None]
        if unused:
            msg = (
                f"{', '.join(unused)}: without a `learning_rate` the damping adapts "
                "itself, and bounds the step. Leave these arguments out, or pass a "
                "`learning_rate`."
            )
            raise ValueError(msg)
        bound = _MOMENTUM if momentum is None else momentum
        check_numbers(momentum=bound)
        if isinstance(bound, int | float) and bound < 0:
            msg = f"`momentum` must not be negative; got {bound}."
            raise ValueError(msg)
        rule = rule_of(preset, None, **given)
        chosen = chosen_layers(layers)
        return _by_quadratic_model(rule, chosen, bound, weight_decay, mask)
    return optax.chain(
        scale_by_snopt(preset, damping_mode=damping_mode, layers=layers, **given),
        optax.add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def _by_quadratic_model(
    rule: Rule,
    chosen: Callable[[PyTree], list[Layer]],
    momentum: Scalar,
    weight_decay: optax.ScalarOrSchedule,
    mask: PyTree | Callable[[PyTree], Any] | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimiser whose steps minimise a quadratic model of the loss."""
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    has_momentum = not (isinstance(momentum, int | float) and momentum == 0)
    penalty = optax.add_decayed_weights(weight_decay, mask)

    # States are `Any` for type checkers: Optax's type of states excludes named tuples.
    def init_fn(params: PyTree) -> Any:
        state = initial_snopt_state(rule, chosen, params)
        dtype = _damping_dtype(state)
        return SNOptModelState(
            preconditioner=state,
            previous=zeros_like(params),
            damping=jnp.full((), -1, dtype),
            lengths=jnp.ones(len(_separated(params, chosen(params))), dtype),
            accepted=jnp.array(True),
            ratio=jnp.ones((), dtype),
            weight_decay=penalty.init(params),
        )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        value: Array | None = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        curvature: Mapping[str, KroneckerFactors] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del extra
        if params is None or value is None or value_fn is None:
            raise ValueError(_NO_MODEL)
        decay_state = state.weight_decay
        if decays:
            gradient, decay_state = penalty.update(updates, decay_state, params)
        else:
            gradient = updates

        def penalty_of(params: PyTree) -> Array:
            if not decays:
                return jnp.zeros((), value.dtype)
            zeros = zeros_like(params)
            shrunk, _ = penalty.update(zeros, state.weight_decay, params)
            return (inner(params, shrunk) / 2).astype(value.dtype)

        objective = lambda params: value_fn(params) + penalty_of(params)
        old = value + penalty_of(params)
        inside = state.preconditioner
        if curvature is not None:
            inside = refreshed(rule, chosen, updates, inside, curvature)
        mean = _mean_moment(inside).astype(state.damping.dtype)
        was_refreshed = _num_refreshes(inside) > 0
        # The first curvature sets the scale: at the start the model is trusted little.
        start = jnp.where(was_refreshed, mean, -1)
        damping = jnp.where(state.damping < 0, start, state.damping)
        used = jnp.maximum(damping, 0)
        damped = rule._replace(damping=used, relative=False, kl_clip=float("inf"))
        direction, inside = preconditioned(damped, chosen, gradient, inside)

        # Downhill, and of the length of the last step.
        parts = _separated(direction, chosen(updates))
        directions = [
            combined(-length[None], [part])
            for length, part in zip(state.lengths, parts, strict=True)
        ]
        if has_momentum:
            directions.append(state.previous)
        matrix = curvature_in(directions, objective, old, gradient, params)
        step = best_step(
            directions, gradient, matrix, used, momentum if has_momentum else None
        )

        new_params = add(params, step.update)
        new = objective(new_params)
        actual, predicted = new - old, step.predicted.astype(new.dtype)
        # Near a minimum the change is rounding, of either sign.
        rounding = 10 * jnp.finfo(new.dtype).eps * jnp.abs(old)
        accepted = jnp.isfinite(new) & (actual <= rounding)
        least = jnp.finfo(damping.dtype).eps * mean
        adapted = adapted_damping(used, least, predicted, actual, accepted)
        update = where(accepted, step.update, zeros_like(step.update))
        # A single step says little: each length changes by a factor of ten at most.
        factors = jnp.clip(step.coefficients[: len(parts)], 0.1, 10)
        factors = jnp.where(accepted, factors, 0.25).astype(state.lengths.dtype)
        safe = jnp.where(predicted < 0, predicted, 1)
        return update, SNOptModelState(
            preconditioner=inside,
            previous=update,
            damping=jnp.where(damping < 0, damping, adapted),
            lengths=state.lengths * factors,
            accepted=accepted,
            ratio=jnp.where(predicted < 0, actual / safe, 1).astype(damping.dtype),
            weight_decay=decay_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_NO_MODEL = (
    "`nodegrad.snopt()` without a learning rate needs `params` and the extra arguments "
    "`value` and `value_fn` in `update`. `nodegrad.make_steps` passes them. Or pass a "
    "`learning_rate`."
)


def _separated(direction: PyTree, layers: list[Layer]) -> list[PyTree]:
    """Returns `direction` as the part in layers, and the rest if there is one.

    The rest is a plain gradient, whose length has nothing to do with that of the first.
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


def _num_refreshes(state: Any) -> Array:
    counts = [jnp.max(layer.num_refreshes) for layer in _states(state)]
    return jnp.max(jnp.stack(counts)) if counts else jnp.zeros((), jnp.int32)
