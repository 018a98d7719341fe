"""SOAP (Vyas et al. 2024, arXiv:2409.11321): Adam in the eigenbasis of Shampoo.

For a matrix of parameters with gradient G it keeps running means of G G^T and G^T G,
and runs Adam on the gradient in their eigenbases. Every ten steps one step of the power
method and a QR factorisation renew a basis. Optax does not have it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class _Matrix(NamedTuple):
    """The state for a parameter of shape `(rows, columns)`; vectors are columns.

    - `mean`: the running mean of gradients, not rotated.
    - `square`: that of squared gradients in the eigenbasis.
    - `left`, `right`: the running means of G G^T and G^T G.
    - `rows`, `columns`: their eigenvectors.
    """

    mean: Any
    square: Any
    left: Any
    right: Any
    rows: Any
    columns: Any


class _State(NamedTuple):
    count: Any
    matrices: Any


_DECAY, _EPSILON, _EVERY = 0.95, 1e-8, 10


def soap(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """SOAP with the constants of its paper, and decoupled weight decay."""
    return optax.chain(
        optax.GradientTransformation(_init, _update),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _as_matrix(x: Any) -> Any:
    """Kernels of convolutions have one row for each channel of the output."""
    return x.reshape(x.shape[0] if x.ndim else 1, -1)


def _init(params: Any) -> Any:
    def of_leaf(x: Any) -> _Matrix:
        zeros = jnp.zeros_like(_as_matrix(x))
        rows, columns = (jnp.eye(n, dtype=x.dtype) for n in zeros.shape)
        return _Matrix(zeros, zeros, 0 * rows, 0 * columns, rows, columns)

    return _State(jnp.zeros((), jnp.int32), jax.tree.map(of_leaf, params))


def _update(updates: Any, state: Any, params: Any = None) -> Any:
    del params
    leaves, structure = jax.tree.flatten(updates)
    matrices = structure.flatten_up_to(state.matrices)
    pairs = [
        _update_matrix(_as_matrix(leaf), matrix, state.count)
        for leaf, matrix in zip(leaves, matrices, strict=True)
    ]
    steps = [
        step.reshape(leaf.shape) for leaf, (step, _) in zip(leaves, pairs, strict=True)
    ]
    matrices = structure.unflatten([matrix for _, matrix in pairs])
    return structure.unflatten(steps), _State(state.count + 1, matrices)


def _update_matrix(gradient: Any, old: _Matrix, count: Any) -> tuple[Any, _Matrix]:
    """The update, which is zero at first: then there is only a basis to find."""
    average = lambda old, new: _DECAY * old + (1 - _DECAY) * new
    left = average(old.left, gradient @ gradient.T)
    right = average(old.right, gradient.T @ gradient)
    rows, columns = old.rows, old.columns
    # Vectors are not rotated: this is Adam.
    if gradient.shape[1] > 1:
        rows, columns = _basis(left, rows, count), _basis(right, columns, count)
    rotate = lambda x: rows.T @ x @ columns
    # The first gradient only starts the basis.
    used = (count > 0).astype(gradient.dtype)
    mean = old.mean + used * (1 - _DECAY) * (gradient - old.mean)
    square = old.square + used * (1 - _DECAY) * (rotate(gradient) ** 2 - old.square)
    correction = 1 - _DECAY ** jnp.maximum(count, 1)
    scaled = rotate(mean) / correction / (jnp.sqrt(square / correction) + _EPSILON)
    update = used * (rows @ scaled @ columns.T)
    return update, _Matrix(mean, square, left, right, rows, columns)


def _basis(second_moment: Any, old: Any, count: Any) -> Any:
    """The eigenvectors, exactly at first, then followed from the ones before."""
    follow = lambda: jnp.linalg.qr(second_moment @ old)[0]
    first = lambda: jnp.linalg.eigh(second_moment)[1][:, ::-1]
    index = jnp.where(count == 0, 0, jnp.where(count % _EVERY == 0, 1, 2))
    return jax.lax.switch(index, (first, follow, lambda: old))
