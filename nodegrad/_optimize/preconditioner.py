r"""Preconditions the gradient of a layer with its Kronecker-factored curvature.

The curvature of a layer with weight matrix $W$ (`(d_out, d_in)`) is approximated by
$F \approx B \otimes A$, which acts on matrices as $G \mapsto B\, G\, A$. With
$A = U_A \Lambda_A U_A^\top$ and $B = U_B \Lambda_B U_B^\top$, the eigenvectors of $F$
are $U_B \otimes U_A$. In their basis $F$ multiplies elementwise with a matrix $S$ of
the shape of $W$: $S = \lambda_B \lambda_A^\top$, or better, the second moments of the
gradients in that basis (George et al. 2018, arXiv:1806.03884).

A `refresh` computes eigenbases from new factors. A step between refreshes only rotates
the gradient, scales its entries and rotates it back.

All arrays may have leading `*stack` axes, for layers stacked for a `jax.lax.scan`. The
functions treat each of the stacked layers by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from .._internal.tree import where
from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer


# A number, or a scalar array: `optax.inject_hyperparams` makes arrays of numbers.
Scalar = Real[ArrayLike, ""]


class LayerState(NamedTuple):
    """The state of the optimiser for one layer.

    - `input_basis`, `output_basis`: $U_A$ and $U_B$; an eigenvector is a column.
    - `second_moment`: $S$, in this basis.
    - `input_factor`, `output_factor`: running averages of $A / n$ and $B / n$, or
      `None` if the rule does not average factors.
    - `num_samples`: $n$, the batch size of the last refresh.
    - `num_refreshes`: the number of refreshes so far. If it is zero, the bases are
      identities.
    """

    input_basis: Float[Array, "*stack d_in d_in"]
    output_basis: Float[Array, "*stack d_out d_out"]
    second_moment: Float[Array, "*stack d_out d_in"]
    input_factor: Float[Array, "*stack d_in d_in"] | None
    output_factor: Float[Array, "*stack d_out d_out"] | None
    num_samples: Float[Array, "*stack"]
    num_refreshes: Int[Array, "*stack"]


class Rule(NamedTuple):
    """The arguments of `nodegrad.scale_by_snopt`; `relative` is its `damping_mode`."""

    moment: str
    decay: Scalar
    damping: Scalar
    relative: bool
    power: Scalar
    factor_decay: Scalar
    kl_clip: Scalar

    @property
    def averages_factors(self) -> bool:
        """Whether the state keeps running averages of the factors."""
        # The structure of the state depends on this, so the value must be static: an
        # array of zero keeps averages, and gives them no weight.
        is_number = isinstance(self.factor_decay, int | float)
        return not (is_number and self.factor_decay == 0)


def initial_state(layer: Layer, dtype: Any, rule: Rule) -> LayerState:
    """Returns the state before the first refresh: identity eigenbases, zero moments."""
    *stack, d_out, d_in = layer.shape
    eye = lambda d: jnp.broadcast_to(jnp.eye(d, dtype=dtype), (*stack, d, d))
    factor = lambda d: jnp.zeros((*stack, d, d), dtype)
    return LayerState(
        input_basis=eye(d_in),
        output_basis=eye(d_out),
        second_moment=jnp.zeros((*stack, d_out, d_in), dtype),
        input_factor=factor(d_in) if rule.averages_factors else None,
        output_factor=factor(d_out) if rule.averages_factors else None,
        num_samples=jnp.ones(stack, dtype),
        num_refreshes=jnp.zeros(stack, jnp.int32),
    )


def refresh(rule: Rule, state: LayerState, factors: KroneckerFactors) -> LayerState:
    """Returns `state` in the eigenbases of new factors.

    A (stacked) layer keeps its old state if anything new is not finite, or if one of
    its factors is zero, as those of a layer that was not called.
    """
    dtype = state.second_moment.dtype
    factors = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), factors)
    is_first = state.num_refreshes == 0
    samples = factors.weight[..., None, None]
    a, b = factors.input_factor / samples, factors.output_factor / samples
    # Before averaging: an average with an old factor would hide a zero one.
    ok = _is_usable(a) & _is_usable(b) & (factors.weight > 0)
    if rule.averages_factors:
        assert state.input_factor is not None and state.output_factor is not None
        share = jnp.where(is_first, 0, _as(rule.factor_decay, dtype))[..., None, None]
        a = share * state.input_factor + (1 - share) * a
        b = share * state.output_factor + (1 - share) * b
    input_values, input_basis, input_ok = _eigenbasis(a)
    output_values, output_basis, output_ok = _eigenbasis(b)
    # (*stack, d_out, d_in)
    moment = output_values[..., :, None] * input_values[..., None, :]
    if rule.moment == "ekfac":
        # (draws, *stack, d_out, d_in); `scale_by_snopt.py` raises if there are none.
        assert factors.draws is not None
        drawn = _rotated(output_basis, factors.draws, input_basis)
        old = _moved_moment(state, output_basis, input_basis)
        # Otherwise one gradient with a NaN would make all later moments NaN.
        is_lost = ~jnp.all(jnp.isfinite(old), axis=(-1, -2))
        old = jnp.where((is_first | is_lost)[..., None, None], moment, old)
        keep = _as(rule.decay, dtype)
        # The squares of all draws estimate a sum over samples, see `factors.py`.
        moment = keep * old + (1 - keep) * jnp.sum(drawn**2, axis=0) / samples
    finite = jnp.all(jnp.isfinite(moment), axis=(-1, -2))
    new = LayerState(
        input_basis=input_basis,
        output_basis=output_basis,
        second_moment=moment,
        input_factor=a if rule.averages_factors else None,
        output_factor=b if rule.averages_factors else None,
        num_samples=factors.weight,
        num_refreshes=state.num_refreshes + 1,
    )
    return where(ok & input_ok & output_ok & finite, new, state)


def precondition(
    rule: Rule, state: LayerState, gradient: Array, mean: Array | None = None
) -> tuple[Array, LayerState]:
    r"""Returns the preconditioned gradient, and `state` with the new second moment.

    The first is $U_B [(S + \varepsilon)^p \odot (U_B^\top G\, U_A)] U_A^\top$ in the
    dtype of the state, with $p$ the power and $\varepsilon$ the damping. Before the
    first refresh $p$ is -1/2 and the bases are identities: the rule is RMSprop. If
    there is a `mean` of gradients, it takes the place of $G$ there, but not in $S$.
    """
    dtype = state.second_moment.dtype
    rotated = _rotated(state.output_basis, gradient.astype(dtype), state.input_basis)
    never_refreshed = (state.num_refreshes == 0)[..., None, None]
    decay = _as(rule.decay, dtype)
    # The gradient is a mean over n samples. If the samples have independent gradients
    # with mean zero, its square is on average 1 / n of the mean of their squares.
    squared = state.num_samples[..., None, None] * rotated**2
    running = decay * state.second_moment + (1 - decay) * squared
    if rule.moment == "kronecker":
        moment = jnp.where(never_refreshed, running, state.second_moment)
    else:
        moment = running
    if mean is not None:
        rotated = _rotated(state.output_basis, mean.astype(dtype), state.input_basis)
    scaled = _scaled(rule, moment, rotated, never_refreshed, (-1, -2))
    out = _rotated_back(state.output_basis, scaled, state.input_basis)
    return out, state._replace(second_moment=moment)


def precondition_rest(
    rule: Rule,
    moment: Float[Array, "*shape"],
    gradient: Array,
    mean: Array,
    num_samples: Float[Array, ""],
    count: Int[Array, ""],
    never_refreshed: Bool[Array, ""],
) -> tuple[Array, Float[Array, "*shape"]]:
    """Returns the preconditioned `mean` of gradients of an array outside of layers.

    The rule is that for a layer whose eigenbases are identities. No refresh sets the
    `moment` of such an array: it is a running mean that started at zero, and is
    corrected for that as in Adam. The second result is the new one. `count` is the
    number of gradients, with this one.
    """
    dtype = moment.dtype
    decay = _as(rule.decay, dtype)
    squared = num_samples.astype(dtype) * jnp.abs(gradient).astype(dtype) ** 2
    moment = decay * moment + (1 - decay) * squared
    unbiased = moment / (1 - decay ** count.astype(dtype))
    scaled = _scaled(rule, unbiased, jnp.ones_like(moment), never_refreshed, None)
    return mean * scaled.astype(mean.dtype), moment


def _scaled(
    rule: Rule,
    moment: Array,
    rotated: Array,
    never_refreshed: Bool[Array, "..."],
    axes: tuple[int, ...] | None,
) -> Array:
    r"""Returns $(S + \varepsilon)^p$ times `rotated`; $S$ is `moment`.

    A relative damping is a part of the mean of `moment` over `axes`.
    """
    dtype = moment.dtype
    damping = _as(rule.damping, dtype)
    if rule.relative:
        damping = damping * jnp.mean(moment, axis=axes, keepdims=True)
    power = jnp.where(never_refreshed, -0.5, _as(rule.power, dtype)).astype(dtype)
    # Where the moment and the damping are both zero, all gradients were zero, or are
    # forgotten.
    size = moment + damping
    known = size > 0
    return jnp.where(known, rotated * jnp.where(known, size, 1) ** power, 0)


def clip(rule: Rule, steps: list[Array], gradients: list[Array]) -> list[Array]:
    r"""Returns all steps times $\min(1, \sqrt{\kappa / \sum \langle u, g \rangle})$.

    $u$ are the steps and $g$ the gradients, one array for each layer, $\kappa$ is
    `kl_clip`, and the sum runs over all layers.
    """
    # An infinite bound is known before tracing, and costs nothing.
    if not steps or (isinstance(rule.kl_clip, float) and rule.kl_clip == float("inf")):
        return steps
    dtype = jnp.result_type(*(step.dtype for step in steps))
    total = jnp.zeros((), dtype)
    for step, gradient in zip(steps, gradients, strict=True):
        total = total + jnp.sum(step * gradient.astype(step.dtype)).astype(dtype)
    floor = jnp.finfo(dtype).tiny
    ratio = _as(rule.kl_clip, dtype) / jnp.maximum(total, floor)
    scale = jnp.minimum(1, jnp.sqrt(ratio))
    return [step * scale.astype(step.dtype) for step in steps]


def precondition_layers(
    rule: Rule,
    layers: list[Layer],
    states: dict[str, LayerState],
    gradients: list[Float[Array, "*stack d_out d_in"]],
    means: list[Float[Array, "*stack d_out d_in"]] | None = None,
) -> tuple[list[Float[Array, "*stack d_out d_in"]], dict[str, LayerState]]:
    """Returns the preconditioned, clipped steps of `layers` and their new states.

    They are those of `means` of gradients, if there are any.
    """
    if states and not layers:
        msg = (
            f"The updates have none of the layers {sorted(states)}, with which the "
            "optimiser was initialised: pass trees of one structure to both."
        )
        raise ValueError(msg)
    states, steps = dict(states), []
    followed = [None] * len(layers) if means is None else means
    for layer, gradient, mean in zip(layers, gradients, followed, strict=True):
        step, states[layer.key] = precondition(rule, states[layer.key], gradient, mean)
        steps.append(step)
    return clip(rule, steps, gradients), states


def initial_states(
    rule: Rule, layers: list[Layer], dtypes: dict[str, Any]
) -> dict[str, LayerState]:
    """Returns the first states of `layers`; `dtypes` are those of their weights."""
    return {
        layer.key: initial_state(layer, dtypes[layer.weight], rule) for layer in layers
    }


def _eigenbasis(
    factor: Float[Array, "*stack d d"],
) -> tuple[Float[Array, "*stack d"], Float[Array, "*stack d d"], Bool[Array, "*stack"]]:
    """Returns `(eigenvalues, eigenvectors, is_usable)` of symmetric matrices.

    The last result has the shape `stack`. Where it is false, the others are arbitrary.
    """
    usable = _is_usable(factor)
    symmetric = (factor + jnp.swapaxes(factor, -1, -2)) / 2
    size = jnp.where(usable, _trace(factor) / factor.shape[-1], 1)
    # Divide by the mean eigenvalue: factors may be as small as squared gradients, and
    # could underflow inside of `eigh`. Unusable factors are replaced by identity
    # matrices, so that `eigh` gets finite numbers.
    scaled = jnp.where(
        usable[..., None, None], symmetric / size[..., None, None], _eye_like(factor)
    )
    values, vectors = jnp.vectorize(eigh, signature="(d,d)->(d),(d,d)")(scaled)
    found = jnp.all(jnp.isfinite(vectors), axis=(-1, -2))
    found = found & jnp.all(jnp.isfinite(values), axis=-1)
    # Rounding may make eigenvalues of a semidefinite matrix negative.
    return jnp.maximum(values, 0) * size[..., None], vectors, usable & found


@jax.custom_batching.sequential_vmap
def eigh(
    matrix: Float[Array, "d d"],
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Returns the eigenvalues and eigenvectors of a symmetric matrix."""
    # One matrix after the other, also under `jax.vmap`. On CPUs, XLA splits a batch of
    # decompositions among the threads of the pool that runs it. Where these threads run
    # two such batches, both wait for a free thread, and the program hangs: seen with
    # `jax.vmap` over ten models on two cores, JAX 0.10.2.
    return jnp.linalg.eigh(matrix, symmetrize_input=False)


