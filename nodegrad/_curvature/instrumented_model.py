"""Instrumented models: every layer multiplies by its weight with `layer_product`.

`instrumented` replaces the weight of a layer by an `InstrumentedMatrix`, an object
whose `@` is a `layer_product`. `eqx.nn.Linear`, `eqx.nn.GRUCell` and `eqx.nn.LSTMCell`
multiply by their weights with `@`, so their code runs unchanged. An `eqx.nn.Conv`
passes its weight to JAX, so it is replaced by an `InstrumentedConv`. All other leaves
stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from numpy.lib.mixins import NDArrayOperatorsMixin

from .._internal.compat import running_adjoints
from .._internal.tree import at_least_float32, with_fields
from .._layers.factors import Statistics
from .._layers.layer_product import layer_product
from .._layers.layers import is_module, Layer, layers_of, name_of
from .._layers.use import Use
from .._solve.recorded_adjoint import AbstractRecordedAdjoint


_UNSEEN = (
    "The curvature of {} is asked for, but its weight is used other than by calling "
    "the layer. Multiply as in `weight @ x`, or leave this layer out with "
    "`value_grad_and_curvature(..., layers=...)`."
)


class Probe(eqx.Module):
    """The probes of a layer: arrays of zeros, see `layer_product.py`.

    Reverse mode returns the statistics of the layer as the cotangent of `statistics`;
    that of `offset` is zero. Each array has the stack axes of the layer in front.
    """

    offset: Float[Array, "*stack"]
    statistics: Statistics


class Instrumentation(eqx.Module):
    """Options that all layers share.

    - `reduction`, `samples`: see `Use` in `use.py`.
    - `dtypes`: the dtype of the probes of each layer, by key.
    """

    reduction: str = eqx.field(static=True)
    samples: int = eqx.field(static=True)
    dtypes: tuple[tuple[str, Any], ...] = eqx.field(static=True)


def zero_probe(layer: Layer, dtype: Any) -> Probe:
    """Returns the probes of a layer whose weight has the dtype `dtype`."""
    # `d_in` counts the input of the bias.
    *stack, d_out, d_in = layer.shape
    zeros = lambda *shape: jnp.zeros((*stack, *shape), at_least_float32(dtype))
    statistics = Statistics(
        inputs=zeros(d_in, d_in),
        outputs=zeros(d_out, d_out),
        count=zeros(),
        x_sum=zeros(d_in),
        g_sum=zeros(d_out),
    )
    return Probe(offset=zeros(), statistics=statistics)


class InstrumentedMatrix(eqx.Module, NDArrayOperatorsMixin):
    """A weight that can be multiplied by vectors, and used in no other way.

    Other uses would be missing in the statistics, so they raise. The operators of
    Python are those of NumPy, which `__array_ufunc__` gets.
    """

    weight: Float[Array, "*stack d_out d_in"]
    probe: Probe
    instrumentation: Instrumentation
    key: str = eqx.field(static=True)
    has_bias: bool = eqx.field(static=True)

    def __matmul__(self, x: Array) -> Array:
        """Returns the product with a vector, or with the columns of each matrix."""
        if x.ndim > 2:
            # Axes before those of a matrix are a batch, as everywhere in JAX.
            return jax.vmap(self.__matmul__)(x)
        out_shape = (self.weight.shape[0], *x.shape[1:])
        return _layer_product(self, None, self.weight, x, out_shape)

    def __jax_array__(self) -> NoReturn:
        """Raises: this use of the weight cannot be recorded."""
        raise TypeError(_UNSEEN.format(name_of(self.key)))

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises, like `__jax_array__`."""
        self.__jax_array__()

    def __getitem__(self, index: Any) -> NoReturn:
        """Raises, like `__jax_array__`."""
        self.__jax_array__()

    def __len__(self) -> int:
        """Returns the number of rows, as of an array."""
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        """Raises: other attributes of an array would be uses, too."""
        # Python and Equinox look for private and special names on every object.
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(_UNSEEN.format(name_of(self.__dict__.get("key", ""))))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """The ndim of the weight."""
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.weight.dtype


