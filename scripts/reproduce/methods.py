"""The three methods that the ACA paper compares, for the gradient of one solve.

ACA is `nodegrad.ACAAdjoint`, the adjoint method is `diffrax.BacksolveAdjoint`. The
naive method differentiates the search for step sizes too. Diffrax and nodegrad hold
step sizes constant when they differentiate a solve, so there is a loop for it here.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import nodegrad


METHODS = ("ACA", "naive", "adjoint")
# Solves that diverge end here; the others take a tenth of it.
_MAX_STEPS = 4096


def gradients(
    vector_field: Any, method: str, loss: Any, t1: Any, y0: Any, args: Any, tol: Any
) -> Any:
    """The loss of the final state, with its gradients in `y0` and `args`.

    - `method`: one of `METHODS`, or `"exact"` for Diffrax's Dopri8 forwards.
    - `tol`: the relative and the absolute tolerance.
    """
    if method == "naive":
        solve = lambda y0, args: _naive(vector_field, t1, y0, args, *tol)
    else:
        solve = lambda y0, args: _diffrax(vector_field, method, t1, y0, args, tol)
    run = lambda y0, args: loss(solve(y0, args))
    if method in ("naive", "exact"):
        return run(y0, args), jax.jacfwd(run, argnums=(0, 1))(y0, args)
    return jax.value_and_grad(run, argnums=(0, 1))(y0, args)


def _diffrax(
    vector_field: Any, method: str, t1: Any, y0: Any, args: Any, tol: Any
) -> Any:
    adjoints = {
        "ACA": nodegrad.ACAAdjoint(),
        "adjoint": diffrax.BacksolveAdjoint(),
        "exact": diffrax.ForwardMode(),
    }
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Dopri8() if method == "exact" else diffrax.Dopri5(),
        jnp.zeros_like(t1),
        t1,
        None,
        y0,
        args,
        stepsize_controller=diffrax.PIDController(*tol),
        adjoint=adjoints[method],
        max_steps=_MAX_STEPS,
        throw=False,
    )
    assert sol.ys is not None
    return sol.ys[-1]


def _naive(
    vector_field: Callable[[Any, Any, Any], Any],
    t1: Any,
    y0: Any,
    args: Any,
    rtol: Any,
    atol: Any,
) -> Any:
    """The state at `t1` from `y0` at 0, by Dopri5. Only for derivatives forwards.

    These are the derivatives of the whole program, the same numbers as those that a
    reverse pass through all of its operations has.
    """
    attempt = _attempt(vector_field, args, rtol, atol)
    start = jnp.zeros_like(t1), y0, t1 / 100
    end = lambda state: attempt(t1, state)
    return jax.lax.while_loop(lambda state: _before(state, t1), end, start)[1]


def naive_path(
    vector_field: Callable[[Any, Any, Any], Any],
    ts: Any,
    y0: Any,
    args: Any,
    tol: float,
    attempts: int | None = None,
) -> Any:
    """The states at `ts` by steps that end there. Only for derivatives forwards,
    unless at most so many `attempts` lead from one time to the next one; if they are
    not enough, the states are not finite.
    """
    attempt = _attempt(vector_field, args, tol, tol)

    def advance(carry: Any, t1: Any) -> Any:
        def once(state: Any, _: Any) -> Any:
            go = _before(state, t1)
            attempt_to = lambda state: attempt(t1, state)
            return jax.lax.cond(go, attempt_to, lambda state: state, state), None

        if attempts is None:
            going = lambda state: _before(state, t1)
            state = jax.lax.while_loop(going, lambda s: attempt(t1, s), carry)
        else:
            state, _ = jax.lax.scan(once, carry, None, length=attempts)
        t, y, size = state
        y = jnp.where(_before(state, t1), jnp.nan, y)
        return (t, y, size), y

    start = ts[0], y0, ts[1] - ts[0]
    _, ys = jax.lax.scan(advance, start, ts[1:])
    return jnp.concatenate([y0[None], ys])


def _before(state: Any, t1: Any) -> Any:
    # Rounding may leave less than this.
    return state[0] < t1 * (1 - 1e-12)


def _attempt(
    vector_field: Callable[[Any, Any, Any], Any], args: Any, rtol: Any, atol: Any
) -> Callable[[Any, Any], Any]:
    """One step of Dopri5 that does not pass `t1`, accepted or not.

    It goes from time, state and proposed step size to the same three.
    """
    tableau = diffrax.Dopri5.tableau
    weights = [np.zeros(0), *tableau.a_lower]

    def attempt(t1: Any, state: Any) -> Any:
        t, y, size = state
        size = jnp.minimum(size, t1 - t)
        slopes: list[Any] = []
        combine = lambda b: size * sum(w * k for w, k in zip(b, slopes, strict=True))
        for c, row in zip([0.0, *tableau.c], weights, strict=True):
            stage = y + combine(row) if slopes else y
            slopes.append(vector_field(t + c * size, stage, args))
        y1 = y + combine(tableau.b_sol)
        scale = atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(y1))
        # The root has no derivative at 0.
        error = jnp.sqrt(jnp.mean((combine(tableau.b_error) / scale) ** 2) + 1e-20)
        accept = error <= 1
        t, y = jnp.where(accept, t + size, t), jnp.where(accept, y1, y)
        return t, y, size * jnp.clip(0.9 * error**-0.2, 0.2, 10.0)

    return attempt
