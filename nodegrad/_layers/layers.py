"""Finds the layers of a model, and reads and writes their weights as matrices.

A layer is a weight that vectors are multiplied by, with its bias. Its name is its path
in the model. Weight and bias form one matrix of shape `(*stack, d_out, d_in)`:

- The weight comes first, with all its axes after `d_out` flattened: those of the
  kernel, if it is a convolution.
- The bias, if there is one, is the last column. So `d_in` counts one for the bias.
- `*stack` are leading axes for layers that are stacked for a `jax.lax.scan`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._internal.tree import at_least_float32, is_real


class Layer(NamedTuple):
    """One layer of a model.

    - `key`: the name of the layer in a dictionary of curvature.
    - `weight`, `bias`: the paths of these leaves, as `jax.tree_util.keystr` writes
      them; `bias` is `None` if there is no bias, or none that is trained.
    - `stack`: the number of leading axes for stacked layers.
    - `shape`: the shape of the matrix, `(*stack, d_out, d_in)`.
    """

    key: str
    weight: str
    bias: str | None
    stack: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """How a message calls the layer."""
        return name_of(self.key)


def name_of(key: str) -> str:
    """How a message calls the layer with this key."""
    return f"`{key}`" if key else "(the model itself)"


_CELLS = eqx.nn.GRUCell | eqx.nn.LSTMCell
_MODULES = eqx.nn.Linear | eqx.nn.Conv | _CELLS


def is_module(x: Any) -> bool:
    """Returns whether `x` is a module whose parameters are those of layers."""
    return isinstance(x, _MODULES)


def chosen_layers(
    layers: Callable[[str], bool] | None,
) -> "Callable[[PyTree], list[Layer]]":
    """Returns the function that lists the layers of a tree that `layers` includes.

    Raises a `TypeError` unless `layers` is `None` or a function of the path of a layer.
    """
    if not (layers is None or callable(layers)):
        msg = (
            "`layers` must be a function from the path of a layer, such as "
            f"`'.field.layers[0]'`, to whether to include it; got {layers!r}."
        )
        raise TypeError(msg)

    def chosen(tree: PyTree) -> list[Layer]:
        return [x for x in layers_of(tree) if layers is None or layers(x.key)]

    return chosen


def layers_of(model: PyTree) -> list[Layer]:
    """Returns the layers of a model, or of a tree like it (gradients, or shapes).

    These are every `eqx.nn.Linear`, every `eqx.nn.Conv` with one group (unless a
    subclass overrides `__call__`), and both weights of every `eqx.nn.GRUCell` and
    `eqx.nn.LSTMCell`. Layers whose weight is missing (`None`, masked) or not real are
    left out.
    """
    leaves, _ = jax.tree.flatten_with_path(model, is_leaf=is_module)
    found = []
    for path, module in leaves:
        if not is_module(module):
            continue
        key = jax.tree_util.keystr(path)
        if isinstance(module, _CELLS):
            # The biases of a cell are not part of these layers.
            for name in ("weight_ih", "weight_hh"):
                found.append(_layer(module, f"{key}.{name}", key, name, None, 2))
        elif isinstance(module, eqx.nn.Linear):
            found.append(_layer(module, key, key, "weight", "bias", 2))
        # A subclass with its own `__call__` may use the weight in another way than
        # `InstrumentedConv` does.
        elif module.groups == 1 and type(module).__call__ is eqx.nn.Conv.__call__:
            # (out channels, in channels, *kernel)
            rank = module.num_spatial_dims + 2
            found.append(_layer(module, key, key, "weight", "bias", rank))
    return [layer for layer in found if layer is not None]


def _layer(
    module: Any,
    key: str,
    prefix: str,
    weight_name: str,
    bias_name: str | None,
    rank: int,
) -> Layer | None:
    """The layer of one weight of a module, or `None` if that weight is not trained.

    `rank` is the number of axes that the weight has if it is not stacked. `prefix` is
    the path of the module, which has any of the types in `_MODULES`.
    """
    weight = getattr(module, weight_name)
    if not is_real(weight):
        return None
    stack = weight.ndim - rank
    lead, (d_out, *rest) = weight.shape[:stack], weight.shape[stack:]
    has_bias = bias_name is not None and is_real(getattr(module, bias_name))
    d_in = math.prod(rest) + has_bias
    bias = f"{prefix}.{bias_name}" if has_bias else None
    shape = (*lead, d_out, d_in)
    return Layer(key, f"{prefix}.{weight_name}", bias, stack, shape)


class Leaves:
    """The leaves of a tree by path, to read matrices of layers and to replace them."""

    def __init__(self, tree: PyTree):
        """`tree` is a model, or a tree like it (parameters, gradients)."""
        leaves, self._structure = jax.tree.flatten_with_path(tree)
        self._by_path = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    @property
    def dtypes(self) -> dict[str, Any]:
        """For the path of every real leaf, the dtype to compute its curvature in."""
        return {
            path: at_least_float32(leaf.dtype)
            for path, leaf in self._by_path.items()
            if is_real(leaf)
        }

    def matrix(self, layer: Layer) -> Float[Array, "*stack d_out d_in"]:
        """Returns the weight and bias of `layer` as one matrix."""
        *lead, d_out, _ = layer.shape
        parts = [self._by_path[layer.weight].reshape(*lead, d_out, -1)]
        if layer.bias is not None:
            parts.append(self._by_path[layer.bias].reshape(*lead, d_out, 1))
        return jnp.concatenate(parts, axis=-1)

    def with_matrices(self, layers: list[Layer], matrices: list[Array]) -> PyTree:
        """Returns the tree with the weights and biases of `layers` replaced.

        Each matrix has the shape of its layer, and is cast to the dtypes of the leaves.
        """
        by_path = dict(self._by_path)
        for layer, matrix in zip(layers, matrices, strict=True):
            weight = by_path[layer.weight]
            # The number of columns of the weight: one less than `d_in` with a bias.
            columns = weight.size // matrix[..., 0].size
            new = matrix[..., :columns].reshape(weight.shape).astype(weight.dtype)
            by_path[layer.weight] = new
            if layer.bias is not None:
                bias = by_path[layer.bias]
                new = matrix[..., columns].reshape(bias.shape).astype(bias.dtype)
                by_path[layer.bias] = new
        return jax.tree.unflatten(self._structure, list(by_path.values()))
