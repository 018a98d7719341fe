"""Which parts of a model are layers: a weight that a vector is multiplied with.

A layer is named by its path in the model, and its weight and bias are handled as one
matrix of shape `(d_out, d_in)`: the weight with all but its first axis flattened, and
with the bias, if it has one, as a last column. Leading axes before that (layers stacked
for a `jax.lax.scan`) are carried along everywhere, written `*stack`.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.dtypes import at_least_float32, is_real


class Layer(NamedTuple):
    """One layer of a model.

    - `key`: its name in a dictionary of curvature.
    - `weight`, `bias`: the paths of these leaves, as `jax.tree_util.keystr` writes
      them; `bias` is `None` if there is none to be trained.
    - `stack`: how many leading axes the weight has for copies of the layer.
    - `shape`: that of the matrix of weight and bias.
    """

    key: str
    weight: str
    bias: str | None
    stack: int
    shape: tuple[int, ...]


_CELLS = eqx.nn.GRUCell | eqx.nn.LSTMCell
_MODULES = eqx.nn.Linear | eqx.nn.Conv | _CELLS


def is_module(x: Any) -> bool:
    """Whether `x` is a module that has layers and nothing besides."""
    return isinstance(x, _MODULES)


def layers_of(model: PyTree) -> list[Layer]:
    """The layers of a model, or of a tree like it (gradients, or shapes).

    They are the `eqx.nn.Linear` and `eqx.nn.Conv` (of one group, and none that a
    subclass computes in its own way) in it, and the weights of each `eqx.nn.GRUCell`
    and `eqx.nn.LSTMCell`. A layer whose weight is missing (`None`, masked) or not real
    is none.
    """
    leaves, _ = jax.tree.flatten_with_path(model, is_leaf=is_module)
    found = []
    for path, module in leaves:
        if not is_module(module):
            continue
        key = jax.tree_util.keystr(path)
        if isinstance(module, _CELLS):
            for name in ("weight_ih", "weight_hh"):
                found.append(_layer(module, f"{key}.{name}", key, name, None, 2))
        elif isinstance(module, eqx.nn.Linear):
            found.append(_layer(module, key, key, "weight", "bias", 2))
        elif module.groups == 1 and type(module).__call__ is eqx.nn.Conv.__call__:
            rank = module.num_spatial_dims + 2
            found.append(_layer(module, key, key, "weight", "bias", rank))
    return [layer for layer in found if layer is not None]


def _layer(module, key, prefix, weight_name, bias_name, rank) -> Layer | None:
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
    """The leaves of a tree by their paths, to read matrices and to write them back."""

    def __init__(self, tree: PyTree):
        """Takes the tree apart."""
        leaves, self._structure = jax.tree.flatten_with_path(tree)
        self._by_path = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    @property
    def dtypes(self) -> dict[str, Any]:
        """The types to compute in, by path."""
        return {
            path: at_least_float32(leaf.dtype)
            for path, leaf in self._by_path.items()
            if is_real(leaf)
        }

    def matrix(self, layer: Layer) -> Array:
        """Weight and bias of `layer` as one matrix, `(*stack, d_out, d_in)`."""
        *lead, d_out, _ = layer.shape
        parts = [self._by_path[layer.weight].reshape(*lead, d_out, -1)]
        if layer.bias is not None:
            parts.append(self._by_path[layer.bias].reshape(*lead, d_out, 1))
        return jnp.concatenate(parts, axis=-1)

    def with_matrices(self, layers: list[Layer], matrices: list[Array]) -> PyTree:
        """The tree, with the weights and biases of `layers` replaced."""
        by_path = dict(self._by_path)
        for layer, matrix in zip(layers, matrices, strict=True):
            weight = by_path[layer.weight]
            columns = weight.size // matrix[..., 0].size
            new = matrix[..., :columns].reshape(weight.shape).astype(weight.dtype)
            by_path[layer.weight] = new
            if layer.bias is not None:
                bias = by_path[layer.bias]
                new = matrix[..., columns].reshape(bias.shape).astype(bias.dtype)
                by_path[layer.bias] = new
        return jax.tree.unflatten(self._structure, list(by_path.values()))
