"""Matrix-free products with the Hessian and the Gauss-Newton matrix of any loss."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from .._internal.compat import ClosedJaxpr, eval_jaxpr, Jaxpr
from .._internal.tree import is_traced


_FOREIGN = (
    "A second-order product met something that JAX cannot differentiate by forward "
    "mode over reverse mode: a `jax.custom_vjp` inside the loss or a vector field (it "
    "has first derivatives only; give it a `jax.custom_jvp` instead), or a "
    "differential equation solve. If it is a solve, its adjoint allows first "
    "derivatives only, such as "
    "`diffrax.RecursiveCheckpointAdjoint` (Diffrax's default), "
    "`diffrax.BacksolveAdjoint`, or `diffrax.ForwardMode`. Pass "
    "`adjoint=nodegrad.ACAAdjoint()` (or `nodegrad.ReversibleAdjoint()`) to every "
    "`diffeqsolve` inside the loss, or solve by `nodegrad.odesolve`."
)

# Parts of the messages by which JAX and Equinox say that a rule for one mode of
# differentiation met another mode. There is no exception class for this. Checked on the
# versions that `compat.py` lists; a message that is not known passes unchanged.
_SYMPTOMS = (
    "can't apply forward-mode autodiff (jvp) to a custom_vjp function",
    "can't apply forward-mode differentiation (jvp) to a custom_vjp function",
    "`filter_custom_vjp` cannot be autodifferentiated",
    "Reverse-mode differentiation does not work for lax.while_loop",
)


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
    differentiate. `TypeError` for complex parameters, and for a loss with a solve whose
    adjoint allows first derivatives only.

    **Cost:** two to three and a half gradients, and two to three times the memory of
    one. Independent of the number of parameters otherwise.

    **When not to use it:** for the whole Hessian with respect to few parameters:
    `jax.hessian(loss)` or `nodegrad.hessian_blocks` compute it in one pass. For a
    curvature that is positive semidefinite far from a minimum: `nodegrad.ggn_vp`.

    ??? cite "Reference"

        Pearlmutter: Fast Exact Multiplication by the Hessian, Neural Computation, 1994.
    """
    params, static = _split(params)
    v = _direction(params, v)
    gradient = jax.grad(lambda p: loss(eqx.combine(p, static)))
    return _second_order(lambda p, v: jax.jvp(gradient, (p,), (v,))[1], params, v)


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
    params, static = _split(params)
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

    return _second_order(product, params, v)


def hessian_operator(
    loss: Callable[[PyTree], Array], params: PyTree
) -> lx.FunctionLinearOperator:
    r"""Returns the Hessian $\nabla^2 L(\theta)$ as a linear operator of Lineax.

    Its `mv` is `nodegrad.hvp`, and it is tagged as symmetric. A linear solve with it
    gives the step of Newton's method:

    ```python
    import jax
    import jax.numpy as jnp
    import lineax as lx
    import nodegrad

    loss = lambda p: p[0] ** 2 + p[0] * p[1] + 2 * p[1] ** 2 - 7 * p[1]
    params = jnp.array([3.0, 4.0])
    operator = nodegrad.hessian_operator(loss, params)
    solver = lx.GMRES(rtol=1e-6, atol=1e-6)
    step = lx.linear_solve(operator, jax.grad(loss)(params), solver).value
    print((params - step).round(3))  # [-1. 2.]
    ```

    **Arguments:**

    - `loss`, `params`: as for `nodegrad.hvp`.

    **Returns:** a `lineax.FunctionLinearOperator` on pytrees like the gradient of
    `loss`.

    **Raises:** as `nodegrad.hvp`.

    **Cost:** that of `nodegrad.hvp` for each product. The loss is traced once.

    **When not to use it:** if a solver requires a definite operator, because a Hessian
    may be indefinite. Take `nodegrad.ggn_operator`. If the Hessian is known to be
    definite, wrap the operator in
    `lineax.TaggedLinearOperator(..., lineax.positive_semidefinite_tag)`.
    """
    inexact, _ = _split(params)
    structure = jax.eval_shape(lambda: inexact)
    return lx.FunctionLinearOperator(
        lambda v: hvp(loss, params, v), structure, lx.symmetric_tag
    )


