"""`make_steps`: two training steps, with and without new curvature."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .curvature import value_grad_and_curvature


class Steps(NamedTuple):
    """The two training steps that `nodegrad.make_steps` returns.

    - `step`: updates with the gradient alone.
    - `refresh`: updates with the gradient and with new curvature.
    """

    step: Callable[..., tuple[PyTree, PyTree, Any]]
    refresh: Callable[..., tuple[PyTree, PyTree, Any]]


def make_steps(
    optim: optax.GradientTransformation,
    loss: Callable[..., Any],
    *,
    predict: Callable[..., Any] | None = None,
    **options: Any,
) -> Steps:
    r"""Makes two jitted training steps: an ordinary one, and one with new curvature.

    Whether a step gets a `curvature` has to be known when it is compiled. So these are
    two programs, and a counter in Python chooses between them. An ordinary step costs
    a gradient and the update alone.

    ```python
    import equinox as eqx
    import jax
    import nodegrad

    x = jax.numpy.linspace(-1, 1, 9)[:, None]
    loss = lambda model, x: ((jax.vmap(model)(x) - 2 * x - 1) ** 2)[:, 0]
    model, optim = eqx.nn.Linear(1, 1, key=jax.random.PRNGKey(0)), nodegrad.snopt()
    step, refresh = nodegrad.make_steps(optim, loss, moments=True)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for i in range(20):
        run = refresh if i % 20 == 0 else step
        model, opt_state, value = run(model, opt_state, x, key=jax.random.PRNGKey(i))
    print(value < 1e-6)  # True
    ```

    **Arguments:**

    - `optim`: an optax optimiser, usually with `nodegrad.scale_by_snopt` in it. Its
      `update` gets the extra arguments `value`, `grad`, `value_fn`, `curvature_fn` (see
      `nodegrad.snopt`; `value_fn` also serves `optax.lbfgs`), and in `refresh` also
      `curvature`.
    - `loss`, `predict`, `options`: as in `nodegrad.value_grad_and_curvature`.

    **Returns:** `Steps(step, refresh)`, two functions
    `(model, opt_state, *args, key=None) -> (model, opt_state, value)`. With `has_aux`
    the `value` is a pair. Only `refresh` uses the `key`, for random draws.

    **Raises:** as `nodegrad.value_grad_and_curvature`.

    **Cost:** `step`: a gradient and an update. `refresh`: see
    `nodegrad.value_grad_and_curvature`. Each is compiled once. `nodegrad.snopt()`
    without a learning rate calls `curvature_fn` and `value_fn` in both. `curvature_fn`
    is exact: the Gauss-Newton matrix with `predict`, the Hessian without.

    **When not to use it:** for more than this loop: gradient accumulation, several
    devices, your own metrics. Then write both steps yourself, of five lines each.
    """
    has_aux = options.get("has_aux", False)
    curvature_fn = value_grad_and_curvature(loss, predict=predict, **options)

    def forward(model: PyTree, args: tuple[Any, ...]) -> tuple[Array, Any]:
        """Returns the outputs, or the losses without `predict`, and `aux` or `None`."""
        out = (loss if predict is None else predict)(model, *args)
        return out if has_aux else (out, None)

    def mean_loss(out: Array, args: tuple[Any, ...]) -> Array:
        return jnp.mean(out if predict is None else loss(out, *args))

    def extras(model: PyTree, args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
        """Returns the functions of the loss that optimisers may ask for.

        Nothing is computed for an optimiser that does not call them.
        """
        static = eqx.filter(model, eqx.is_inexact_array, inverse=True)

        def value_fn(params: PyTree) -> Array:
            return mean_loss(forward(eqx.combine(params, static), args)[0], args)

        def of_curvature(directions: list[PyTree]) -> Array:
            params = eqx.filter(model, eqx.is_inexact_array)
            if predict is None:
                return _hessian_in(value_fn, params, directions)
            outputs = lambda p: forward(eqx.combine(p, static), args)[0]
            of_outputs = lambda out: mean_loss(out, args)
            return _gauss_newton_in(outputs, of_outputs, params, directions)

        return dict(value_fn=value_fn, curvature_fn=of_curvature)

    def update(
        model: PyTree,
        opt_state: PyTree,
        args: tuple[Any, ...],
        value: Any,
        grads: PyTree,
        **extra: Any,
    ) -> tuple[PyTree, PyTree, Any]:
        # Optimisers without extra arguments ignore them.
        params = eqx.filter(model, eqx.is_inexact_array)
        number, _ = value if has_aux else (value, None)
        extra = dict(value=number, grad=grads, **extras(model, args), **extra)
        optim_with_extras = optax.with_extra_args_support(optim)
        updates, opt_state = optim_with_extras.update(grads, opt_state, params, **extra)
        return eqx.apply_updates(model, updates), opt_state, value

    @eqx.filter_jit
    def step(
        model: PyTree, opt_state: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[PyTree, PyTree, Any]:
        # It has the arguments of `refresh`, so that one call serves both.
        del key

        def mean(model: PyTree) -> tuple[Array, Any]:
            out, aux = forward(model, args)
            return mean_loss(out, args), aux

        (value, aux), grads = eqx.filter_value_and_grad(mean, has_aux=True)(model)
        value = (value, aux) if has_aux else value
        return update(model, opt_state, args, value, grads)

    @eqx.filter_jit
    def refresh(
        model: PyTree, opt_state: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[PyTree, PyTree, Any]:
        value, grads, curvature = curvature_fn(model, *args, key=key)
        return update(model, opt_state, args, value, grads, curvature=curvature)

    return Steps(step, refresh)


def _gauss_newton_in(
    outputs: Callable[[PyTree], Array],
    of_outputs: Callable[[Array], Array],
    params: PyTree,
    directions: list[PyTree],
) -> Float[Array, "k k"]:
    r"""Returns $d_i^\top G d_j$ for all directions, with the Gauss-Newton matrix $G$.

    It needs one pushforward for each direction, and no pullback.
    """
    out, push = jax.linearize(outputs, params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    # (k, batch, ...)
    tangents = jax.vmap(push)(stacked)
    gradient = jax.grad(of_outputs)
    curved = jax.vmap(lambda v: jax.jvp(gradient, (out,), (v,))[1])(tangents)
    k = len(directions)
    return tangents.reshape(k, -1) @ curved.reshape(k, -1).T


def _hessian_in(
    value_fn: Callable[[PyTree], Array], params: PyTree, directions: list[PyTree]
) -> Float[Array, "k k"]:
    r"""Returns $d_i^\top H d_j$ for all directions, with the Hessian $H$."""

    def along(coefficients: Float[Array, " k"]) -> Array:
        def moved(x: Array, *steps: Array) -> Array:
            terms = zip(coefficients, steps, strict=True)
            return x + sum(c.astype(x.dtype) * d for c, d in terms)

        return value_fn(jax.tree.map(moved, params, *directions))

    # Forward over forward mode: there are two or three coefficients.
    dtype = jax.eval_shape(value_fn, params).dtype
    zeros = jnp.zeros(len(directions), dtype)
    return jax.jacfwd(jax.jacfwd(along))(zeros)
