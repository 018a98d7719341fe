"""Models whose layers can be asked for their curvature.

`instrumented` replaces the weight of every layer by an object whose `@` is a
`layer_product`. `eqx.nn.Linear`, `eqx.nn.GRUCell` and `eqx.nn.LSTMCell` multiply with
their weights by `@`. Convolutions are replaced as a whole. Nothing else changes.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.compat import running_adjoints
from .._internal.dtypes import at_least_float32
from .._layers.layer_product import layer_product, Use
from .._layers.layers import is_module, Layer, layers_of
from .._solve.recorded_adjoint import AbstractRecordedAdjoint


_UNSEEN = (
    "The curvature of {key} is asked for, but its weight is used other than by calling "
    "the layer. Multiply as in `weight @ x`, or leave this layer out with "
    "`value_grad_and_curvature(..., layers=...)`."
)


class Probe(eqx.Module):
    """Zeros, one for each statistic of a layer, and `offset`."""

    offset: Array
    inputs: Array
    outputs: Array
    count: Array
    x_sum: Array
    g_sum: Array

    @property
    def statistics(self) -> list[Array]:
        """The probes that have a cotangent."""
        return [self.inputs, self.outputs, self.count, self.x_sum, self.g_sum]


class Instrumentation(eqx.Module):
    """What is the same for all layers: see `Use`."""

    reduction: str = eqx.field(static=True)
    samples: int = eqx.field(static=True)
    dtypes: tuple[tuple[str, Any], ...] = eqx.field(static=True)


def zero_probe(layer: Layer, dtype: Any) -> Probe:
    """The probe of a layer whose weight has type `dtype`."""
    *stack, d_out, d_in = layer.shape
    zeros = lambda *shape: jnp.zeros((*stack, *shape), at_least_float32(dtype))
    return Probe(
        offset=zeros(),
        inputs=zeros(d_in, d_in),
        outputs=zeros(d_out, d_out),
        count=zeros(),
        x_sum=zeros(d_in),
        g_sum=zeros(d_out),
    )


class InstrumentedMatrix(eqx.Module):
    """A matrix that multiplies vectors."""

    weight: Array
    probe: Probe
    instrumentation: Instrumentation
    key: str = eqx.field(static=True)
    has_bias: bool = eqx.field(static=True)

    def __matmul__(self, x: Array) -> Array:
        """The product with a vector, or with the columns of a matrix."""
        out_shape = (self.weight.shape[0], *x.shape[1:])
        return _layer_product(self, None, self.weight, x, out_shape)

    def __jax_array__(self):
        """Refuses: that would be a use that nobody sees."""
        raise TypeError(_UNSEEN.format(key=self.key))

    def __getitem__(self, index):
        """Refuses, likewise."""
        raise TypeError(_UNSEEN.format(key=self.key))

    def __getattr__(self, name: str):
        """Refuses, likewise: nothing else that an array has is here."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(_UNSEEN.format(key=self.__dict__.get("key", "a layer")))

    @property
    def shape(self):
        """That of the weight."""
        return self.weight.shape

    @property
    def ndim(self):
        """That of the weight."""
        return self.weight.ndim

    @property
    def dtype(self):
        """That of the weight."""
        return self.weight.dtype


class InstrumentedConv(eqx.Module):
    """A convolution."""

    conv: eqx.nn.Conv
    probe: Probe
    instrumentation: Instrumentation
    key: str = eqx.field(static=True)

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias."""
        return self.conv.bias is not None

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """As the convolution."""
        del key
        structure = jax.tree.structure(self.conv)
        out = jax.eval_shape(self.conv, x)
        h = _layer_product(self, structure, self.conv.weight, x, out.shape)
        return h if self.conv.bias is None else h + self.conv.bias

    def __getattr__(self, name: str):
        """What else a convolution has."""
        if name == "conv" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.conv, name)


def _check_adjoints(key: str) -> None:
    """Raises if a layer is used inside a solve whose adjoint takes no statistics.

    The call stack decides about this message alone. Evaluations that initialise a
    solver or a step size need no check: their results have cotangents of zero, and uses
    with such cotangents are not counted.
    """
    for adjoint in running_adjoints():
        if not isinstance(adjoint, AbstractRecordedAdjoint):
            msg = (
                f"The curvature of {key} is asked for, which is used inside a "
                f"`diffrax.diffeqsolve` with adjoint={adjoint}. Statistics of its "
                "stages would depend on the solver. Use `adjoint=nodegrad.ACAAdjoint()`"
                ", `nodegrad.odesolve`, or leave this layer out with "
                "`value_grad_and_curvature(..., layers=...)`."
            )
            raise ValueError(msg)


def _layer_product(layer: Any, conv: Any, weight: Array, x: Array, out_shape) -> Array:
    dtype = layer.probe.inputs.dtype
    if dtype != dict(layer.instrumentation.dtypes)[layer.key]:
        msg = (
            f"The curvature of {layer.key} is asked for, but the model was cast to "
            f"{dtype} inside of the loss, and its statistics with it. Cast the model "
            "before (statistics of bfloat16 are summed in float32), or cast the inputs "
            "of its layers."
        )
        raise TypeError(msg)
    use = Use(
        key=layer.key,
        conv=conv,
        one=1.0 if layer.has_bias else None,
        reduction=layer.instrumentation.reduction,
        samples=layer.instrumentation.samples,
        shape=x.shape,
        out_shape=tuple(out_shape),
        dtype=dtype,
    )
    _check_adjoints(layer.key)
    return layer_product(use, weight, x, layer.probe.offset, layer.probe.statistics)


def instrumented(
    model: PyTree, probes: dict[str, Probe], instrumentation: Instrumentation
) -> PyTree:
    """`model`, with a layer_product in every layer that there is a probe for."""
    by_path = {layer.weight: layer for layer in layers_of(model)}

    def replaced(path, module):
        prefix = jax.tree_util.keystr(path)
        for name in ("weight", "weight_ih", "weight_hh"):
            layer = by_path.get(f"{prefix}.{name}")
            if layer is None or layer.key not in probes:
                continue
            probe, key = probes[layer.key], layer.key
            if isinstance(module, eqx.nn.Conv):
                return InstrumentedConv(module, probe, instrumentation, key)
            weight = getattr(module, name)
            has_bias = layer.bias is not None
            new = InstrumentedMatrix(weight, probe, instrumentation, key, has_bias)
            module = eqx.tree_at(lambda m, name=name: getattr(m, name), module, new)
        return module

    return jax.tree_util.tree_map_with_path(replaced, model, is_leaf=is_module)
