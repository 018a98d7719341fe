"""`make_steps`: two training steps, with and without new curvature."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

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
    for i in range(50):
        run = refresh if i % 10 == 0 else step
        model, opt_state, value = run(model, opt_state, x, key=jax.random.PRNGKey(i))
    print(value < 1e-6)  # True
    ```

    **Arguments:**

    - `optim`: an optax optimiser, usually with `nodegrad.scale_by_snopt` in it. Its
      `update` gets the extra arguments `value`, `grad` and `value_fn` (as `optax.lbfgs`
      takes them), and in `refresh` also `curvature`.
    - `loss`, `predict`, and the `options` `kind`, `reduction`, `num_draws`, `moments`,
      `batch_size`, `layers` and `has_aux`: as in `nodegrad.value_grad_and_curvature`.

    **Returns:** `Steps(step, refresh)`, two functions
    `(model, opt_state, *args, key=None) -> (model, opt_state, value)`. With `has_aux`
    the `value` is a pair. Only `refresh` uses the `key`, for random draws.

    **Raises:** as `nodegrad.value_grad_and_curvature`.

    **Cost:** `step`: a gradient and an update. `refresh`: see
    `nodegrad.value_grad_and_curvature`. Each is compiled once. `nodegrad.snopt()`
    without a learning rate also evaluates the loss four times in both.

    **When not to use it:** for more than this loop: gradient accumulation, several
    devices, your own metrics. Then write the two steps yourself; each takes five lines.
    """
    has_aux = options.get("has_aux", False)
    curvature_fn = value_grad_and_curvature(loss, predict=predict, **options)

    def mean_loss(model: PyTree, args: tuple[Any, ...]) -> tuple[Array, Any]:
        # `aux` is `None` unless `has_aux`.
        aux = None
        if predict is None:
            out = loss(model, *args)
            losses, aux = out if has_aux else (out, None)
        else:
            outputs = predict(model, *args)
            outputs, aux = outputs if has_aux else (outputs, None)
            losses = loss(outputs, *args)
        return jnp.mean(losses), aux

    def update(
        model: PyTree,
        opt_state: PyTree,
        args: tuple[Any, ...],
        value: Any,
        grads: PyTree,
        **extra: Any,
    ) -> tuple[PyTree, PyTree, Any]:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        grads = jax.tree.map(jnp.conj, grads)  # which Optax follows
        number, _ = value if has_aux else (value, None)
        value_fn = lambda params: mean_loss(eqx.combine(params, static), args)[0]
        extra = dict(value=number, grad=grads, value_fn=value_fn, **extra)
        if not _takes_extra_args(optim):
            extra = {}
        updates, opt_state = optim.update(grads, opt_state, params, **extra)
        return eqx.apply_updates(model, updates), opt_state, value

    @eqx.filter_jit
    def step(
        model: PyTree, opt_state: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[PyTree, PyTree, Any]:
        # It has the arguments of `refresh`, so that one call serves both.
        del key
        (value, aux), grads = eqx.filter_value_and_grad(mean_loss, has_aux=True)(
            model, args
        )
        value = (value, aux) if has_aux else value
        return update(model, opt_state, args, value, grads)

    @eqx.filter_jit
    def refresh(
        model: PyTree, opt_state: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[PyTree, PyTree, Any]:
        value, grads, curvature = curvature_fn(model, *args, key=key)
        return update(model, opt_state, args, value, grads, curvature=curvature)

    return Steps(step, refresh)


def _takes_extra_args(optim: Any) -> bool:
    """Returns whether `update` passes extra arguments on, or ignores those unknown."""
    if isinstance(optim, optax.GradientTransformationExtraArgs):
        return True
    # `optax.MultiSteps` has no type that says so.
    parameters = inspect.signature(optim.update).parameters.values()
    return any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters)
