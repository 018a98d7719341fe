"""The statistics of a layer, and the Kronecker factors of its curvature."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Statistics(NamedTuple):
    r"""The statistics of a layer; also their probes, or the positions of these.

    - `inputs`: $\sum x x^\top$, of shape `(d_in, d_in)`.
    - `outputs`: $\sum g g^\top$, of shape `(d_out, d_out)`.
    - `count`: the number of rows, a scalar.
    - `x_sum`: $\sum x$, of shape `(d_in,)`.
    - `g_sum`: $\sum g$, of shape `(d_out,)`.

    `d_in` counts the input of the bias, which comes last.
    """

    # Not generic: run-time type checkers cannot check a generic named tuple.
    inputs: Any
    outputs: Any
    count: Any
    x_sum: Any
    g_sum: Any


class KroneckerFactors(NamedTuple):
    r"""The curvature of one layer, as sums over the samples of a batch.

    $A = \sum_b A_b$ is a sum over samples of outer products of the inputs of the layer
    (with an entry of one for its bias). $B = \sum_b B_b$ is the same for the gradients
    with respect to the outputs of the layer. See `nodegrad.value_grad_and_curvature`
    for the definitions. For $n$ samples the curvature of the layer is
    $F \approx \frac{B}{n} \otimes \frac{A}{n}$, which acts on matrices $G$ of shape
    `(d_out, d_in)` as $G \mapsto B\,G\,A / n^2$.

    Every field is a sum over samples. To combine the samples of several batches or
    devices, add the fields (`jax.tree.map(jnp.add, ...)`, `jax.lax.psum`). If the
    fields depend on a random key, use a different key for each part.

    **Arguments:**

    - `input_factor`: $A$, of shape `(*stack, d_in, d_in)`. `d_in` counts one for the
      bias, which comes last. `stack` is empty unless layers are stacked for a
      `jax.lax.scan`.
    - `output_factor`: $B$, of shape `(*stack, d_out, d_out)`.
    - `weight`: $n$, of shape `stack`.
    - `draws`: `None`, or $K$ matrices $P_k$, of shape `(K, *stack, d_out, d_in)`. In
      every basis, $\sum_k P_k \odot P_k$ has the same expectation as the sum over
      samples of the squared gradients. EKFAC takes second moments from it.

    **Memory:** $d_{in}^2 + d_{out}^2$ numbers, and $K d_{in} d_{out}$ for `draws`.
    """

    input_factor: Float[Array, "*stack d_in d_in"]
    output_factor: Float[Array, "*stack d_out d_out"]
    weight: Float[Array, "*stack"]
    draws: Float[Array, "draws *stack d_out d_in"] | None = None