def ggn_operator(
    outputs: Callable[[PyTree], PyTree],
    loss: Callable[[PyTree], Array],
    params: PyTree,
) -> lx.FunctionLinearOperator:
    r"""Returns the generalised Gauss-Newton matrix as a linear operator of Lineax.

    Its `mv` is `nodegrad.ggn_vp`, and it is tagged as positive semidefinite, as
    `lineax.CG` requires. (Lineax does not infer the tag for sums. With damping, wrap
    `ggn_operator(...) + damping * lineax.IdentityLinearOperator(...)` in
    `lineax.TaggedLinearOperator(..., lineax.positive_semidefinite_tag)`.)

    ```python
    import jax
    import jax.numpy as jnp
    import lineax as lx
    import nodegrad

    outputs = lambda p: jnp.array([p[0] + p[1], p[0] - 2 * p[1], p[1]])
    loss = lambda out: jnp.sum((out - jnp.array([3.0, -3.0, 2.0])) ** 2)
    p = jnp.zeros(2)
    operator = nodegrad.ggn_operator(outputs, loss, p)
    gradient = jax.grad(lambda p: loss(outputs(p)))(p)
    step = lx.linear_solve(operator, gradient, lx.CG(rtol=1e-6, atol=1e-6)).value
    print((p - step).round(3))  # [1. 2.]
    ```

    **Arguments:**

    - `outputs`, `loss`, `params`: as for `nodegrad.ggn_vp`. `loss` has to be convex in
      the outputs; otherwise the tag of the operator is wrong.

    **Returns:** a `lineax.FunctionLinearOperator` on pytrees like the gradient.

    **Raises:** as `nodegrad.hvp`.

    **Cost:** that of `nodegrad.ggn_vp` for each product. The loss is traced once.

    **When not to use it:** with a loss that is not convex in the outputs:
    `nodegrad.hessian_operator`.
    """
    inexact, _ = _split(params)
    structure = jax.eval_shape(lambda: inexact)
    return lx.FunctionLinearOperator(
        lambda v: ggn_vp(outputs, loss, params, v),
        structure,
        (lx.symmetric_tag, lx.positive_semidefinite_tag),
    )


def _split(params: PyTree) -> tuple[PyTree, PyTree]:
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
            f"expected {expected}, received {received}. (Integers do not count.)"
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


def _second_order(product: Callable, params: PyTree, v: PyTree) -> PyTree[Array]:
    """Returns `product(params, v)`; errors of JAX explain which adjoints to use."""
    with _first_order_adjoints_explained():
        # Constants are traced inside of `jax.jit` (or a loop), and nowhere else.
        if not is_traced(jnp.zeros(())):
            return product(params, v)
        # Inside of `jax.jit`, JAX raises its error during compilation, which is outside
        # of this function. So the traced product is searched here.
        closed, struct = jax.make_jaxpr(product, return_shape=True)(params, v)
        if _has_unusable_rule(closed.jaxpr):
            raise TypeError(_FOREIGN)
        inputs = jax.tree.leaves((params, v))
        out = eval_jaxpr(closed.jaxpr, closed.consts, *inputs)
        return jax.tree.unflatten(jax.tree.structure(struct), out)


def _has_unusable_rule(jaxpr: Jaxpr) -> bool:
    """Returns whether forward mode met a `jax.custom_vjp` anywhere in `jaxpr`."""
    for eqn in jaxpr.eqns:
        # JAX's forward mode turns the call of a `jax.custom_vjp` into this primitive.
        # Reverse mode would have transposed it, so it should not be left.
        if eqn.primitive.name == "custom_lin":
            return True
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner) and _has_unusable_rule(getattr(inner, "jaxpr", inner)):
                return True
    return False


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


@contextlib.contextmanager
def _first_order_adjoints_explained() -> Iterator[None]:
    """Replaces JAX's errors about missing rules by one that says what to do."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if any(symptom in str(error) for symptom in _SYMPTOMS):
            raise TypeError(_FOREIGN) from error
        raise