def _is_usable(factor: Float[Array, "*stack d d"]) -> Bool[Array, "*stack"]:
    """Returns whether a factor is finite and not zero (they are semidefinite)."""
    return jnp.all(jnp.isfinite(factor), axis=(-1, -2)) & (_trace(factor) > 0)


def _trace(factor: Float[Array, "*stack d d"]) -> Float[Array, "*stack"]:
    return jnp.trace(factor, axis1=-2, axis2=-1)


def _eye_like(x: Float[Array, "*stack d d"]) -> Float[Array, "*stack d d"]:
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def _moved_moment(state: LayerState, output_basis: Array, input_basis: Array) -> Array:
    """Returns the second moment in new bases, `(*stack, d_out, d_in)`.

    The curvature that is diagonal in the old bases is not diagonal in the new ones.
    This is its diagonal there.
    """
    # Orthogonal matrices between the bases; their squared entries mix the moments.
    from_output = jnp.swapaxes(output_basis, -1, -2) @ state.output_basis
    from_input = jnp.swapaxes(input_basis, -1, -2) @ state.input_basis
    return from_output**2 @ state.second_moment @ jnp.swapaxes(from_input**2, -1, -2)


def _rotated(left: Array, matrix: Array, right: Array) -> Array:
    """Returns `left.T @ matrix @ right`; `matrix` may have more leading axes."""
    return jnp.einsum("...ji,...jk,...kl->...il", left, matrix, right)


def _rotated_back(left: Array, matrix: Array, right: Array) -> Array:
    """Returns `left @ matrix @ right.T`, the inverse of `_rotated`."""
    return jnp.einsum("...ij,...jk,...lk->...il", left, matrix, right)


def _as(x: Scalar, dtype: Any) -> Array:
    return jnp.asarray(x).astype(dtype)
