r"""`terminal_time` learns the end time of a solve; and derivatives in the end time.

Notation: $T$ is the end time, $\Phi$ the loss at the end, $\ell$ a running cost,
$c\,T^2 / 2$ a penalty and $F$ the vector field. The total loss $Q$ has the derivative
$Q_T = c\,T + \sigma$, with the *slope* $\sigma(t, y, u) = \Phi_y^\top F + \ell$. All
second derivatives that involve $T$ are derivatives of the slope.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real

from .._internal.compat import default_floating_dtype
from .._internal.tree import (
    all_finite,
    at_least_float32,
    check_numbers,
    is_real,
    where as select,
)


_NO_GRADIENT = (
    "`terminal_time` needs the parameters and the gradient: "
    "`optim.update(grads, state, params, grad=grads)`."
)


class TerminalTimeState(NamedTuple):
    r"""The state of `terminal_time`.

    - `count`: the number of updates so far.
    - `first`, `second`: running averages of $Q_T$ and of $Q_{TT}$.
    """

    count: Int[Array, ""]
    first: Float[Array, ""]
    second: Float[Array, ""]


def terminal_time(
    where: Callable[[PyTree], Array],
    learning_rate: optax.ScalarOrSchedule = 0.1,
    *,
    penalty: Real[ArrayLike, ""],
    bounds: tuple[Real[ArrayLike, ""], Real[ArrayLike, ""]] = (0.1, float("inf")),
    update_every: Int[ArrayLike, ""] = 50,
    decay: Real[ArrayLike, ""] = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns the end time of a solve by a second-order rule with feedback.

    The step minimises the Gauss-Newton model of the loss in the end time $T$, given
    the step $\delta u$ that the other parameters are about to make:

    $$T \leftarrow \mathrm{clip}\left(T - \eta\, \frac{\bar Q_T + \sigma\,
      \langle L_u, \delta u \rangle}{\bar Q_{TT}}\right), \qquad
      Q_T = c\,T + \sigma, \quad Q_{TT} = c + \sigma^2,$$

    with $\sigma = dL / dT$. Bars are running averages, which start from the first
    value. The rule converges where $T = -\sigma / c$.

    Put it last in an `optax.chain`, so that it sees the steps of the other parameters:
    `optax.chain(nodegrad.snopt(0.01), nodegrad.terminal_time(...))`. Pass the gradient
    to `update` again, as the extra argument `grad`.

    ```python
    import jax
    import jax.numpy as jnp
    import nodegrad

    # The loss exp(-T) and the penalty 0.1 T^2 / 2.
    model, loss = {"t1": jnp.array(1.0)}, lambda model: jnp.exp(-model["t1"])
    t1, options = lambda model: model["t1"], dict(update_every=1, decay=0.9)
    optim = nodegrad.terminal_time(t1, penalty=0.1, **options)
    state, update = optim.init(model), jax.jit(optim.update)
    for _ in range(200):
        grads = jax.grad(loss)(model)
        step, state = update(grads, state, model, grad=grads)
        model = jax.tree.map(jnp.add, model, step)
    print(model["t1"].round(2))  # 1.75
    ```

    **Arguments:**

    - `where`: returns the end time, a scalar, of a tree of parameters.
    - `learning_rate`: $\eta$, or a schedule of the number of updates.
    - `penalty`: $c > 0$, the cost of a longer solve. The loss must not contain it.
    - `bounds`: the least and the greatest end time.
    - `update_every`: the end time moves once in so many updates. In all others it
      stays, and its derivatives are averaged.
    - `decay`: of the running averages.

    **Returns:** an `optax.GradientTransformationExtraArgs` that replaces the step of
    the end time and leaves the others unchanged. Its `update` takes `grad`, the
    gradient of the loss with respect to all parameters (of the mean over samples, if
    the loss is one), and optionally `squared_slope`, the mean over samples of
    $\sigma_b^2$. By default this is the square of the mean slope.

    **Raises:** `ValueError` without `grad` or `params`, if the end time is not a
    scalar, and for wrong `bounds`, `penalty`, `decay` or `update_every`.

    **Cost:** a scalar product of the size of the parameters.

    **When not to use it:** for times to save at or to observe, which are ordinary
    parameters. Near a stationary point of the loss, the Gauss-Newton model has no
    curvature except for the penalty's; `nodegrad.terminal_time_derivatives` has all of
    it.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, section
        3.4. (The published code divides by the size of the batch twice; its `penalty`
        times that size is the one here.)
    """
    _check_settings(bounds, penalty, update_every, decay)
    low, high = bounds

    # States are `Any` for type checkers: Optax's type of states excludes named tuples.
    def init_fn(params: PyTree) -> Any:
        # Without parameters, as in `optax.tree_map_params`, any dtype will do.
        dtype = jnp.dtype(jnp.float32)
        if jax.tree.leaves(params):
            dtype = at_least_float32(_end_time(where, params, "params").dtype)
        # Arrays of their own, so that the state may be donated.
        first, second = jnp.zeros((), dtype), jnp.zeros((), dtype)
        return TerminalTimeState(jnp.zeros((), jnp.int32), first, second)

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        grad: PyTree | None = None,
        squared_slope: Real[ArrayLike, ""] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del extra
        if params is None or grad is None:
            raise ValueError(_NO_GRADIENT)
        as_dtype = lambda x: jnp.asarray(x).astype(state.first.dtype)
        t1 = _end_time(where, params, "params")
        slope = as_dtype(_end_time(where, grad, "grad"))
        square = slope**2 if squared_slope is None else as_dtype(squared_slope)
        # The first value counts in full, so the averages have no bias towards zero.
        keep = jnp.where(state.count == 0, 0, as_dtype(decay))
        cost = as_dtype(penalty)
        first = keep * state.first + (1 - keep) * (cost * as_dtype(t1) + slope)
        second = keep * state.second + (1 - keep) * (cost + square)
        # In the Gauss-Newton model, the step of the other parameters changes the first
        # derivative by sigma <L_u, du>.
        step = first + slope * as_dtype(_feedback(where, grad, updates))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new = jnp.clip(as_dtype(t1) - as_dtype(rate) * step / second, low, high)
        # A NaN, such as that of a failed solve, would stay in the averages.
        usable = all_finite((step, second))
        count: Any = optax.safe_increment(state.count)
        moves = usable & (count % update_every == 0)
        change = jnp.where(moves, new - as_dtype(t1), 0).astype(t1.dtype)
        state = select(usable, TerminalTimeState(count, first, second), state)
        return eqx.tree_at(where, updates, change), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_settings(
    bounds: tuple[Real[ArrayLike, ""], Real[ArrayLike, ""]],
    penalty: Real[ArrayLike, ""],
    update_every: Int[ArrayLike, ""],
    decay: Real[ArrayLike, ""],
) -> None:
    """Raises `ValueError` for wrong Python numbers; arrays may be traced, and pass."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        msg = f"`bounds` must be a pair (low, high); got {bounds!r}."
        raise TypeError(msg)
    check_numbers(penalty=penalty, decay=decay, low=bounds[0], high=bounds[1])
    check_numbers(integers=True, update_every=update_every)
    numbers = [x for x in bounds if isinstance(x, int | float)]
    if len(numbers) == 2 and not 0 <= numbers[0] < numbers[1]:
        msg = f"`bounds` must be (low, high) with 0 <= low < high; got {bounds}."
        raise ValueError(msg)
    if isinstance(penalty, int | float) and not penalty > 0:
        msg = (
            f"`penalty` must be positive: without it the end time may grow without "
            f"bound; got {penalty}."
        )
        raise ValueError(msg)
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        msg = f"`decay` must be in [0, 1); got {decay}."
        raise ValueError(msg)
    if isinstance(update_every, int) and update_every < 1:
        msg = f"`update_every` must be at least 1; got {update_every}."
        raise ValueError(msg)


def _end_time(where: Callable[[PyTree], Array], tree: PyTree, name: str) -> Array:
    """Returns `where(tree)`, after checking that it is a real scalar array."""
    out = where(tree)
    if jnp.shape(out) != () or not is_real(out):
        msg = (
            f"`where({name})` must be the end time, a floating point scalar array; "
            f"got {out}."
        )
        raise ValueError(msg)
    return out


def _feedback(
    where: Callable[[PyTree], Array], grad: PyTree, updates: PyTree
) -> ArrayLike:
    """Returns the scalar product of gradient and step, without the end time."""
    # Masked parameters are missing in one of the trees.
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (grad, updates)]
    if shapes[0] != shapes[1]:
        msg = (
            "`terminal_time` must see the steps of all parameters, but got only those "
            "of some: put it last in an `optax.chain`, outside of `optax.partition` "
            "and `optax.masked`."
        )
        raise ValueError(msg)
    grad, updates = (
        eqx.tree_at(where, tree, jnp.zeros_like(where(tree)))
        for tree in (grad, updates)
    )
    return optax.tree_utils.tree_vdot(grad, updates)


class TerminalTimeDerivatives(NamedTuple):
    r"""The derivatives of a loss that involve the end time.

    `nodegrad.terminal_time_derivatives` returns and defines them.

    **Arguments:**

    - `first`: $Q_T$, a scalar.
    - `second`: $Q_{TT}$, a scalar.
    - `mixed`: $Q_{Tu}$, a pytree like the parameters $u$.
    """

    first: Float[Array, ""]
    second: Float[Array, ""]
    mixed: PyTree


def terminal_time_derivatives(
    terminal_loss: Callable[[PyTree], Array],
    vector_field: Callable[[Array, PyTree, PyTree], PyTree],
    solve: Callable[[PyTree], PyTree],
    t1: Real[ArrayLike, ""],
    params: PyTree,
    *,
    running_cost: Callable[[Array, PyTree, PyTree], Array] | None = None,
    penalty: Real[ArrayLike, ""] = 0.0,
) -> TerminalTimeDerivatives:
    r"""Returns the first and second derivatives that involve the end time, exactly.

    For $Q(T, u) = \Phi(y(T)) + \int_{t_0}^T \ell\,dt + c\,T^2 / 2$ with
    $y' = F(t, y, u)$ and the slope $\sigma(t, y, u) = \Phi_y^\top F + \ell$,

    $$Q_T = c\,T + \sigma, \qquad
      Q_{TT} = c + \sigma_t + \sigma_y^\top F, \qquad
      Q_{Tu} = \sigma_u + \left(\frac{\partial y(T)}{\partial u}\right)^\top \sigma_y,$$

    Written out, $Q_{TT} = c + F^\top \Phi_{yy} F + \Phi_y^\top (F_t + F_y F) + \ell_t +
    \ell_y^\top F$. For a step $\delta u$ of the parameters, the best step of the end
    time is $-(Q_T + \langle Q_{Tu}, \delta u \rangle) / Q_{TT}$.

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad

    def solve(rate):  # y(1) = exp(-rate)
        solver, y0 = diffrax.Dopri5(), jnp.array(1.0)
        return nodegrad.odesolve(field, solver, 0.0, 1.0, 0.1, y0, rate).ys[-1]

    field, loss, rate = lambda t, y, rate: -rate * y, lambda y: y, jnp.array(2.0)
    out = nodegrad.terminal_time_derivatives(loss, field, solve, 1.0, rate)
    print([float(x.round(3)) for x in out])  # [-0.271, 0.541, 0.135]
    ```

    **Arguments:**

    - `terminal_loss`: $\Phi$, a function of the state at the end.
    - `vector_field`: $F(t, y, u)$, for the whole state (including the batch).
    - `solve`: a differentiable function that returns `y(T)` for $u$.
    - `t1`: $T$.
    - `params`: $u$, a pytree of arrays (other leaves are treated as constants).
    - `running_cost`: $\ell(t, y, u)$, a scalar.
    - `penalty`: $c$.

    **Returns:** `TerminalTimeDerivatives(first, second, mixed)`.

    **Raises:** `ValueError` if `t1` is not a scalar.

    **Cost:** one solve and its gradient, and two gradients of the slope.

    **When not to use it:** for the derivatives of the *computed* loss, exact up to
    rounding: take `jax.jvp(jax.grad(loss), ...)`. The derivatives here are the limit
    for small steps.

    ??? cite "Reference"

        Liu, Chen, Theodorou: Second-order Neural ODE Optimizer, NeurIPS 2021, section
        3.4 and appendix.
    """
    if jnp.shape(t1) != ():
        msg = f"`t1` must be a scalar; got an array of shape {jnp.shape(t1)}."
        raise ValueError(msg)
    t1 = jnp.asarray(t1)
    if not is_real(t1):
        # An integer has no derivative.
        t1 = t1.astype(default_floating_dtype())
    diff, static = eqx.partition(params, eqx.is_inexact_array)
    y1, pull = jax.vjp(lambda diff: solve(eqx.combine(diff, static)), diff)

    def field(t: Real[Array, ""], y: PyTree[Array], params: PyTree) -> PyTree[Array]:
        # A scalar is broadcast to its leaf, as in a solve.
        like = lambda y, f: jnp.broadcast_to(f, jnp.shape(y)).astype(y.dtype)
        return jax.tree.map(like, y, vector_field(t, y, params))

    def slope(
        t: Real[Array, ""], y: PyTree[Array], diff: PyTree[Array]
    ) -> Float[Array, ""]:
        params = eqx.combine(diff, static)
        _, out = jax.jvp(terminal_loss, (y,), (field(t, y, params),))
        return out if running_cost is None else out + running_cost(t, y, params)

    sigma, (by_t, by_y, by_u) = jax.value_and_grad(slope, (0, 1, 2))(t1, y1, diff)
    # JAX's gradient times the field. Of a complex state nothing is conjugated.
    terms = jax.tree.map(
        lambda g, f: jnp.sum((g * f).real), by_y, field(t1, y1, params)
    )
    # The parameters also change the slope through the state at the end.
    (through_state,) = pull(by_y)
    penalty = jnp.asarray(penalty).astype(sigma.dtype)
    return TerminalTimeDerivatives(
        first=penalty * t1 + sigma,
        second=penalty + by_t + sum(jax.tree.leaves(terms)),
        mixed=jax.tree.map(jnp.add, by_u, through_state),
    )
