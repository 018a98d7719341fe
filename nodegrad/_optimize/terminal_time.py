r"""Learning the end time of a solve.

With $\Phi$ the loss at the end, $\ell$ a running cost, $c\,T^2 / 2$ a penalty on the
end time $T$ and $F$ the vector field, the first derivative of the total loss $Q$ is
$Q_T = c\,T + \sigma$ with the *slope* $\sigma(t, y, u) = \Phi_y^\top F + \ell$; all
second derivatives that involve $T$ are derivatives of the slope.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._internal.dtypes import at_least_float32, is_real


class TerminalTimeState(NamedTuple):
    """The state of `terminal_time`: running averages of the derivatives.

    - `count`: how many updates there were.
    - `first`, `second`: of the first and the second derivative.
    """

    count: Int[Array, ""]
    first: Float[Array, ""]
    second: Float[Array, ""]


def terminal_time(
    where: Callable[[PyTree], Any],
    learning_rate: optax.ScalarOrSchedule = 0.1,
    *,
    penalty: Any,
    bounds: tuple[float, float] = (0.1, float("inf")),
    update_every: int = 50,
    decay: Any = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns the end time of a solve by a second-order rule with feedback.

    The step minimises the Gauss-Newton model of the loss in the end time $T$, given
    the step $\delta u$ that the other parameters are about to make:

    $$T \leftarrow \mathrm{clip}\left(T - \eta\, \frac{\bar Q_T + \sigma\,
      \langle L_u, \delta u \rangle}{\bar Q_{TT}}\right), \qquad
      Q_T = c\,T + \sigma, \quad Q_{TT} = c + \sigma^2,$$

    with $\sigma = dL / dT$ and bars for running averages (the first value counts in
    full). It comes to rest where $T = -\sigma / c$.

    Put it last in an `optax.chain`, so that it sees the steps of the others, and pass
    the gradient to `update` as the extra argument `grad`:

    ```python
    optim = optax.chain(nodegrad.snopt(0.01), nodegrad.terminal_time(
        lambda model: model.t1, penalty=0.05))
    updates, state = optim.update(grads, state, params, grad=grads)
    ```

    **Arguments:**

    - `where`: picks the end time, a scalar, out of the parameters.
    - `learning_rate`: $\eta$, or a schedule of the number of updates.
    - `penalty`: $c > 0$: how much a longer solve costs. The loss is not to contain it.
    - `bounds`: the least and the greatest end time.
    - `update_every`: in how many updates the end time moves once. In all others it
      stays, and its derivatives are averaged.
    - `decay`: of the running averages.

    **Returns:** an `optax.GradientTransformationExtraArgs` that replaces the step of
    the end time and leaves the others as they are. Its `update` takes `grad`, the
    gradient of the loss with respect to all parameters (the mean over the samples of a
    batch, if so the loss), and optionally `squared_slope`, the mean over samples of
    $\sigma_b^2$; without, it is the square of the mean.

    **Raises:** `ValueError` without `grad` or `params`, for an end time that is no
    scalar, and for bounds, a `penalty` or an `update_every` that make no sense.

    **Cost:** a scalar product of the size of the parameters.

    **When not to use it:** for times to save at or to observe, which are ordinary
    parameters. Near a stationary point of the loss the Gauss-Newton model has no
    curvature but the penalty's; `nodegrad.terminal_time_derivatives` has all of it.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, section
        3.4. (The published code divides by the size of the batch twice; its `penalty`
        times that size is the one here.)
    """
    low, high = bounds
    _check_settings(bounds, penalty, update_every, decay)

    def init_fn(params: PyTree) -> Any:
        dtype = jnp.dtype(jnp.float32)
        if jax.tree.leaves(params):
            dtype = at_least_float32(_end_time(where, params, "params").dtype)
        zero = jnp.zeros((), dtype)
        return TerminalTimeState(jnp.zeros((), jnp.int32), zero, zero)

    def update_fn(
        updates, state, params=None, *, grad=None, squared_slope=None, **extra
    ):
        del extra
        if params is None or grad is None:
            msg = (
                "`terminal_time` needs the parameters and the gradient: "
                "`optim.update(grads, state, params, grad=grads)`."
            )
            raise ValueError(msg)
        dtype = state.first.dtype
        as_dtype = lambda x: jnp.asarray(x).astype(dtype)
        t1 = _end_time(where, params, "params")
        slope = as_dtype(_end_time(where, grad, "grad"))
        square = slope**2 if squared_slope is None else as_dtype(squared_slope)
        keep = jnp.where(state.count == 0, 0, as_dtype(decay))
        cost = as_dtype(penalty)
        first = keep * state.first + (1 - keep) * (cost * as_dtype(t1) + slope)
        second = keep * state.second + (1 - keep) * (cost + square)
        step = first + slope * as_dtype(_feedback(where, grad, updates))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new = jnp.clip(as_dtype(t1) - as_dtype(rate) * step / second, low, high)
        count: Any = optax.safe_increment(state.count)
        moves = count % update_every == 0
        change = jnp.where(moves, new - as_dtype(t1), 0).astype(t1.dtype)
        updates = eqx.tree_at(where, updates, change)
        return updates, TerminalTimeState(count, first, second)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_settings(bounds, penalty, update_every, decay) -> None:
    low, high = bounds
    if not 0 <= low < high:
        msg = f"`bounds` must be (low, high) with 0 <= low < high; got {bounds}."
        raise ValueError(msg)
    if isinstance(penalty, int | float) and not penalty > 0:
        msg = (
            f"`penalty` must be positive, or the end time may run away; got {penalty}."
        )
        raise ValueError(msg)
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        msg = f"`decay` must be in [0, 1); got {decay}."
        raise ValueError(msg)
    if update_every < 1:
        msg = f"`update_every` must be at least 1; got {update_every}."
        raise ValueError(msg)


