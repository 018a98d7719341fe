"""SNOpt: a second-order optimiser with Kronecker curvature, as an optax transform.

It knows nothing of differential equations: the curvature comes as an extra argument of
`update`, from `nodegrad.value_grad_and_curvature` or from anywhere else.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer, layers_of, Leaves
from .preconditioner import (
    clip,
    initial_state,
    LayerState,
    precondition,
    refresh,
    Rule,
)


class SNOptState(NamedTuple):
    """The state of `nodegrad.scale_by_snopt`; all arrays.

    **Arguments:**

    - `count`: how many updates there were.
    - `layers`: for each layer, by its path, its eigenbases `input_basis` and
      `output_basis`, the `second_moment` in them, the running averages `input_factor`
      and `output_factor` if there are any, `num_samples` and `num_refreshes`.

    **Cost:** per layer $2 (d_{in}^2 + d_{out}^2) + d_{in} d_{out}$ numbers, in float32
    or better; half of the squares with `factor_decay=0.0`.
    """

    count: Int[Array, ""]
    layers: dict[str, LayerState]


_PRESETS = {
    "paper": Rule(
        moment="running",
        decay=0.75,
        damping=0.05,
        relative=False,
        power=-1.0,
        factor_decay=0.0,
        kl_clip=float("inf"),
    ),
    "robust": Rule(
        moment="ekfac",
        decay=0.95,
        damping=0.1,
        relative=True,
        power=-1.0,
        factor_decay=0.9,
        kl_clip=1.0,
    ),
}
_MOMENTS = ("running", "kronecker", "ekfac")


def scale_by_snopt(
    preset: str = "robust",
    *,
    moment: str | None = None,
    decay: Any = None,
    damping: Any = None,
    damping_mode: str | None = None,
    power: Any = None,
    factor_decay: Any = None,
    kl_clip: Any = None,
    layers: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of Kronecker-factored curvature.

    For every layer with weight (and bias) matrix $W$ and gradient $G$, with the
    eigenbases $U_A$, $U_B$ of the factors that `update` was last given,

    $$\Delta W = U_B \left[ (S + \varepsilon)^{p} \odot (U_B^\top G\, U_A) \right]
      U_A^\top,$$

    where $S$ are the eigenvalues of the curvature, $\varepsilon$ is the `damping` and
    $p$ the `power`. Leaves that are in no layer pass through unchanged; so does what
    `layers` excludes. Put it into an `optax.chain`, in the order
    `scale_by_snopt`, `optax.add_decayed_weights`, `optax.trace`,
    `optax.scale_by_learning_rate`; `nodegrad.snopt` does that.

    The curvature is an extra argument of `update`, and its absence is cheap:

    ```python
    loss, grads, curvature = curvature_fn(model, batch)  # now and then
    updates, state = optim.update(grads, state, params, curvature=curvature)

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)  # otherwise
    updates, state = optim.update(grads, state, params)
    ```

    Make these two jitted functions, and count in Python: see `nodegrad.make_steps`.

    **Arguments:**

    - `preset`: where the other arguments come from if they are `None`. `"paper"`:
      `moment="running"`, `decay=0.75`, `damping=0.05`, `damping_mode="absolute"`,
      `power=-1`, no averaging, no clip. `"robust"`: `moment="ekfac"`, `decay=0.95`,
      `damping=0.1`, `damping_mode="relative"`, `power=-1`, `factor_decay=0.9`,
      `kl_clip=1`.
    - `moment`: what $S$ is. `"running"`: $\lambda_B \lambda_A^\top$ at a refresh, and
      then at every update $S \leftarrow \alpha S + (1 - \alpha)\, n\, \hat G^2$, with
      $\hat G = U_B^\top G U_A$, $n$ the samples of a batch and $\alpha$ the `decay`.
      `"ekfac"`: the same, but a refresh does not forget: it expresses $S$ in the new
      basis, and averages it, with $\alpha$ again, with the second moments of the
      gradients of the samples, which takes a curvature with `draws`.
      `"kronecker"`: $\lambda_B \lambda_A^\top$, always.
    - `damping`: $\varepsilon$. With `damping_mode="absolute"` as it is, and so in units
      of squared gradients; with `"relative"` times the mean of $S$ of the layer.
    - `power`: $-1$ for a natural gradient, $-1/2$ for a step like that of Adam.
    - `factor_decay`: how much of $A$ and $B$ is kept at a refresh; `0.0` for none.
    - `kl_clip`: a bound $\kappa$ on $\langle \Delta W, G \rangle$ summed over layers,
      by which all steps are scaled down: with `power=-1` twice the decrease that the
      quadratic model promises for a learning rate of one, and the square of the length
      of the step in the metric of the curvature. `jnp.inf` for none.
    - `layers`: which layers to take, by their path (`jax.tree_util.keystr`).

    **Returns:** an `optax.GradientTransformationExtraArgs`, whose `update` takes
    `curvature`, a dictionary from the path of a layer to its
    `nodegrad.KroneckerFactors`. Layers that it lacks keep the basis that they have; so
    do those whose factors are zero or not finite. Before a layer's first refresh its
    gradient is divided by the square root of its running second moment, entry by entry
    (like RMSprop).

    **Raises:** `ValueError` for unknown presets, moments and modes, and for curvature
    that does not fit: of other shapes, of none of the layers, or without `draws` for
    `moment="ekfac"`.

    **Cost:** per update and layer four products of $W$ with a square matrix; at a
    refresh besides the eigenvectors of two square matrices. State: see
    `nodegrad.SNOptState`.

    **When not to use it:** for layers wider than a few thousand, and for models whose
    parameters are not in layers (there it does nothing). Gradients with `NaN`s go
    through: use `optax.apply_if_finite`. Inside of `optax.MultiSteps` only curvature
    that comes with the last of the mini-batches arrives.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        equation (14); George, Laurent, Bouthillier, Ballas, Vincent: Fast Approximate
        Natural Gradient Descent in a Kronecker-factored Eigenbasis, NeurIPS 2018.
    """
    rule = _rule(
        preset,
        damping_mode,
        moment=moment,
        decay=decay,
        damping=damping,
        power=power,
        factor_decay=factor_decay,
        kl_clip=kl_clip,
    )

    def chosen(tree: PyTree) -> list[Layer]:
        return [x for x in layers_of(tree) if layers is None or layers(x.key)]

    def init_fn(params: PyTree) -> Any:
        count = jnp.zeros((), jnp.int32)
        if not jax.tree.leaves(params):
            # So that `optax.tree_map_params`, which asks with a placeholder for the
            # parameters, sees where the state depends on them.
            return SNOptState(count, params)
        dtypes = Leaves(params).dtypes
        states = {
            layer.key: initial_state(layer, dtypes[layer.weight], rule)
            for layer in chosen(params)
        }
        return SNOptState(count, states)

    def update_fn(updates, state, params=None, *, curvature=None, **extra):
        del params, extra
        if not isinstance(state.layers, dict):
            return updates, state._replace(count=_next(state.count))
        found, leaves = chosen(updates), Leaves(updates)
        states = dict(state.layers)
        if curvature is not None:
            states = _refreshed(rule, found, states, curvature)
        gradients = [leaves.matrix(layer) for layer in found]
        steps = []
        for layer, gradient in zip(found, gradients, strict=True):
            step, states[layer.key] = precondition(rule, states[layer.key], gradient)
            steps.append(step)
        steps = clip(rule, steps, gradients)
        return leaves.with_matrices(found, steps), SNOptState(
            _next(state.count), states
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def snopt(
    learning_rate: optax.ScalarOrSchedule,
    preset: str = "robust",
    *,
    momentum: Any = None,
    weight_decay: Any = 0.0,
    mask: Any = None,
    moment: str | None = None,
    decay: Any = None,
    damping: Any = None,
    damping_mode: str | None = None,
    power: Any = None,
    factor_decay: Any = None,
    kl_clip: Any = None,
    layers: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The SNOpt optimiser: `scale_by_snopt`, weight decay, momentum, learning rate.

    $$W \leftarrow W - \eta\, m, \qquad
      m \leftarrow \mu m + \Delta W + \gamma W,$$

    with $\Delta W$ the preconditioned gradient of `nodegrad.scale_by_snopt`.

    **Arguments:**

    - `learning_rate`: $\eta$, or a schedule.
    - `momentum`: $\mu$; `None` for none.
    - `weight_decay`: $\gamma$; `mask` says of which leaves, as in
      `optax.add_decayed_weights`.
    - `preset`, `moment`, `decay`, `damping`, `damping_mode`, `power`, `factor_decay`,
      `kl_clip`, `layers`: as in `nodegrad.scale_by_snopt`.

    **Returns:** an `optax.GradientTransformationExtraArgs`; see
    `nodegrad.scale_by_snopt` for the `curvature` that its `update` takes, and what
    happens without it.

    **Raises:** as `nodegrad.scale_by_snopt`.

    **Cost:** that of `nodegrad.scale_by_snopt`, and of SGD.

    **When not to use it:** as `nodegrad.scale_by_snopt`. Parameters outside of layers
    get plain gradients here, for which a learning rate that suits the layers may be
    wrong: give them an optimiser of their own with `optax.partition`.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021.
    """
    return optax.chain(
        scale_by_snopt(
            preset,
            moment=moment,
            decay=decay,
            damping=damping,
            damping_mode=damping_mode,
            power=power,
            factor_decay=factor_decay,
            kl_clip=kl_clip,
            layers=layers,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def _next(count: Array) -> Any:
    return optax.safe_increment(count)


def _rule(preset: str, damping_mode: str | None, **given: Any) -> Rule:
    if preset not in _PRESETS:
        msg = f"`preset` must be one of {sorted(_PRESETS)}; got {preset!r}."
        raise ValueError(msg)
    given = {name: value for name, value in given.items() if value is not None}
    if damping_mode is not None:
        if damping_mode not in ("absolute", "relative"):
            msg = (
                "`damping_mode` must be 'absolute' or 'relative'; got "
                f"{damping_mode!r}."
            )
            raise ValueError(msg)
        given["relative"] = damping_mode == "relative"
    rule = _PRESETS[preset]._replace(**given)
    if rule.moment not in _MOMENTS:
        msg = f"`moment` must be one of {_MOMENTS}; got {rule.moment!r}."
        raise ValueError(msg)
    for name in ("decay", "factor_decay"):
        value = getattr(rule, name)
        if isinstance(value, int | float) and not 0 <= value < 1:
            msg = f"`{name}` must be in [0, 1); got {value}."
            raise ValueError(msg)
    if isinstance(rule.power, int | float) and not rule.power < 0:
        msg = f"`power` must be negative; got {rule.power}."
        raise ValueError(msg)
    for name in ("damping", "kl_clip"):
        value = getattr(rule, name)
        if isinstance(value, int | float) and not value >= 0:
            msg = f"`{name}` must not be negative; got {value}."
            raise ValueError(msg)
    return rule


def _refreshed(
    rule: Rule,
    layers: list[Layer],
    states: dict[str, LayerState],
    curvature: Mapping[str, KroneckerFactors],
) -> dict[str, LayerState]:
    """The states of all layers that `curvature` knows, in their new eigenbases."""
    if not isinstance(curvature, Mapping):
        msg = (
            "`curvature` must be a dictionary from the path of a layer to its "
            f"`nodegrad.KroneckerFactors`; got {type(curvature)}."
        )
        raise TypeError(msg)
    known = [layer for layer in layers if layer.key in curvature]
    if layers and not known:
        msg = (
            "None of the layers that `curvature` knows is being optimised: it has "
            f"{sorted(curvature)}, and the optimiser {sorted(states)}. Both are paths "
            "from the root of a model: pass the same model to "
            "`value_grad_and_curvature` and to `init`."
        )
        raise ValueError(msg)
    fresh = {}
    for layer in known:
        factors = _fitted(layer, curvature[layer.key])
        if rule.moment == "ekfac" and factors.draws is None:
            msg = (
                f"`moment='ekfac'` needs the `draws` of {layer.key}, and its curvature "
                "has none: pass `moments=True` to `value_grad_and_curvature`, or "
                "choose `moment='running'`."
            )
            raise ValueError(msg)
        fresh[layer.key] = refresh(rule, states[layer.key], factors)
    return {**states, **fresh}


def _fitted(layer: Layer, factors: KroneckerFactors) -> KroneckerFactors:
    """`factors`, checked; without the bias, if that is not being optimised."""
    *stack, d_out, d_in = layer.shape
    a, b, weight, draws = factors
    if layer.bias is None and a.shape == (*stack, d_in + 1, d_in + 1):
        a = a[..., :-1, :-1]
        draws = None if draws is None else draws[..., :-1]
    expected = (*stack, d_in, d_in), (*stack, d_out, d_out)
    if (a.shape, b.shape) != expected:
        msg = (
            f"The factors of {layer.key} must have shapes {expected}; got {a.shape} "
            f"and {b.shape}. (The input factor counts the bias, which comes last.)"
        )
        raise ValueError(msg)
    if draws is not None and draws.shape[1:] != layer.shape:
        msg = (
            f"The draws of {layer.key} must have shape {('K', *layer.shape)}; got "
            f"{draws.shape}."
        )
        raise ValueError(msg)
    weight = jnp.broadcast_to(weight, tuple(stack))
    return KroneckerFactors(a, b, weight, draws)
