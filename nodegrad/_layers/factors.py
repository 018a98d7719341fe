"""Kronecker factors of the curvature of a layer."""

from typing import NamedTuple

from jaxtyping import Array, Float


class KroneckerFactors(NamedTuple):
    r"""The curvature of one layer, as sums over the samples of a batch.

    With $a$ the inputs of the layer (and a one for its bias) and $g$ the gradients with
    respect to its outputs, $A = \sum_b A_b$ and $B = \sum_b B_b$ are sums over samples
    of what `nodegrad.value_grad_and_curvature` says, and
    $F \approx \frac{B}{n} \otimes \frac{A}{n}$ for $n$ samples, acting as
    $G \mapsto B\,G\,A / n^2$ on matrices $G$ of shape `(d_out, d_in)`. Add the fields
    of several devices or batches (`jax.tree.map(jnp.add, ...)`, `jax.lax.psum`) to have
    those of all their samples (of random ones, with another key for each part).

    **Arguments:**

    - `input_factor`: $A$, of shape `(*stack, d_in, d_in)`; `d_in` counts one for the
      bias, which comes last. `stack` is empty but for layers stacked for a
      `jax.lax.scan`.
    - `output_factor`: $B$, of shape `(*stack, d_out, d_out)`.
    - `weight`: $n$, of shape `stack`.
    - `draws`: `None`, or $K$ matrices $P_k$, `(K, *stack, d_out, d_in)`, such that
      $\sum_k P_k \odot P_k$ has the expectation of the sum over samples of the squared
      gradients, and so in every basis: what EKFAC takes its moments from.

    **Cost:** none; this is a container.
    """

    input_factor: Float[Array, "*stack d_in d_in"]
    output_factor: Float[Array, "*stack d_out d_out"]
    weight: Float[Array, "*stack"]
    draws: Float[Array, "draws *stack d_out d_in"] | None = None
