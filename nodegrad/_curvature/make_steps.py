"""Training with curvature that is refreshed now and then."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optax

from .curvature import value_grad_and_curvature


class Steps(NamedTuple):
    """Two ways of taking the same step, see `nodegrad.make_steps`.

    - `step`: with the gradient alone.
    - `refresh`: with the gradient and new curvature.
    """

    step: Callable
    refresh: Callable


def make_steps(
    optim: optax.GradientTransformation,
    loss: Callable[..., Any],
    *,
    predict: Callable[..., Any] | None = None,
    **options: Any,
) -> Steps:
    r"""Two jitted training steps: an ordinary one, and one that refreshes curvature.

    Whether there is a `curvature` must be known when a step is compiled, and so these
    are two programs, between which a counter in Python chooses. An iteration in between
    refreshes then pays for nothing but its gradient and two small rotations.

    ```python
    step, refresh = nodegrad.make_steps(optim, loss)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for i, (x, y) in enumerate(batches):
        run = refresh if i % 100 == 0 else step
        model, opt_state, value = run(model, opt_state, x, y)
    ```

    **Arguments:**

    - `optim`: any optax optimiser, presumably with `nodegrad.scale_by_snopt` in it. Its
      `update` gets the extra arguments `value` and `grad`, and `curvature` when
      refreshed.
    - `loss`, `predict`, `options`: as in `nodegrad.value_grad_and_curvature`.

    **Returns:** `Steps(step, refresh)`, two functions
    `(model, opt_state, *args, key=None) -> (model, opt_state, value)`. With `has_aux`
    the `value` is a pair. Only `refresh` uses the `key`, if what it does is random.

    **Raises:** as `nodegrad.value_grad_and_curvature`.

    **Cost:** `step`: a gradient and an update. `refresh`: see
    `nodegrad.value_grad_and_curvature`. Each is compiled once.

    **When not to use it:** for anything more than this loop: gradient accumulation,
    several devices, your own metrics. Then write your two steps; each is five lines.
    """
    has_aux = options.get("has_aux", False)
    curvature_fn = value_grad_and_curvature(loss, predict=predict, **options)

    def mean_loss(model, args):
        aux = None
        if predict is None:
            out = loss(model, *args)
            losses, aux = out if has_aux else (out, None)
        else:
            outputs = predict(model, *args)
            outputs, aux = outputs if has_aux else (outputs, None)
            losses = loss(outputs, *args)
        return jnp.mean(losses), aux

    def update(model, opt_state, value, grads, **extra):
        params = eqx.filter(model, eqx.is_inexact_array)
        number, _ = value if has_aux else (value, None)
        updates, opt_state = optax.with_extra_args_support(optim).update(
            grads, opt_state, params, value=number, grad=grads, **extra
        )
        return eqx.apply_updates(model, updates), opt_state, value

    @eqx.filter_jit
    def step(model, opt_state, *args, key=None):
        del key
        (value, aux), grads = eqx.filter_value_and_grad(mean_loss, has_aux=True)(
            model, args
        )
        value = (value, aux) if has_aux else value
        return update(model, opt_state, value, grads)

    @eqx.filter_jit
    def refresh(model, opt_state, *args, key=None):
        value, grads, curvature = curvature_fn(model, *args, key=key)
        return update(model, opt_state, value, grads, curvature=curvature)

    return Steps(step, refresh)
