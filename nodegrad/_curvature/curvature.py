"""Loss, gradient and Kronecker-factored curvature in one go."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PyTree

from .._layers.factors import KroneckerFactors
from .._layers.layers import Layer, layers_of, Leaves
from .instrumented_model import Instrumentation, instrumented, Probe, zero_probe


_KINDS = ("empirical_fisher", "ggn")
_REDUCTIONS = ("integral", "expand", "reduce")


def value_grad_and_curvature(
    loss: Callable[..., Any],
    *,
    predict: Callable[..., Any] | None = None,
    kind: str = "empirical_fisher",
    reduction: str = "integral",
    num_draws: int | str = 1,
    moments: bool = False,
    batch_size: int | None = None,
    layers: Callable[[str], bool] | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree, dict[str, KroneckerFactors]]]:
    r"""A function for loss, gradient and the Kronecker factors of every layer.

    For any model whose `eqx.nn.Linear`, `eqx.nn.Conv*`, `eqx.nn.GRUCell` and
    `eqx.nn.LSTMCell` are used inside of vector fields solved by nodegrad, outside of
    them, or both, and in whatever way: several times, in `jax.vmap`, `jax.lax.scan`,
    `jax.checkpoint`, under `jax.jvp` or `jax.vjp` in the vector field.

    ```python
    def loss(model, x, labels):  # one number for each sample
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels)

    value, grads, curvature = value_grad_and_curvature(loss)(model, x, labels)
    ```

    With $a$ the inputs of a layer (and a one for its bias) and $g$ the gradients with
    respect to its outputs, for a sample's own loss, the factors are

    $$A = \sum_b \int a\, a^\top dt, \qquad B = \sum_b \int g\, g^\top dt$$

    over time and all samples $b$. The integrals are taken by the trapezoidal rule over
    the accepted steps, from the states and cotangents at their ends, never from the
    stages of the solver: they have a limit for small steps, which does not depend on
    the solver. A use outside of a solve counts as one unit of time, and uses (positions
    of a convolution, several solves) are summed.

    **Arguments:**

    - `loss`: `loss(model, *args)` returns the losses of the samples of a batch, an
      array of shape `(batch,)`; or their mean, a scalar, if you say of how many with
      `batch_size`. What it returns is called a loss here even if a regulariser is in
      it.
    - `predict`: for `kind="ggn"`: `predict(model, *args)` returns the outputs of the
      model, an array of shape `(batch, ...)`, and `loss(outputs, *args)` the losses,
      `(batch,)`, each a function of its sample's output: any, twice differentiable.
    - `kind`: where the gradients $g$ come from. `"empirical_fisher"`: from the losses.
      `"ggn"`: from random or all columns of a square root of the Hessian $H_b$ of the
      losses with respect to the outputs, so that the curvature is that of the
      generalised Gauss-Newton matrix, $\sum_b J_b^\top H_b J_b$; it does not vanish
      where the model fits the data.
    - `reduction`: what becomes of inputs that share the layer, along time above all.
      `"integral"`: $A$ and $B$ as above (the paper's). `"expand"`: as if they were
      independent: $A$ is their mean, and $B = \sum g\, g^\top h^2$ over steps of size
      $h$ (it vanishes with the step size). `"reduce"`: $a$ is averaged and $g$
      integrated over time, and over the positions of a convolution, before the outer
      products; exact if one of them is constant.
    - `num_draws`: for `kind="ggn"`, how many random draws (Rademacher) to take of the
      columns, or `"exact"` for all of them, as many as a sample's output has entries.
      For `kind="empirical_fisher"`, how many draws to take for the `moments`.
    - `moments`: whether to return `draws`, gradients with random signs of the samples,
      from which SNOpt takes second moments (EKFAC).
    - `batch_size`: see `loss`.
    - `layers`: which layers to take, by their path.
    - `has_aux`: whether `loss` (or `predict`, where there is one) returns a pair, of
      which the second is handed on.

    **Returns:**

    A function `(model, *args, key=None) -> (value, grads, curvature)`, with the mean of
    the losses (or the pair of it and the auxiliary output), its gradient with respect
    to the inexact arrays of the model, and a dictionary from the path of a layer
    (`jax.tree_util.keystr`) to its `nodegrad.KroneckerFactors`. Whatever is random
    takes a `key`. Value and gradient are those without the curvature.

    **Raises:** `ValueError` or `TypeError` for options and shapes that do not fit
    together; for layers inside a stochastic differential equation, or inside a
    `diffrax.diffeqsolve` whose adjoint is not nodegrad's; for weights that are used
    other than by calling their layer.

    **Cost:** the gradient, and per step two evaluations of the vector field with their
    pullbacks. `moments` or `kind="ggn"`: one more backward pass for each draw. Memory:
    the factors. Under `jax.vmap` around a solve, one copy of them for each sample (use
    `odesolve(..., batched=True)`), or with `reduction="reduce"` two vectors.

    **When not to use it:** in every iteration: curvature changes slowly (see
    `nodegrad.make_steps`). A layer that is never called has zero factors; one whose
    input is shared by the whole batch (a hypernetwork, say) counts as one use. No
    layers here, and without curvature: convolutions with groups, transposed ones, and
    subclasses of `eqx.nn.Conv` with a call of their own. The model that `loss` gets has
    leaves besides the parameters, which are zero: a penalty that reads *all* leaves has
    to be a sum that has neither a value nor a slope at zero, such as a sum of squares
    (better: `optax.add_decayed_weights`). Nor can it be put together by
    `eqx.combine` of parts with `None`: pass the whole model, and freeze in the
    optimiser.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, equations
        (12) to (14); Eschenhagen, Immer, Turner, Schneider, Hennig: Kronecker-Factored
        Approximate Curvature for Modern Neural Network Architectures, NeurIPS 2023
        (expand and reduce); George et al.: Fast Approximate Natural Gradient Descent in
        a Kronecker-factored Eigenbasis, NeurIPS 2018 (moments).
    """
    _check_options(kind, reduction, num_draws, predict, batch_size)
    run = loss if predict is None else predict

    def value_grad_and_curvature_fn(model, *args, key=None):
        diff, static = eqx.partition(model, eqx.is_inexact_array)
        found = [x for x in layers_of(diff) if layers is None or layers(x.key)]
        if not found:
            msg = (
                "The model has no layer to take the curvature of: no `eqx.nn.Linear`, "
                f"`eqx.nn.Conv`, `eqx.nn.GRUCell` or `eqx.nn.LSTMCell`; got {model}."
            )
            raise ValueError(msg)
        shape = eqx.filter_eval_shape(run, model, *args)
        shape = shape[0] if has_aux else shape
        samples = _num_samples(shape, batch_size, predict, moments)
        dtypes = Leaves(diff).dtypes
        probes = {x.key: zero_probe(x, dtypes[x.weight]) for x in found}
        of_probes = tuple((key, probe.inputs.dtype) for key, probe in probes.items())
        instrumentation = Instrumentation(reduction, samples, of_probes)

        def outputs(diff__probes):
            diff, probes = diff__probes
            out = run(
                instrumented(eqx.combine(diff, static), probes, instrumentation), *args
            )
            return out if has_aux else (out, None)

        if predict is None and not moments:
            # One backward pass serves both.
            losses, pull, aux = eqx.filter_vjp(outputs, (diff, probes), has_aux=True)
            ct = jnp.full_like(losses, samples if losses.ndim == 0 else 1)
            ((summed, statistics),) = pull(ct)
            drawn = None
        else:
            plain = lambda diff: outputs((diff, probes))
            out, pull, aux = eqx.filter_vjp(plain, diff, has_aux=True)
            of_outputs = None if predict is None else lambda out: loss(out, *args)
            losses, ct, columns = _columns(of_outputs, out, num_draws, moments, key)
            (summed,) = pull(ct)
            _, pull, _ = eqx.filter_vjp(outputs, (diff, probes), has_aux=True)
            drawn, statistics = _pull_columns(pull, columns)
        value = jnp.mean(losses)
        grads = jax.tree.map(lambda g: g / samples, summed)
        curvature = _factors(found, statistics, drawn, samples, reduction, moments)
        return ((value, aux) if has_aux else value), grads, curvature

    return value_grad_and_curvature_fn


def _check_options(kind, reduction, num_draws, predict, batch_size) -> None:
    for name, value, known in (
        ("kind", kind, _KINDS),
        ("reduction", reduction, _REDUCTIONS),
    ):
        if value not in known:
            msg = f"`{name}` must be one of {known}; got {value!r}."
            raise ValueError(msg)
    if (kind == "ggn") != (predict is not None):
        msg = (
            "`predict` goes with `kind='ggn'`: the model's outputs come from "
            "`predict(model, *args)` and the losses from `loss(outputs, *args)`. With "
            "`kind='empirical_fisher'` there is only `loss(model, *args)`."
        )
        raise ValueError(msg)
    if batch_size is not None and not batch_size >= 1:
        msg = f"`batch_size` must be at least 1; got {batch_size}."
        raise ValueError(msg)
    is_number = isinstance(num_draws, int) and not isinstance(num_draws, bool)
    if not (is_number and num_draws >= 1) and (kind != "ggn" or num_draws != "exact"):
        msg = (
            "`num_draws` must be a positive integer, or 'exact' for `kind='ggn'`; got "
            f"{num_draws!r}."
        )
        raise ValueError(msg)


def _num_samples(shape, batch_size, predict, moments) -> int:
    """How many samples there are, from what `loss` or `predict` returns."""
    what = "loss" if predict is None else "predict"
    if not hasattr(shape, "shape") or not jnp.issubdtype(shape.dtype, jnp.floating):
        msg = f"`{what}` must return an array of real numbers; got {shape}."
        raise TypeError(msg)
    shape = shape.shape
    if predict is None and shape == ():
        if batch_size is None or moments:
            msg = (
                "`loss` returned a scalar. Return an array of shape `(batch,)`, the "
                "losses of the samples; or pass `batch_size`, the number of samples "
                "that it is the mean of (not with `moments=True`)."
            )
            raise ValueError(msg)
        return batch_size
    if len(shape) < 1 or (predict is None and len(shape) != 1):
        expected = "`(batch,)`" if predict is None else "`(batch, ...)`"
        msg = f"`{what}` must return an array of shape {expected}; got shape {shape}."
        raise ValueError(msg)
    if batch_size not in (None, shape[0]):
        msg = f"`{what}` returned {shape[0]} samples, but batch_size={batch_size}."
        raise ValueError(msg)
    return shape[0]


def _signs(key: Any, num: Any, like: Array) -> Array:
    """`num` arrays of random signs."""
    if key is None:
        msg = (
            "This takes random draws: pass `key`, as in `fn(model, *args, "
            "key=jax.random.PRNGKey(0))`."
        )
        raise ValueError(msg)
    return jr.rademacher(key, (num, *like.shape), like.dtype)


def _columns(of_outputs, out: Array, num_draws, moments: bool, key):
    r"""`(losses, their gradients, columns)` with respect to the outputs `out`.

    Columns are $y_{bk}$ with $\sum_k y_{bk} y_{bk}^\top = H_b$, or so on average. For
    the empirical Fisher (`of_outputs` is `None`) the outputs are the losses, and the
    columns random signs.
    """
    if of_outputs is None:
        columns = _signs(key, num_draws, out)
        columns = columns / jnp.sqrt(len(columns)).astype(out.dtype)
        return out, jnp.ones_like(out), columns
    losses, pull = jax.vjp(of_outputs, out)
    if losses.shape != (len(out),):
        msg = (
            "`loss(outputs, *args)` must return one loss for each sample, shape "
            f"({len(out)},); got shape {losses.shape}."
        )
        raise ValueError(msg)
    root = _hessian_root(of_outputs, out)
    if num_draws == "exact":
        columns = jnp.moveaxis(root, -1, 0)
        if moments:
            columns = columns * _signs(key, len(columns), columns[0, :, :1])
    else:
        columns = jnp.einsum("bij,kbj->kbi", root, _signs(key, num_draws, root[:, 0]))
        columns = columns / jnp.sqrt(len(columns)).astype(root.dtype)
    return losses, *pull(jnp.ones_like(losses)), columns.reshape(-1, *out.shape)


def _hessian_root(of_outputs, out: Array) -> Float[Array, "batch size size"]:
    """A square root of the Hessian of every loss with respect to its output."""
    gradient = jax.grad(lambda out: jnp.sum(of_outputs(out)))
    batch, size = len(out), out[0].size
    units = jnp.eye(size, dtype=out.dtype).reshape(size, 1, *out.shape[1:])

    def row(unit):
        tangent = jnp.broadcast_to(unit, out.shape)
        return jax.jvp(gradient, (out,), (tangent,))[1].reshape(batch, size)

    hessian = jnp.moveaxis(jax.vmap(row)(units), 0, 1)
    values, vectors = jnp.linalg.eigh(hessian)
    # A column of zeros would be no use of anything, and not be counted.
    least = jnp.finfo(values.dtype).tiny
    return vectors * jnp.sqrt(jnp.maximum(values, least))[:, None, :]


def _pull_columns(pull: Callable, columns: Array):
    """Gradients, stacked, and statistics of several cotangents, one at a time."""
    num = len(columns)
    if num == 1:
        ((drawn, statistics),) = pull(columns[0])
        return jax.tree.map(lambda x: x[None], drawn), statistics
    drawn, statistics = jax.lax.map(lambda ct: pull(ct)[0], columns)
    mean, total = (lambda x: jnp.mean(x, 0)), (lambda x: jnp.sum(x, 0))
    statistics = {
        key: Probe(
            offset=total(probe.offset),
            inputs=mean(probe.inputs),
            outputs=total(probe.outputs),
            count=mean(probe.count),
            x_sum=total(probe.x_sum),
            g_sum=total(probe.g_sum),
        )
        for key, probe in statistics.items()
    }
    return drawn, statistics


def _factors(
    layers: list[Layer], statistics, drawn, samples: int, reduction: str, moments: bool
) -> dict[str, KroneckerFactors]:
    matrices = [None] * len(layers)
    if moments:
        of_one = lambda grads: [Leaves(grads).matrix(layer) for layer in layers]
        matrices = jax.vmap(of_one)(drawn)
    out = {}
    for layer, draws in zip(layers, matrices, strict=True):
        probe = statistics[layer.key]
        inputs, count = probe.inputs, probe.count
        if reduction == "expand":
            inputs = (
                inputs * (samples / jnp.where(count > 0, count, 1))[..., None, None]
            )
        weight = jnp.full_like(count, samples)
        out[layer.key] = KroneckerFactors(inputs, probe.outputs, weight, draws)
    return out
