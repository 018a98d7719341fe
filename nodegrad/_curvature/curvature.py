"""`value_grad_and_curvature`: loss, gradient and Kronecker factors of every layer.

A backward pass through an instrumented model (`instrumented_model.py`) returns sums of
outer products as cotangents of probes. This module chooses the cotangents of outputs to
pull back, and makes `KroneckerFactors` of those of the probes.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._internal.closure_convert import closure_convert
from .._internal.devices import on_each_device
from .._internal.tree import check_counts
from .._layers.factors import KroneckerFactors, Statistics
from .._layers.find_products import check_products
from .._layers.layers import chosen_layers, Layer, Leaves
from .columns import columns_of
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
    r"""Makes a function for loss, gradient and the Kronecker factors of every layer.

    The model may use its `eqx.nn.Linear`, `eqx.nn.Conv*`, `eqx.nn.GRUCell` and
    `eqx.nn.LSTMCell` inside of vector fields solved by nodegrad, outside of them, or
    both. Layers may be used several times, in `jax.vmap`, `jax.lax.scan` and
    `jax.checkpoint`, and under `jax.jvp` or `jax.vjp` in the vector field.

    **Example:** the last input of a layer is the one of its bias. So the last entry of
    the input factor is the number of samples times the length of the solve.

    ```python
    import diffrax
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import nodegrad

    def loss(model, y0):  # one number for each sample
        field, tsit5 = lambda t, y, args: jnp.tanh(model(y)), diffrax.Tsit5()
        sol = nodegrad.odesolve(field, tsit5, 0.0, 2.0, 0.1, y0, batched=True)
        return jnp.sum(sol.ys**2, axis=(1, 2))

    model, y0 = eqx.nn.MLP(3, 3, 8, 1, key=jax.random.PRNGKey(0)), jnp.ones((5, 3))
    value, grads, curvature = nodegrad.value_grad_and_curvature(loss)(model, y0)
    print(curvature[".layers[0]"].input_factor[-1, -1].round(3))  # 10.0
    ```

    **Definition:** with $a$ the inputs of a layer (and a one for its bias) and $g$ the
    gradients of a sample's own loss with respect to its outputs, the factors are

    $$A = \sum_b \int a\, a^\top dt, \qquad B = \sum_b \int g\, g^\top dt,$$

    summed over all samples $b$. The integrals are trapezoidal sums over the accepted
    steps, of the states and cotangents at the ends of the steps. The stages of the
    solver do not enter, so the factors have a limit for small steps that does not
    depend on the solver. A use of a layer outside of a solve counts as one unit of
    time. All uses (positions of a convolution, several solves, solves in the field of
    another solve) are summed, but for those outside of solves whose gradients $g$ are
    all zero.

    **Arguments:**

    - `loss`: `loss(model, *args)` returns the losses of the samples of a batch, an
      array of shape `(batch,)`. It may return their mean instead, a scalar, if
      `batch_size` is given. A regulariser counts as a part of the loss.
    - `predict`: for `kind="ggn"`: `predict(model, *args)` returns the outputs of the
      model, an array of shape `(batch, ...)`, and `loss(outputs, *args)` the losses, of
      shape `(batch,)`. Each loss is a twice differentiable function of the output of
      its sample.
    - `kind`: where the gradients $g$ come from. `"empirical_fisher"`: the losses.
      `"ggn"`: random columns, or all columns, of a square root of the Hessian $H_b$ of
      each loss with respect to the outputs. The curvature is then that of the
      generalised Gauss-Newton matrix, $\sum_b J_b^\top H_b J_b$. It does not vanish
      where the model fits the data.
    - `reduction`: how to combine inputs that share the layer, above all along time.
      `"integral"`: $A$ and $B$ as above, as in the paper. `"expand"`: as if the inputs
      were independent: $A$ is their mean, and $B = \sum g\, g^\top h^2$ over steps of
      size $h$ (it vanishes with the step size). `"reduce"`: $a$ is averaged and $g$
      integrated over time, and over the positions of a convolution, before the outer
      products; this is exact if one of them is constant.
    - `num_draws`: for `kind="ggn"`, the number of random combinations of columns (with
      Rademacher weights), or `"exact"` for all columns, one for each entry of a
      sample's output. For `kind="empirical_fisher"`, the number of draws for `moments`.
    - `moments`: whether to return `draws`, gradients with a random sign for each
      sample, from which SNOpt computes second moments (EKFAC).
    - `batch_size`: the number of samples, required if `loss` returns a scalar.
    - `layers`: which layers to include, by their path. `None` means all.
    - `has_aux`: whether `loss` (or `predict`, if given) returns a pair, whose second
      item is auxiliary output.

    **Returns:**

    A function `(model, *args, key=None) -> (value, grads, curvature)`:

    - `value`: the mean of the losses, or the pair of it and the auxiliary output.
    - `grads`: the gradient of the mean with respect to the inexact arrays of the model.
    - `curvature`: a dictionary from the path of a layer (`jax.tree_util.keystr`) to its
      `nodegrad.KroneckerFactors`.

    `value` and `grads` are the same as without curvature. Random draws need a `key`.

    **Raises:** `ValueError` or `TypeError` for options and shapes that do not fit
    together; for layers inside a stochastic differential equation, or inside a
    `diffrax.diffeqsolve` whose adjoint is not nodegrad's; for weights that are used
    other than by calling their layer, and layers that are computed inside of the loss.

    **Cost:** the gradient, and per step two evaluations of the vector field with their
    pullbacks, and a product of matrices for each factor. `moments` or `kind="ggn"`: one
    more backward pass for each draw; if the Hessian of a loss is not diagonal in the
    outputs, as that of a cross entropy, also its eigenvectors. Memory: the factors.
    Under `jax.vmap` around a solve, one copy of them for each sample (use
    `odesolve(..., batched=True)`), or with `reduction="reduce"` two vectors.

    **When not to use it:** in every iteration: curvature changes slowly, see
    `nodegrad.make_steps`. A layer that is never called has zero factors, and one whose
    input is shared by the whole batch (as in a hypernetwork) counts as one use.
    Convolutions with groups, transposed ones, subclasses of `eqx.nn.Conv` that override
    `__call__`, and layers whose weight is that of an `eqx.nn.Embedding` (by
    `eqx.nn.Shared`) have no curvature.

    **Restrictions on `loss`:** the model that it receives has more leaves than the
    parameters; the others are zero. A penalty over *all* leaves must be a sum of terms
    with value and slope zero at zero, such as squares (better:
    `optax.add_decayed_weights`). `eqx.combine` of parts with `None` does not work:
    pass the whole model, and freeze parameters in the optimiser.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, equations
        (12) to (14); Eschenhagen, Immer, Turner, Schneider, Hennig: Kronecker-Factored
        Approximate Curvature for Modern Neural Network Architectures, NeurIPS 2023
        (expand and reduce); George et al.: Fast Approximate Natural Gradient Descent in
        a Kronecker-factored Eigenbasis, NeurIPS 2018 (moments).
    """
    chosen = chosen_layers(layers)
    _check_options(kind, reduction, num_draws, predict, batch_size)
    run = loss if predict is None else predict

    def value_grad_and_curvature_fn(
        model: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[Any, PyTree, dict[str, KroneckerFactors]]:
        diff, static = eqx.partition(model, eqx.is_inexact_array)
        found = _some_layers(chosen(diff))
        shape = eqx.filter_eval_shape(run, model, *args)
        shape = shape[0] if has_aux else shape
        samples = _num_samples(shape, batch_size, predict, moments)
        dtypes = Leaves(diff).dtypes
        probes = {x.key: zero_probe(x, dtypes[x.weight]) for x in found}
        of_probes = tuple((key, probe.offset.dtype) for key, probe in probes.items())
        instrumentation = Instrumentation(reduction, samples, of_probes)

        def outputs(diff: PyTree, probes: dict[str, Probe]) -> tuple[Any, Any]:
            model = instrumented(eqx.combine(diff, static), probes, instrumentation)
            return run(model, *args) if has_aux else (run(model, *args), None)

        out, push, aux = _linearized(outputs, diff, probes)
        if predict is None and not moments:
            # The columns are those of the gradient: one backward pass serves both.
            # The sum of the losses, so that $g$ is the gradient of a sample's own loss.
            losses, ct = out, jnp.full_like(out, samples if out.ndim == 0 else 1)
            summed, ct_probes = jax.linear_transpose(push, diff, probes)(ct)
            drawn = None
        else:
            # The gradient needs a backward pass without statistics, and every column
            # one with them. `drawn` are the gradients of columns.
            of_outputs = None if predict is None else lambda out: loss(out, *args)
            losses, ct, columns = columns_of(of_outputs, out, num_draws, moments, key)
            (summed,) = jax.linear_transpose(lambda d: push(d, probes), diff)(ct)
            pull = jax.linear_transpose(push, diff, probes)
            drawn, ct_probes = _pull_columns(pull, columns)
        value = jnp.mean(losses)
        grads = jax.tree.map(lambda g: g / samples, summed)
        curvature = _factors(found, ct_probes, drawn, samples, reduction, moments)
        return ((value, aux) if has_aux else value), grads, curvature

    return on_each_device(value_grad_and_curvature_fn)


def _linearized(
    outputs: Callable[..., tuple[Any, Any]], diff: PyTree, probes: dict[str, Probe]
) -> tuple[Array, Callable[..., Array], Any]:
    """Returns the outputs, their linear map of `(diff, probes)`, and the auxiliary.

    One forward pass serves all columns. Probes are zeros, so `push(d, probes)` is also
    the linear map of `d` alone.
    """
    static_aux = []

    def arrays(diff: PyTree, probes: dict[str, Probe]) -> tuple[Array, PyTree[Array]]:
        out, aux = outputs(diff, probes)
        aux, static = eqx.partition(aux, eqx.is_array)
        static_aux.append(static)
        return out, aux

    consts, pure = closure_convert(arrays, diff, probes)
    check_products(pure.jaxpr, pure.jaxpr.invars[len(jax.tree.leaves(diff)) :])
    run = lambda diff, probes: pure(consts, diff, probes)
    out, push, aux = jax.linearize(run, diff, probes, has_aux=True)
    return out, push, eqx.combine(aux, static_aux[0])


def _some_layers(found: list[Layer]) -> list[Layer]:
    """Returns the layers that were found; raises if there is none."""
    if not found:
        kinds = "`eqx.nn.Linear`, `eqx.nn.Conv`, `eqx.nn.GRUCell` or `eqx.nn.LSTMCell`"
        msg = (
            f"The model has no layer to take the curvature of: no {kinds} with a "
            "weight of its own."
        )
        raise ValueError(msg)
    return found


def _check_options(
    kind: str,
    reduction: str,
    num_draws: int | str,
    predict: Callable[..., Any] | None,
    batch_size: int | None,
) -> None:
    """Raises `ValueError` for options that are unknown or do not fit together."""
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
    check_counts(None, batch_size=batch_size)
    check_counts("exact", num_draws=num_draws)
    if num_draws == "exact" and kind != "ggn":
        msg = "`num_draws='exact'` goes with `kind='ggn'`."
        raise ValueError(msg)


def _num_samples(
    shape: Any, batch_size: int | None, predict: Callable | None, moments: bool
) -> int:
    """Returns the number of samples, from the shape of the user's `loss` or `predict`.

    Results of these functions that are not arrays raise: so `shape` is `Any`.
    """
    what = "loss" if predict is None else "predict"
    if not hasattr(shape, "shape") or not jnp.issubdtype(shape.dtype, jnp.floating):
        msg = f"`{what}` must return an array of real numbers; got {shape}."
        raise TypeError(msg)
    shape = shape.shape
    if predict is None and shape == ():
        if batch_size is None or moments:
            msg = (
                "`loss` returned a scalar. Return an array of shape `(batch,)`, the "
                "losses of the samples; or their mean, and pass `batch_size`, the "
                "number of samples (not with `moments=True`)."
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


def _pull_columns(
    pull: Callable[[Array], tuple[PyTree, dict[str, Probe]]],
    columns: Float[Array, "columns batch ..."],
) -> tuple[PyTree, dict[str, Probe]]:
    """Returns stacked gradients, and statistics, of `columns`, one pass at a time."""
    num = len(columns)
    if num == 1:
        drawn, ct_probes = pull(columns[0])
        return jax.tree.map(lambda x: x[None], drawn), ct_probes
    drawn, ct_probes = jax.lax.map(pull, columns)

    def combined(probe: Probe) -> Probe:
        # All columns have the same inputs, which count once.
        mean, total = (lambda x: jnp.mean(x, 0)), (lambda x: jnp.sum(x, 0))
        of_columns = probe.statistics
        statistics = Statistics(
            inputs=mean(of_columns.inputs),
            outputs=total(of_columns.outputs),
            count=mean(of_columns.count),
            x_sum=total(of_columns.x_sum),
            g_sum=total(of_columns.g_sum),
        )
        return Probe(offset=total(probe.offset), statistics=statistics)

    return drawn, {key: combined(probe) for key, probe in ct_probes.items()}


def _factors(
    layers: list[Layer],
    ct_probes: dict[str, Probe],
    drawn: PyTree[Array] | None,
    samples: int,
    reduction: str,
    moments: bool,
) -> dict[str, KroneckerFactors]:
    """Returns factors; `drawn` are gradients with a leading axis, for `moments`."""
    matrices = [None] * len(layers)
    if moments:
        of_one = lambda grads: [Leaves(grads).matrix(layer) for layer in layers]
        matrices = jax.vmap(of_one)(drawn)
    out = {}
    for layer, draws in zip(layers, matrices, strict=True):
        statistics = ct_probes[layer.key].statistics
        inputs, count = statistics.inputs, statistics.count
        if reduction == "expand":
            # The mean over uses, times the number of samples: factors are sums.
            inputs = (
                inputs * (samples / jnp.where(count > 0, count, 1))[..., None, None]
            )
        weight = jnp.full_like(count, samples)
        out[layer.key] = KroneckerFactors(inputs, statistics.outputs, weight, draws)
    return out
