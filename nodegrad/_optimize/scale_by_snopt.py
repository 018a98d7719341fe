"""`scale_by_snopt`: Kronecker curvature as a preconditioner, an optax transformation.

It does not depend on differential equations. The curvature is an extra argument of
`update`, from `nodegrad.value_grad_and_curvature` or from another source.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .._internal.tree import check_numbers
from .._layers.factors import KroneckerFactors
from .._layers.layers import chosen_layers, Layer, Leaves
from .preconditioner import (
    initial_states,
    LayerState,
    precondition_layers,
    refresh,
    Rule,
    Scalar,
)


class SNOptState(NamedTuple):
    """The state of `nodegrad.scale_by_snopt`. All leaves are arrays.

    **Arguments:**

    - `count`: the number of updates so far.
    - `layers`: for each layer, by its path, its eigenbases `input_basis` and
      `output_basis`, the `second_moment` in them, the running averages `input_factor`
      and `output_factor` (or `None`), `num_samples` and `num_refreshes`.

    **Memory:** per layer $2 (d_{in}^2 + d_{out}^2) + d_{in} d_{out}$ numbers, of at
    least 32 bits; half of the squares with `factor_decay=0.0`.
    """

    count: Int[Array, ""]
    layers: dict[str, LayerState]


# "paper" has the settings of the published code; its damping is in units of squared
# gradients. "robust" has relative damping, averages over about 20 updates and 10
# refreshes against the noise of batches, and clips steps where the curvature is too
# small. `scripts/benchmarks/training.py` compares the two.
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
    decay: Scalar | None = None,
    damping: Scalar | None = None,
    damping_mode: str | None = None,
    power: Scalar | None = None,
    factor_decay: Scalar | None = None,
    kl_clip: Scalar | None = None,
    layers: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of Kronecker-factored curvature.

    For every layer with weight (and bias) matrix $W$ and gradient $G$, the step is

    $$\Delta W = U_B \left[ (S + \varepsilon)^{p} \odot (U_B^\top G\, U_A) \right]
      U_A^\top.$$

    $U_A$, $U_B$ are the eigenbases of the factors that `update` received last, $S$ the
    eigenvalues of the curvature, $\varepsilon$ the `damping` and $p$ the `power`.
    Leaves outside of layers, and layers that `layers` excludes, pass through unchanged.
    An array whose whole gradient is zero is not moved.
    In an `optax.chain` the order is `scale_by_snopt`, `optax.add_decayed_weights`,
    `optax.trace`, `optax.scale_by_learning_rate`, as in `nodegrad.snopt`.

    Compile updates with and without curvature as two functions: `nodegrad.make_steps`.

    **Example:** one step with $A = \mathrm{diag}(4, 1)$, $B = 1$ and no damping.

    ```python
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import nodegrad

    model = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.PRNGKey(0))
    optim = nodegrad.scale_by_snopt("paper", moment="kronecker", damping=0.0)
    a, b, num_samples = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1), jnp.array(1.0)
    curvature = {"": nodegrad.KroneckerFactors(a, b, num_samples)}
    grads = eqx.tree_at(lambda m: m.weight, model, jnp.array([[4.0, 3.0]]))
    step, _ = optim.update(grads, optim.init(model), curvature=curvature)
    print(step.weight.round(3))  # [[1. 3.]]
    ```

    **Arguments:**

    - `preset`: the values of the other arguments where they are `None`. `"paper"`:
      `moment="running"`, `decay=0.75`, `damping=0.05`, `damping_mode="absolute"`,
      `power=-1`, no averaging, no clip. `"robust"`: `moment="ekfac"`, `decay=0.95`,
      `damping=0.1`, `damping_mode="relative"`, `power=-1`, `factor_decay=0.9`,
      `kl_clip=1`.
    - `moment`: what $S$ is. `"running"`: $\lambda_B \lambda_A^\top$ at a refresh, and
      then at every update $S \leftarrow \alpha S + (1 - \alpha)\, n\, \hat G^2$, with
      $\hat G = U_B^\top G U_A$, $n$ the samples of a batch and $\alpha$ the `decay`.
      `"ekfac"`: the same, but a refresh expresses $S$ in the new basis, and averages
      it, with $\alpha$ again, with the second moments of the samples' gradients. This
      requires `draws`. `"kronecker"`: always $\lambda_B \lambda_A^\top$.
    - `damping`: $\varepsilon$. With `damping_mode="absolute"` it is in units of squared
      gradients; with `"relative"` it is multiplied by the mean of $S$ of the layer.
    - `power`: $-1$ for a natural gradient, $-1/2$ for a step like that of Adam.
    - `factor_decay`: the share of $A$ and $B$ that a refresh keeps; `0.0` for none.
    - `kl_clip`: $\kappa$. All steps are multiplied by
      $\min(1, \sqrt{\kappa / \sum \langle \Delta W, G \rangle})$, with the sum over
      layers: a trust region as in K-FAC. For `power=-1` the sum is the squared length
      of the step in the metric of the curvature. `jnp.inf` disables it.
    - `layers`: which layers to include, by their path (`jax.tree_util.keystr`).

    **Returns:** an `optax.GradientTransformationExtraArgs`, whose `update` takes
    `curvature`, a dictionary from the path of a layer to its
    `nodegrad.KroneckerFactors`. Layers that are missing there, or whose factors are
    zero or not finite, keep their bases. Before the first refresh of a layer, the
    entries of its gradient are divided by their running root mean square (RMSprop).

    **Raises:** `ValueError` for unknown presets, moments and modes, and for curvature
    that does not fit: of other shapes, of none of the layers, or without `draws` for
    `moment="ekfac"`.

    **Cost:** per update and layer four products of $W$ with a square matrix; a refresh
    also computes the eigenvectors of two square matrices. State: see
    `nodegrad.SNOptState`.

    **When not to use it:** for layers wider than a few thousand, and for models whose
    parameters are not in layers (it leaves them unchanged). It does not remove `NaN`s
    from gradients: use `optax.apply_if_finite`. Inside of `optax.MultiSteps` only the
    curvature that is passed with the last of the mini-batches is used.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021,
        equation (14); George, Laurent, Bouthillier, Ballas, Vincent: Fast Approximate
        Natural Gradient Descent in a Kronecker-factored Eigenbasis, NeurIPS 2018.
    """
    rule = rule_of(
        preset,
        damping_mode,
        moment=moment,
        decay=decay,
        damping=damping,
        power=power,
        factor_decay=factor_decay,
        kl_clip=kl_clip,
    )

    chosen = chosen_layers(layers)

    # States are `Any` for type checkers: Optax's type of states excludes named tuples.
    def init_fn(params: PyTree) -> Any:
        return initial_snopt_state(rule, chosen, params)

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        curvature: Mapping[str, KroneckerFactors] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del params, extra
        # Whether there is a curvature is known when this is traced, so that steps
        # without it do not contain the eigenvalue problems.
        if curvature is not None:
            state = refreshed(rule, chosen, updates, state, curvature)
        return preconditioned(rule, chosen, updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


Chosen = Callable[[PyTree], list[Layer]]


def initial_snopt_state(rule: Rule, chosen: Chosen, params: PyTree) -> Any:
    """Returns the state before the first update."""
    count = jnp.zeros((), jnp.int32)
    if not jax.tree.leaves(params):
        # `optax.tree_map_params` passes a placeholder for the parameters, and must
        # find it where the state depends on them.
        return SNOptState(count, params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not jnp.issubdtype(getattr(leaf, "dtype", object), jnp.inexact):
            msg = (
                f"`init` takes arrays of floating point numbers; got {leaf!r} at "
                f"{jax.tree_util.keystr(path)}. "
                "Pass `eqx.filter(model, eqx.is_inexact_array)`."
            )
            raise TypeError(msg)
    states = initial_states(rule, chosen(params), Leaves(params).dtypes)
    return SNOptState(count, states)


def refreshed(
    rule: Rule,
    chosen: Chosen,
    updates: PyTree,
    state: Any,
    curvature: Mapping[str, KroneckerFactors],
) -> Any:
    """Returns `state` in the eigenbases of `curvature`; raises if that does not fit."""
    if not isinstance(state.layers, dict):
        return state
    layers = _refreshed(rule, chosen(updates), state.layers, curvature)
    return state._replace(layers=layers)


def preconditioned(
    rule: Rule, chosen: Chosen, updates: PyTree, state: Any, means: PyTree | None = None
) -> tuple[PyTree, Any]:
    """Returns the preconditioned `updates`, and `state` with the new moments.

    If there are `means` of updates, they are preconditioned instead. The moments are
    still those of `updates`.
    """
    out = updates if means is None else means
    # A state made from no parameters at all: there is no layer.
    if not isinstance(state.layers, dict):
        return out, state._replace(count=_next(state.count))
    found, leaves = chosen(updates), Leaves(out)
    matrices = lambda tree: [Leaves(tree).matrix(layer) for layer in found]
    steps, states = precondition_layers(
        rule,
        found,
        state.layers,
        matrices(updates),
        None if means is None else matrices(means),
    )
    steps = jax.tree.map(_unless_frozen, leaves.with_matrices(found, steps), out)
    return steps, SNOptState(_next(state.count), states)


def _unless_frozen(step: Array, gradient: Array) -> Array:
    """Returns `step`, or zero where the whole `gradient` of an array is zero.

    Eigenvectors mix a weight with its bias, of which the user may freeze one.
    """
    return jnp.where(jnp.any(gradient != 0), step, 0)


def _next(count: Array) -> Any:
    return optax.safe_increment(count)


def rule_of(preset: str, damping_mode: str | None, **given: Any) -> Rule:
    """Returns the preset with the fields that are `given`; raises for wrong ones."""
    if preset not in _PRESETS:
        msg = f"`preset` must be one of {sorted(_PRESETS)}; got {preset!r}."
        raise ValueError(msg)
    given = {name: value for name, value in given.items() if value is not None}
    check_numbers(**{name: x for name, x in given.items() if name != "moment"})
    if damping_mode is not None:
        if damping_mode not in ("absolute", "relative"):
            msg = (
                "`damping_mode` must be 'absolute' or 'relative'; got "
                f"{damping_mode!r}."
            )
            raise ValueError(msg)
        given["relative"] = damping_mode == "relative"
    rule = _PRESETS[preset]._replace(**given)
    # Arrays may be traced, so only Python numbers are compared.
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
    """Returns `states`, with those of the layers in `curvature` refreshed."""
    if not isinstance(curvature, Mapping):
        msg = (
            "`curvature` must be a dictionary from the path of a layer to its "
            f"`nodegrad.KroneckerFactors`; got {type(curvature)}."
        )
        raise TypeError(msg)
    known = [layer for layer in layers if layer.key in curvature]
    if layers and not known:
        msg = (
            "None of the layers in `curvature` is being optimised: it has the layers "
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
                f"`moment='ekfac'` needs the `draws` of {layer.name}, and its "
                "curvature has none: pass `moments=True` to `make_steps` (or to "
                "`value_grad_and_curvature`), or choose `moment='running'`."
            )
            raise ValueError(msg)
        fresh[layer.key] = refresh(rule, states[layer.key], factors)
    return {**states, **fresh}


def _fitted(layer: Layer, factors: KroneckerFactors) -> KroneckerFactors:
    """Returns `factors`, without the bias if it is not optimised; raises for shapes."""
    *stack, d_out, d_in = layer.shape
    a, b, weight, draws = factors
    # The bias is masked or frozen here, but was part of the model of the curvature.
    if layer.bias is None and a.shape == (*stack, d_in + 1, d_in + 1):
        a = a[..., :-1, :-1]
        draws = None if draws is None else draws[..., :-1]
    expected = (*stack, d_in, d_in), (*stack, d_out, d_out)
    if (a.shape, b.shape) != expected:
        msg = (
            f"The factors of {layer.name} must have shapes {expected}; got {a.shape} "
            f"and {b.shape}. (The input factor counts the bias, which comes last.)"
        )
        raise ValueError(msg)
    if draws is not None and draws.shape[1:] != layer.shape:
        msg = (
            f"The draws of {layer.name} must have shape {('K', *layer.shape)}; got "
            f"{draws.shape}."
        )
        raise ValueError(msg)
    weight = jnp.broadcast_to(weight, tuple(stack))
    return KroneckerFactors(a, b, weight, draws)
