"""`make_steps`: two training steps, with and without new curvature."""

import functools as ft
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
    kind: str = "empirical_fisher",
    reduction: str = "integral",
    num_draws: int | str = 1,
    moments: bool = False,
    batch_size: int | None = None,
    layers: Callable[[str], bool] | None = None,
    has_aux: bool = False,
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
    - `loss`, `predict`, `kind`, `reduction`, `num_draws`, `moments`, `batch_size`,
      `layers`, `has_aux`: as in `nodegrad.value_grad_and_curvature`. All but `loss`,
      `predict` and `has_aux` matter in `refresh` alone.

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
    curvature_fn = value_grad_and_curvature(
        loss,
        predict=predict,
        kind=kind,
        reduction=reduction,
        num_draws=num_draws,
        moments=moments,
        batch_size=batch_size,
        layers=layers,
        has_aux=has_aux,
    )

    mean_loss = ft.partial(_mean_loss, loss, predict, has_aux)

    def update(
        model: Any, opt_state: Any, args: tuple, value: Any, grads: Any, **extra: Any
    ) -> tuple[PyTree, PyTree, Any]:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        grads = jax.tree.map(jnp.conj, grads)  # which Optax follows
        number, _ = value if has_aux else (value, None)
        value_fn = lambda params: mean_loss(eqx.combine(params, static), args)[0]
        extra = dict(value=number, grad=grads, value_fn=value_fn, **extra)
        extra = extra if _takes_extra_args(optim) else {}
        updates, opt_state = optim.update(grads, opt_state, params, **extra)
        return eqx.apply_updates(model, updates), opt_state, value

    @eqx.filter_jit
    def step(
        model: PyTree, opt_state: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[PyTree, PyTree, Any]:
        # It has the arguments of `refresh`, so that one call serves both.
        del key
        value_and_grad = eqx.filter_value_and_grad(mean_loss, has_aux=True)
        (value, aux), grads = value_and_grad(model, args)
        value = (value, aux) if has_aux else value
        return update(model, opt_state, args, value, grads)

    @eqx.filter_jit
    def refresh(
        model: PyTree, opt_state: PyTree, *args: Any, key: Array | None = None
    ) -> tuple[PyTree, PyTree, Any]:
        value, grads, curvature = curvature_fn(model, *args, key=key)
        return update(model, opt_state, args, value, grads, curvature=curvature)

    return Steps(step, refresh)


def _mean_loss(
    loss: Callable[..., Any],
    predict: Callable[..., Any] | None,
    has_aux: bool,
    model: PyTree,
    args: tuple[Any, ...],
) -> tuple[Array, Any]:
    """Returns the mean of the losses, and the auxiliary output or `None`."""
    run = loss if predict is None else predict
    out = run(model, *args)
    out, aux = out if has_aux else (out, None)
    losses = out if predict is None else loss(out, *args)
    return jnp.mean(losses), aux


def _takes_extra_args(optim: Any) -> bool:
    """Returns whether `update` passes extra arguments on, or ignores those unknown."""
    if isinstance(optim, optax.GradientTransformationExtraArgs):
        return True
    # `optax.MultiSteps` has no type that says so.
    parameters = inspect.signature(optim.update).parameters.values()
    return any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters)
