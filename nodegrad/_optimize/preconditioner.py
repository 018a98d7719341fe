r"""Kronecker-factored curvature of a layer, and preconditioning with it.

The curvature of a layer with weight matrix $W$ (`(d_out, d_in)`) is approximated by
$F \approx B \otimes A$, which acts on matrices as $G \mapsto B\, G\, A$. With
$A = U_A \Lambda_A U_A^\top$ and $B = U_B \Lambda_B U_B^\top$ its eigenvectors are
$U_B \otimes U_A$, and in their basis $F$ is the elementwise product with a matrix $S$
of the shape of $W$: $S = \lambda_B \lambda_A^\top$, or better, the second moments of
the gradients in that basis (George et al. 2018, arXiv:1806.03884).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._internal.tree import where
from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer


class LayerState(NamedTuple):
    """What the optimiser knows of one layer.

    The factors are running averages, or `None` where nothing is averaged;
    `num_samples` is that of the batch of the last refresh.
    """

    input_basis: Float[Array, "*stack d_in d_in"]
    output_basis: Float[Array, "*stack d_out d_out"]
    second_moment: Float[Array, "*stack d_out d_in"]
    input_factor: Any
    output_factor: Any
    num_samples: Float[Array, "*stack"]
    num_refreshes: Int[Array, "*stack"]


class Rule(NamedTuple):
    """How curvature is turned into a step; see `nodegrad.scale_by_snopt`."""

    moment: str
    decay: Any
    damping: Any
    relative: bool
    power: Any
    factor_decay: Any
    kl_clip: Any

    @property
    def averages_factors(self) -> bool:
        """Whether factors of earlier refreshes are remembered."""
        return not (isinstance(self.factor_decay, float) and self.factor_decay == 0)


def initial_state(layer: Layer, dtype, rule: Rule) -> LayerState:
    """A layer nothing is known of: the basis is that of its entries."""
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
    """`state` in the eigenbasis of new factors; unchanged if they are of no use.

    They are of none if anything is not finite, or if a factor is zero.
    """
    dtype = state.second_moment.dtype
    factors = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), factors)
    is_first = state.num_refreshes == 0
    samples = factors.weight[..., None, None]
    a, b = factors.input_factor / samples, factors.output_factor / samples
    ok = _is_usable(a) & _is_usable(b) & (factors.weight > 0)
    if rule.averages_factors:
        share = jnp.where(is_first, 0, _as(rule.factor_decay, dtype))[..., None, None]
        a = share * state.input_factor + (1 - share) * a
        b = share * state.output_factor + (1 - share) * b
    input_values, input_basis, input_ok = _eigenbasis(a)
    output_values, output_basis, output_ok = _eigenbasis(b)
    moment = output_values[..., :, None] * input_values[..., None, :]
    if rule.moment == "ekfac":
        assert factors.draws is not None
        drawn = _rotated(output_basis, factors.draws, input_basis)
        old = _moved_moment(state, output_basis, input_basis)
        # A gradient with a NaN would else be remembered for ever.
        is_lost = ~jnp.all(jnp.isfinite(old), axis=(-1, -2))
        old = jnp.where((is_first | is_lost)[..., None, None], moment, old)
        keep = _as(rule.decay, dtype)
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
    rule: Rule, state: LayerState, gradient: Array
) -> tuple[Array, LayerState]:
    """`gradient` times the inverse of the damped curvature, or a power of it."""
    dtype = state.second_moment.dtype
    rotated = _rotated(state.output_basis, gradient.astype(dtype), state.input_basis)
    is_blind = (state.num_refreshes == 0)[..., None, None]
    decay = _as(rule.decay, dtype)
    seen = state.num_samples[..., None, None] * rotated**2
    running = decay * state.second_moment + (1 - decay) * seen
    follows = rule.moment != "kronecker"
    moment = running if follows else jnp.where(is_blind, running, state.second_moment)
    damping = _as(rule.damping, dtype)
    if rule.relative:
        damping = damping * jnp.mean(moment, axis=(-1, -2), keepdims=True)
    power = jnp.where(is_blind, -0.5, _as(rule.power, dtype)).astype(dtype)
    # All that is zero then is the gradient, too.
    floor = jnp.finfo(dtype).tiny
    scaled = rotated * (moment + damping + floor) ** power
    out = _rotated_back(state.output_basis, scaled, state.input_basis)
    return out, state._replace(second_moment=moment)


def clip(rule: Rule, steps: list[Array], gradients: list[Array]) -> list[Array]:
    r"""All steps times $\min(1, \sqrt{\kappa / \sum \langle u, g \rangle})$."""
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


def _eigenbasis(factor: Array) -> tuple[Array, Array, Array]:
    """`(eigenvalues, eigenvectors, whether they can be used)`."""
    usable = _is_usable(factor)
    symmetric = (factor + jnp.swapaxes(factor, -1, -2)) / 2
    size = jnp.where(usable, _trace(factor) / factor.shape[-1], 1)
    # Scaled, because the factors may be as small as a squared gradient.
    scaled = jnp.where(
        usable[..., None, None], symmetric / size[..., None, None], _eye_like(factor)
    )
    values, vectors = jnp.linalg.eigh(scaled, symmetrize_input=False)
    found = jnp.all(jnp.isfinite(vectors), axis=(-1, -2))
    found = found & jnp.all(jnp.isfinite(values), axis=-1)
    return jnp.maximum(values, 0) * size[..., None], vectors, usable & found


def _is_usable(factor: Array) -> Array:
    return jnp.all(jnp.isfinite(factor), axis=(-1, -2)) & (_trace(factor) > 0)


def _trace(factor: Array) -> Array:
    return jnp.trace(factor, axis1=-2, axis2=-1)


def _eye_like(x: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def _moved_moment(state: LayerState, output_basis: Array, input_basis: Array) -> Array:
    """The diagonal in a new basis of what is diagonal in the old one."""
    from_output = jnp.swapaxes(output_basis, -1, -2) @ state.output_basis
    from_input = jnp.swapaxes(input_basis, -1, -2) @ state.input_basis
    return from_output**2 @ state.second_moment @ jnp.swapaxes(from_input**2, -1, -2)


def _rotated(left: Array, matrix: Array, right: Array) -> Array:
    return jnp.einsum("...ji,...jk,...kl->...il", left, matrix, right)


def _rotated_back(left: Array, matrix: Array, right: Array) -> Array:
    return jnp.einsum("...ij,...jk,...lk->...il", left, matrix, right)


def _as(x: Any, dtype) -> PyTree:
    return jnp.asarray(x).astype(dtype)
