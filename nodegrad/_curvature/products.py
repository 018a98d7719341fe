"""Matrix-free products with the Hessian and the Gauss-Newton matrix of any loss."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._layers.second_order import second_order


def hvp(
    loss: Callable[[PyTree], Array], params: PyTree, v: PyTree[Array]
) -> PyTree[Array]:
    r"""Returns the product $\nabla^2 L(\theta)\, v$ of a Hessian with a vector.

    It uses forward mode over reverse mode: the derivative of
    $\nabla L(\theta + \epsilon v)$ with respect to $\epsilon$, with the step sizes of
    every solve held constant. The Hessian itself is never formed.

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    def loss(rate):
        field, dopri5 = lambda t, y, args: -rate * y, diffrax.Dopri5()
        sol = nodegrad.odesolve(field, dopri5, 0.0, 1.0, 0.1, jnp.array(1.0))
        return sol.ys[-1]  # exp(-rate)

    print(nodegrad.hvp(loss, jnp.array(2.0), jnp.array(1.0)).round(4))  # 0.1353
    ```

    **Arguments:**

    - `loss`: a function of `params` alone that returns a real scalar. It may contain
      any number of solves by `nodegrad.odesolve`, or by `diffrax.diffeqsolve` with an
      adjoint of nodegrad's, adaptive or not, batched or not.
    - `params`: $\theta$, any pytree, for example an Equinox module. Its floating point
      arrays are differentiated; all other leaves are constants.
    - `v`: the vector, a pytree like `params`, or like its gradient, with `None` for
      leaves that are constants.

    **Returns:** the product, a pytree like the gradient: `None` stands for the leaves
    of `params` that are not floating point arrays.

    **Raises:** `ValueError` if `v` does not fit `params`, or if there is nothing to
    differentiate. `TypeError` for complex parameters, and for a loss with a
    `jax.custom_vjp`, or a solve with an adjoint, that allows first derivatives only.

    **Cost:** two to three and a half gradients, and two to three times the memory of
    one. Independent of the number of parameters otherwise.

    **When not to use it:** for the whole Hessian with respect to few parameters:
    `jax.hessian(loss)` or `nodegrad.hessian_blocks` compute it in one pass. For a
    curvature that is positive semidefinite far from a minimum: `nodegrad.ggn_vp`.

    ??? cite "Reference"

        Pearlmutter: Fast Exact Multiplication by the Hessian, Neural Computation, 1994.
    """
    params, static = split(params)
    v = _direction(params, v)
    gradient = jax.grad(lambda p: loss(eqx.combine(p, static)))
    return second_order(lambda p, v: jax.jvp(gradient, (p,), (v,))[1], params, v)


def ggn_vp(
    outputs: Callable[[PyTree], PyTree],
    loss: Callable[[PyTree], Array],
    params: PyTree,
    v: PyTree[Array],
) -> PyTree[Array]:
    r"""Returns the product of the generalised Gauss-Newton matrix with a vector.

    For a loss $\ell(g(\theta))$ with $J = \partial g / \partial \theta$, this is

    $$G v = J^\top \nabla^2 \ell(g(\theta))\, J v,$$

    the Hessian without the curvature of $g$. $G$ is symmetric, and positive
    semidefinite if $\ell$ is convex. For a sum of squares, $G$ is the matrix of the
    Gauss-Newton and Levenberg-Marquardt methods. For the negative log-likelihood of an
    exponential family in its natural parameters, $G$ is the Fisher information.

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    def outputs(rate):
        field, dopri5 = lambda t, y, args: -rate * y, diffrax.Dopri5()
        return nodegrad.odesolve(field, dopri5, 0.0, 1.0, 0.1, jnp.array(1.0)).ys

    loss = lambda ys: 0.5 * jnp.sum((ys - 0.1) ** 2)
    rate, v = jnp.array(2.0), jnp.array(1.0)
    # (d/drate exp(-rate))^2
    print(nodegrad.ggn_vp(outputs, loss, rate, v).round(4))  # 0.0183
    ```

    **Arguments:**

    - `outputs`: $g$, a function of `params` alone that returns a pytree of arrays. As
      for `nodegrad.hvp`, it may contain any number of solves.
    - `loss`: $\ell$, a function of the result of `outputs` that returns a real scalar.
    - `params`, `v`: as for `nodegrad.hvp`.

    **Returns:** the product, as `nodegrad.hvp`.

    **Raises:** as `nodegrad.hvp`.

    **Cost:** about one and a half gradients: one forward pass, one pushforward of $v$
    through the accepted steps, one pullback.

    **When not to use it:** if the outputs are far from the data and $g$ is strongly
    curved. There $G$ differs from the Hessian much: see `nodegrad.hvp`.

    ??? cite "Reference"

        Schraudolph: Fast Curvature Matrix-Vector Products for Second-Order Gradient
        Descent, Neural Computation, 2002.
    """
    params, static = split(params)
    v = _direction(params, v)

    def differentiable_outputs(p: PyTree[Array]) -> tuple[PyTree[Array], PyTree]:
        out = outputs(eqx.combine(p, static))
        out, constant = eqx.partition(out, eqx.is_inexact_array)
        if not jax.tree.leaves(out):
            msg = f"`outputs` must return floating point arrays; got {constant}."
            raise ValueError(msg)
        return out, constant

    def product(p: PyTree[Array], v: PyTree[Array]) -> PyTree[Array]:
        # One forward pass serves the pushforward and the pullback.
        out, push, constant = jax.linearize(differentiable_outputs, p, has_aux=True)
        # Jv
        jv = push(v)
        # H Jv
        gradient = jax.grad(lambda out: loss(eqx.combine(out, constant)))
        _, hjv = jax.jvp(gradient, (out,), (jv,))
        # J^T H Jv
        (out,) = jax.linear_transpose(push, p)(hjv)
        return out

    return second_order(product, params, v)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the floating point arrays of `params`, and all other leaves.

    Raises if there are no such arrays, or if one is complex.
    """
    inexact, static = eqx.partition(params, eqx.is_inexact_array)
    leaves = jax.tree.leaves(inexact)
    if not leaves:
        msg = (
            "`params` must hold floating point arrays to differentiate with respect "
            f"to; got {params!r}. (Python numbers are constants: use `jnp.asarray`.)"
        )
        raise ValueError(msg)
    for x in leaves:
        if jnp.iscomplexobj(x):
            msg = (
                f"`params` must be real; got a leaf of {x.dtype}. Differentiate with "
                "respect to its real and imaginary parts."
            )
            raise TypeError(msg)
    return inexact, static


def _direction(params: PyTree[Array], v: PyTree) -> PyTree[Array]:
    """Returns the floating point arrays of `v`.

    Raises unless they have the structure, the shapes and the dtypes of `params`.
    """
    v = eqx.filter(v, eqx.is_inexact_array)
    expected, received = jax.tree.structure(params), jax.tree.structure(v)
    if expected != received:
        msg = (
            "`v` must have the structure of the floating point arrays in `params`: "
            f"expected {expected}, received {received}. (Integers and Python "
            "numbers do not count: for a number use `jnp.asarray`.)"
        )
        raise ValueError(msg)
    paths, _ = jax.tree.flatten_with_path(params)
    for (path, p), x in zip(paths, jax.tree.leaves(v), strict=True):
        if (p.shape, p.dtype) != (x.shape, x.dtype):
            msg = (
                "`v` must have the shapes and dtypes of `params`: for the leaf "
                f"{jax.tree_util.keystr(path) or 'itself'} expected {p.dtype}"
                f"{list(p.shape)}, received {x.dtype}{list(x.shape)}."
            )
            raise ValueError(msg)
    return v