def _end_time(where: Callable, tree: PyTree, name: str) -> Array:
    out = where(tree)
    if jnp.shape(out) != () or not is_real(out):
        msg = (
            f"`where({name})` must be the end time, a floating point scalar array; "
            f"got {out}."
        )
        raise ValueError(msg)
    return out


def _feedback(where: Callable, grad: PyTree, updates: PyTree) -> Any:
    """The scalar product of gradient and step, the end time left out."""
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (grad, updates)]
    if shapes[0] != shapes[1]:
        msg = (
            "`terminal_time` must see the steps of all parameters, and got those of "
            "some: put it last in an `optax.chain`, outside of `optax.partition` and "
            "`optax.masked`."
        )
        raise ValueError(msg)
    grad, updates = (
        eqx.tree_at(where, tree, jnp.zeros_like(where(tree)))
        for tree in (grad, updates)
    )
    return optax.tree_utils.tree_vdot(grad, updates)


class TerminalTimeDerivatives(NamedTuple):
    r"""The derivatives of a loss that involve the end time.

    **Arguments:**

    - `first`: $Q_T$.
    - `second`: $Q_{TT}$.
    - `mixed`: $Q_{Tu}$, a pytree like the parameters $u$.

    **Cost:** none; this is a container.
    """

    first: Float[Array, ""]
    second: Float[Array, ""]
    mixed: PyTree


def terminal_time_derivatives(
    terminal_loss: Callable[[PyTree], Array],
    vector_field: Callable[[Array, PyTree, PyTree], PyTree],
    solve: Callable[[PyTree], PyTree],
    t1: Any,
    params: PyTree,
    *,
    running_cost: Callable[[Array, PyTree, PyTree], Array] | None = None,
    penalty: Any = 0.0,
) -> TerminalTimeDerivatives:
    r"""All derivatives up to the second that involve the end time, exactly.

    For $Q(T, u) = \Phi(y(T)) + \int_{t_0}^T \ell\,dt + c\,T^2 / 2$ with
    $y' = F(t, y, u)$ and the slope $\sigma(t, y, u) = \Phi_y^\top F + \ell$,

    $$Q_T = c\,T + \sigma, \qquad
      Q_{TT} = c + \sigma_t + \sigma_y^\top F, \qquad
      Q_{Tu} = \sigma_u + \left(\frac{\partial y(T)}{\partial u}\right)^\top \sigma_y,$$

    which are $Q_{TT} = c + F^\top \Phi_{yy} F + \Phi_y^\top (F_t + F_y F) + \ell_t +
    \ell_y^\top F$, and so on. The best step of the end time for a step $\delta u$ of
    the parameters is $-(Q_T + \langle Q_{Tu}, \delta u \rangle) / Q_{TT}$.

    **Arguments:**

    - `terminal_loss`: $\Phi$, a function of the state at the end.
    - `vector_field`: $F(t, y, u)$, for the whole of the state (batch included).
    - `solve`: takes $u$ to the state at the end, `y(T)`; differentiable.
    - `t1`: $T$.
    - `params`: $u$, a pytree of arrays (and of whatever else, which is constant).
    - `running_cost`: $\ell(t, y, u)$, a scalar.
    - `penalty`: $c$.

    **Returns:** `TerminalTimeDerivatives(first, second, mixed)`.

    **Raises:** `ValueError` if `t1` is not a scalar.

    **Cost:** one solve and its gradient, and two gradients of the slope.

    **When not to use it:** for the derivatives of the *computed* loss, to rounding;
    take `jax.jvp(jax.grad(loss), ...)`. These here are the limit for small steps.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, section
        3.4 and appendix.
    """
    if jnp.shape(t1) != ():
        msg = f"`t1` must be a scalar; got an array of shape {jnp.shape(t1)}."
        raise ValueError(msg)
    t1 = jnp.asarray(t1)
    diff, static = eqx.partition(params, eqx.is_inexact_array)
    y1, pull = jax.vjp(lambda diff: solve(eqx.combine(diff, static)), diff)

    def slope(t, y, diff):
        params = eqx.combine(diff, static)
        _, out = jax.jvp(terminal_loss, (y,), (vector_field(t, y, params),))
        return out if running_cost is None else out + running_cost(t, y, params)

    sigma, (by_t, by_y, by_u) = jax.value_and_grad(slope, (0, 1, 2))(t1, y1, diff)
    field = vector_field(t1, y1, params)
    (through_state,) = pull(by_y)
    penalty = jnp.asarray(penalty).astype(sigma.dtype)
    return TerminalTimeDerivatives(
        first=penalty * t1 + sigma,
        second=penalty + by_t + optax.tree_utils.tree_vdot(by_y, field),
        mixed=jax.tree.map(jnp.add, by_u, through_state),
    )