class InstrumentedConv(eqx.Module):
    """Behaves like the `eqx.nn.Conv` inside it, but multiplies with `layer_product`."""

    conv: eqx.nn.Conv
    probe: Probe
    instrumentation: Instrumentation
    key: str = eqx.field(static=True)

    @property
    def has_bias(self) -> bool:
        """Whether the convolution has a bias."""
        return self.conv.bias is not None

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """Returns `self.conv(x)`."""
        del key
        # The structure keeps the settings (padding, strides) as static data.
        structure = jax.tree.structure(self.conv)
        out = jax.eval_shape(self.conv, x)
        h = _layer_product(self, structure, self.conv.weight, x, out.shape)
        return h if self.conv.bias is None else h + self.conv.bias

    def __getattr__(self, name: str) -> Any:
        """Returns other attributes of the convolution."""
        # `conv` itself is missing while the object is being built.
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
                f"The curvature of {name_of(key)} is asked for, but it is used inside "
                f"a `diffrax.diffeqsolve` with adjoint={adjoint}. Statistics of its "
                "stages would depend on the solver. Use `adjoint=nodegrad.ACAAdjoint()`"
                ", `nodegrad.odesolve`, or leave this layer out with "
                "`value_grad_and_curvature(..., layers=...)`."
            )
            raise ValueError(msg)


def _layer_product(
    layer: InstrumentedMatrix | InstrumentedConv,
    conv: Any,
    weight: Array,
    x: Array,
    out_shape: tuple[int, ...],
) -> Array:
    """Returns the product of `weight` and `x`, of shape `out_shape`.

    `conv` is the tree structure of a convolution, or `None` for a matrix.
    """
    # The statistics are cotangents of the probes, and have their dtype.
    dtype = layer.probe.offset.dtype
    if dtype != dict(layer.instrumentation.dtypes)[layer.key]:
        msg = (
            f"The curvature of {name_of(layer.key)} is asked for, but the model was "
            f"cast to {dtype} inside of the loss, and the statistics were cast with "
            "it. Cast the model before (statistics of bfloat16 are summed in float32), "
            "or cast the inputs of its layers."
        )
        raise TypeError(msg)
    use = Use(
        key=layer.key,
        conv=conv,
        one=_input_of_bias(layer),
        reduction=layer.instrumentation.reduction,
        samples=layer.instrumentation.samples,
        shape=x.shape,
        out_shape=tuple(out_shape),
        dtype=dtype,
    )
    _check_adjoints(layer.key)
    return layer_product(use, weight, x, layer.probe.offset, layer.probe.statistics)


def _input_of_bias(layer: InstrumentedMatrix | InstrumentedConv) -> float | None:
    """Returns the input of the bias: 0 if it is not used, `None` if there is none."""
    if layer.has_bias:
        return 1.0
    d_in = layer.probe.statistics.x_sum.shape[-1]
    columns = layer.weight[0].size
    return 0.0 if d_in > columns else None


def instrumented(
    model: PyTree, probes: dict[str, Probe], instrumentation: Instrumentation
) -> PyTree:
    """Returns `model` with a `layer_product` in every layer that `probes` has a key of.

    The result has the leaves of `model` and of `probes`, so JAX differentiates both.
    """
    by_path = {layer.weight: layer for layer in layers_of(model)}

    def replaced(path: Any, module: Any) -> Any:
        # `path` is a key path of JAX. Leaves that are not modules are returned as they
        # are; a cell has two layers, and any other module one.
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

    model = jax.tree_util.tree_map_with_path(replaced, model, is_leaf=is_module)
    return _without_shared_biases(model)


def _without_shared_biases(model: PyTree) -> PyTree:
    """Returns `model`, whose shared weights do not count the bias of their layer.

    An `eqx.nn.Shared` hands the weight of one layer to others, which have biases of
    their own or none. A layer that is shared as a whole keeps its bias.
    """
    is_shared = lambda x: isinstance(x, eqx.nn.Shared)

    def inside(x: Any) -> Any:
        if not is_shared(x):
            return x
        tree = _without_shared_biases(x.pytree)
        return with_fields(x, pytree=tree, get=_WithoutBias(x.get))

    return jax.tree.map(inside, model, is_leaf=is_shared)


@dataclass(frozen=True)
class _WithoutBias:
    """Calls `get`; weights in its result count no bias, unless it is shared with them.

    It is if there is an array beside them, or a whole module.
    """

    get: Callable[[PyTree], PyTree]

    def __call__(self, tree: PyTree) -> PyTree:
        is_matrix = lambda x: isinstance(x, InstrumentedMatrix)

        def bare(x: Any) -> Any:
            return replace(x, has_bias=False) if is_matrix(x) else x

        out, is_leaf = self.get(tree), lambda x: is_module(x) or is_matrix(x)
        if any(map(eqx.is_array, jax.tree.leaves(out, is_leaf=is_leaf))):
            return out
        return jax.tree.map(bare, out, is_leaf=is_leaf)
