"""The products of `products.py` as operators for Lineax."""

from collections.abc import Callable

import jax
import lineax as lx
from jaxtyping import Array, PyTree

from .products import ggn_vp, hvp, split


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
    inexact, _ = split(params)
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
    inexact, _ = split(params)
    structure = jax.eval_shape(lambda: inexact)
    return lx.FunctionLinearOperator(
        lambda v: ggn_vp(outputs, loss, params, v),
        structure,
        (lx.symmetric_tag, lx.positive_semidefinite_tag),
    )
