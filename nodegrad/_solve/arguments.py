"""Checks and converts the arguments of `odesolve`.

Errors name the argument that is wrong, and are raised at trace time if the value is
known then. Times are scalars; `ts` has shape `(num_ts,)`.
"""

import inspect
import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, PyTree, Real

from .._internal.compat import (
    default_floating_dtype,
    is_sde,
    is_unsafe_sde,
    use_stepsize_tol,
)
from .._internal.tree import as_arrays, is_traced
from .recorded_adjoint import AbstractRecordedAdjoint, subs_of


def _is_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm)


def as_terms(terms: Any) -> PyTree[diffrax.AbstractTerm]:
    """Returns a pytree of Diffrax terms as it is, and a vector field as a term."""
    leaves = jax.tree.leaves(terms, is_leaf=_is_term)
    if len(leaves) > 0 and all(map(_is_term, leaves)):
        return terms
    if not callable(terms):
        msg = (
            "`terms` must be a vector field `f(t, y, args)`, or terms of Diffrax such "
            f"as `diffrax.ODETerm(f)`; got {terms!r}."
        )
        raise TypeError(msg)
    return diffrax.ODETerm(terms)


def check_no_others(others: dict[str, Any]) -> None:
    """Raises a `TypeError` that says where to find an argument `odesolve` lacks."""
    for name in others:
        msg = f"`nodegrad.odesolve` has no argument `{name}`."
        if name in ("rtol", "atol"):
            msg += (
                " Tolerances belong to the controller: "
                "`stepsize_controller=diffrax.PIDController(rtol=..., atol=...)`."
            )
        if name in ("t_eval", "ts"):
            msg += " Pass the times as `saveat=diffrax.SaveAt(ts=...)`."
        if name in inspect.signature(diffrax.diffeqsolve).parameters:
            msg += (
                " It is in Diffrax, with the same gradients: `diffrax.diffeqsolve(..., "
                f"{name}=..., adjoint=nodegrad.ACAAdjoint())`."
            )
        raise TypeError(msg)


def check_instance(name: str, value: Any, kind: type) -> None:
    """Raises a `TypeError` unless the argument `name` is an instance of `kind`."""
    if not isinstance(value, kind):
        expected = f"an instance of `diffrax.{kind.__name__}`"
        msg = f"`{name}` must be {expected}; got {_described(value)}."
        raise TypeError(msg)


def _described(value: Any) -> str:
    """Returns how a message calls `value`, which is of the wrong type."""
    if isinstance(value, type):
        return f"the class `{value.__name__}` itself: write `{value.__name__}(...)`"
    return repr(value)


def check_supported(adjoint: Any, saveat: diffrax.SaveAt) -> None:
    """Raises an error for another adjoint, and for outputs of `diffeqsolve` alone."""
    check_instance("saveat", saveat, diffrax.SaveAt)
    if not isinstance(adjoint, AbstractRecordedAdjoint):
        msg = (
            "`odesolve(adjoint=...)` takes a `nodegrad.ACAAdjoint` or a "
            f"`nodegrad.ReversibleAdjoint`; got {_described(adjoint)}. Diffrax's own "
            "adjoints, also `diffrax.ImplicitAdjoint` for steady states, work in "
            "`diffrax.diffeqsolve(..., adjoint=...)` alone."
        )
        raise TypeError(msg)
    for name in ("solver_state", "controller_state", "made_jump"):
        if getattr(saveat, name):
            msg = (
                f"`odesolve` does not return `SaveAt({name}=True)`. Use "
                "`diffrax.diffeqsolve(..., adjoint=nodegrad.ACAAdjoint())`."
            )
            raise ValueError(msg)
    for sub in subs_of(saveat):
        # `True` and `False` are integers in Python.
        if not isinstance(sub.steps, int) or sub.steps < 0:
            msg = (
                "`SaveAt(steps=...)` must be `True`, `False`, or how many steps there "
                f"are from one saved step to the next; got {sub.steps!r}."
            )
            raise ValueError(msg)


def as_times(
    t0: ArrayLike, t1: ArrayLike, dt0: ArrayLike | None, saveat: diffrax.SaveAt
) -> tuple[Real[Array, ""], Real[Array, ""], Real[Array, ""] | None]:
    """Returns `(t0, t1, dt0)` as scalars of one floating point type.

    That is the common type of these times and the times to save at.
    """
    times = [t0, t1, dt0, *(sub.ts for sub in subs_of(saveat))]
    for name, t in zip(("t0", "t1", "dt0"), times, strict=False):
        if not (eqx.is_array_like(t) or (t is None and name == "dt0")):
            msg = f"`{name}` must be a real number; got {t!r}."
            raise TypeError(msg)
    # Also if the user has set JAX's strict promotion: times may be Python numbers.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(t for t in times if t is not None))
    if jnp.issubdtype(dtype, jnp.integer):
        # As Diffrax does, so `t0=0, t1=1` are the same as `t0=0.0, t1=1.0`.
        dtype = default_floating_dtype()
    elif not jnp.issubdtype(dtype, jnp.floating):
        msg = f"Times must be real numbers; `t0`, `t1`, `dt0` or `ts` are {dtype}."
        raise ValueError(msg)
    if jnp.ndim(t0) or jnp.ndim(t1):
        msg = (
            f"`t0` and `t1` must be scalars, also with `batched=True`; got shapes "
            f"{jnp.shape(t0)} and {jnp.shape(t1)}. Put a time scale of each sample "
            "into the vector field, or use `jax.vmap`."
        )
        raise ValueError(msg)
    # For a traced NaN the result of the solve says so. These are the user's numbers:
    # in a jitted function also an array of a constant is traced.
    for name, t in (("t0", t0), ("t1", t1)):
        if not is_traced(t) and not np.isfinite(np.asarray(t)):
            msg = f"`{name}` must be a finite number; got {t}."
            raise ValueError(msg)
    start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    if dt0 is None:
        return start, end, None
    return start, end, _as_dt0(dt0, t0, t1, dtype)


def _as_dt0(dt0: Any, t0: Any, t1: Any, dtype: Any) -> Real[Array, ""]:
    """Returns `dt0`; raises an error if it does not point from `t0` to `t1`."""
    if jnp.ndim(dt0):
        msg = (
            f"`dt0` must be a scalar; got shape {jnp.shape(dt0)}. For a first step of "
            "each sample use `jax.vmap`."
        )
        raise ValueError(msg)
    msg = (
        "`dt0` must point from `t0` to `t1`, and must not be zero{}. For a solve "
        "backwards in time it is negative."
    )
    is_known = not any(map(is_traced, (dt0, t0, t1)))
    # JAX would trace an operation on known numbers, in a jitted function.
    xp: Any = np if is_known else jnp
    step, start, end = (xp.asarray(x, dtype) for x in (dt0, t0, t1))
    # The product of the times may underflow, and that of their signs not.
    towards_t1 = xp.sign(end - start) * xp.sign(step)
    # With `t0 == t1` no step is made.
    if is_known and start != end and not towards_t1 > 0:
        raise ValueError(msg.format(f"; got t0={t0}, t1={t1}, dt0={dt0}"))
    if is_known:
        return jnp.asarray(step)
    # False for NaN, so that a NaN fails its own sample.
    wrong = (towards_t1 <= 0) & (start != end)
    return eqx.error_if(step, wrong, msg.format(""))


def as_state(time_dtype: Any, x: Any) -> Array:
    """Returns a leaf of the state as an array, in the common type with the times.

    A step multiplies the vector field by the step size. An integer state, or a state
    of lower precision than the times, would change its type in the loop.
    """
    is_number = eqx.is_array_like(x) and not jnp.issubdtype(
        jnp.result_type(x), jax.dtypes.extended
    )
    if not is_number:
        msg = (
            f"Every leaf of `y0` must be a number or an array of numbers; got {x!r}. "
            "Anything that is not integrated belongs into `args`."
        )
        raise TypeError(msg)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(x, jnp.result_type(x, time_dtype))


def check_vector_field(
    terms: PyTree[diffrax.AbstractTerm],
    t0: Real[Array, ""],
    y0: PyTree[Array],
    args: PyTree,
) -> None:
    """Raises an error if a vector field does not return the structure of the state.

    Also if it does not return the shapes of the leaves; scalars are broadcast. And if
    there is no state at all.
    """
    if not jax.tree.leaves(y0):
        msg = f"`y0` must hold at least one number or array; got {y0}."
        raise ValueError(msg)
    if type(terms) is not diffrax.ODETerm:
        # Diffrax checks other terms itself (`assert_term_compatible`).
        return
    out = eqx.filter_eval_shape(terms.vector_field, t0, y0, args)
    if jax.tree.structure(out) != jax.tree.structure(y0):
        msg = (
            "The vector field must return a pytree with the structure of `y0`: "
            f"expected {jax.tree.structure(y0)}, got {jax.tree.structure(out)}. (A "
            "list is a pytree: for a vector write `jnp.array(y0)`.)"
        )
        raise ValueError(msg)
    leaves, _ = jax.tree.flatten_with_path(y0)
    for (path, y), f in zip(leaves, jax.tree.leaves(out), strict=True):
        name = f"`y0{jax.tree_util.keystr(path)}`"
        if not (eqx.is_array_like(f) or isinstance(f, jax.ShapeDtypeStruct)):
            msg = (
                "The vector field must return numbers and arrays: for "
                f"{name} it returned {f!r}."
            )
            raise TypeError(msg)
        # A scalar is broadcast to its leaf, as in Diffrax: `lambda t, y, args: 0.0`.
        shape = getattr(f, "shape", ())
        if shape not in ((), y.shape):
            msg = (
                "The vector field must return the shape of the state: for "
                f"{name} expected {y.shape}, got {shape}."
            )
            raise ValueError(msg)


def check_methods(
    terms: PyTree[diffrax.AbstractTerm], solver: Any, controller: Any
) -> None:
    """Raises an error if solver and controller are none, or do not suit the terms."""
    check_instance("solver", solver, diffrax.AbstractSolver)
    kind = diffrax.AbstractStepSizeController
    check_instance("stepsize_controller", controller, kind)
    _check_tolerances(controller)
    _check_noise(terms, solver, controller)


def _check_tolerances(controller: diffrax.AbstractStepSizeController) -> None:
    while isinstance(controller, diffrax.ClipStepSizeController):
        controller = controller.controller
    for name in ("rtol", "atol"):
        x = getattr(controller, name, 0)
        if eqx.is_array_like(x) and not is_traced(x) and not np.all(np.asarray(x) >= 0):
            msg = f"`{name}` of the controller must not be negative or NaN; got {x}."
            raise ValueError(msg)


def _check_noise(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
) -> None:
    """Refuses, and warns of, what Diffrax does."""
    name, noisy = type(solver).__name__, is_sde(terms)
    adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    # A `HalfSolver` around Euler's method is an instance of `Euler`.
    if noisy and adaptive and isinstance(solver, diffrax.Euler):
        msg = (
            f"`{name}` with Euler's method must not choose step sizes for an equation "
            "with noise: it may converge to something else. Take constant steps, or "
            "`diffrax.Heun` for the Stratonovich solution."
        )
        raise ValueError(msg)
    if is_unsafe_sde(terms) and adaptive:
        msg = (
            "`diffrax.UnsafeBrownianPath` draws another increment after a rejected "
            "step, which makes large increments too rare. With step sizes that adapt "
            "take a `diffrax.VirtualBrownianTree`."
        )
        raise ValueError(msg)
    kinds = diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver
    if noisy and not isinstance(solver, kinds):
        msg = (
            f"`{name}` is not known to converge for an equation with noise, neither to "
            "its Itô solution nor to that of Stratonovich."
        )
        warnings.warn(msg, stacklevel=2)


def check_ts(saveat: diffrax.SaveAt, t0: Real[Array, ""], t1: Real[Array, ""]) -> None:
    """Raises an error that names the first time in `ts` that is out of order."""
    for sub in subs_of(saveat):
        # Traced times are checked at run time (`forwards`).
        if sub.ts is None or any(map(is_traced, (sub.ts, t0, t1))):
            continue
        ts, start, end = map(np.asarray, (sub.ts, t0, t1))
        backwards = end < start
        if ts.ndim != 1:
            msg = (
                "`SaveAt(ts=...)` must be one sequence of times; got an array of shape "
                f"{ts.shape}."
            )
            raise ValueError(msg)
        low, high = (end, start) if backwards else (start, end)
        steps = np.diff(ts, prepend=ts[:1])
        unordered = steps > 0 if backwards else steps < 0
        # Also true for NaN.
        outside = ~((ts >= low) & (ts <= high))
        bad = np.flatnonzero(unordered | outside)
        if len(bad):
            msg = (
                "`SaveAt(ts=...)` must be ordered from `t0` to `t1` and lie between "
                f"them; got ts[{bad[0]}] = {ts[bad[0]]} with t0 = {t0}, t1 = {t1}."
            )
            raise ValueError(msg)


def check_batched(y0: PyTree[Array]) -> None:
    """Raises an error unless all leaves of `y0` have the same leading axis."""
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(y0)}
    if len(sizes) != 1 or () in sizes:
        shapes = [jnp.shape(x) for x in jax.tree.leaves(y0)]
        msg = (
            "With `batched=True` every leaf of `y0` needs the same leading batch axis; "
            f"got shapes {shapes}."
        )
        raise ValueError(msg)


def forwards(
    sub: diffrax.SubSaveAt,
    direction: Int[Array, ""],
    t0: Real[Array, ""],
    t1: Real[Array, ""],
) -> diffrax.SubSaveAt:
    """Returns `sub` in the time of the problem, which runs forwards from `t0` to `t1`.

    `direction` is 1 or -1: the factor between that time and the user's time.
    """
    ts = sub.ts
    if ts is not None:
        ts = ts.astype(t0.dtype) * direction
        ts = eqx.error_if(
            ts, ts[1:] < ts[:-1], "`SaveAt(ts=...)` must be ordered from `t0` to `t1`."
        )
        ts = eqx.error_if(
            ts,
            ~((ts >= t0) & (ts <= t1)),
            "`SaveAt(ts=...)` must lie between `t0` and `t1`.",
        )

    def fn(t: Real[Array, ""], y: PyTree[Array], args: PyTree) -> PyTree[Array]:
        # The user's function expects the user's time.
        out = as_arrays(sub.fn(direction * t, y, args))
        if not all(map(eqx.is_array, jax.tree.leaves(out))):
            msg = f"`SaveAt(fn=...)` must return numbers and arrays; got {out}."
            raise TypeError(msg)
        return out

    return diffrax.SubSaveAt(t0=sub.t0, t1=sub.t1, ts=ts, steps=sub.steps, fn=fn)


def with_tolerances(
    solver: diffrax.AbstractSolver, controller: diffrax.AbstractStepSizeController
) -> diffrax.AbstractSolver:
    """Returns `solver` with the controller's tolerances in its root finder.

    Only implicit solvers have one, and only fields that hold Diffrax's placeholder
    `use_stepsize_tol` are replaced.
    """
    if isinstance(solver, diffrax.HalfSolver):
        # It says that it is what it wraps, and has no root finder itself.
        inner = with_tolerances(solver.solver, controller)
        return eqx.tree_at(lambda s: s.solver, solver, inner)
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    names = [
        name
        for name in ("rtol", "atol", "norm")
        if getattr(solver.root_finder, name, None) is use_stepsize_tol
    ]
    if not names:
        return solver
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        msg = (
            f"`{type(solver).__name__}` takes the tolerances of its root finder from "
            "the step size controller, and a fixed step size has none. Use "
            "`stepsize_controller=diffrax.PIDController(rtol=..., atol=...)`, or pass "
            "`root_finder=diffrax.VeryChord(rtol=..., atol=..., "
            "norm=optimistix.max_norm)` to the solver."
        )
        raise ValueError(msg)
    values = [getattr(controller, name) for name in names]
    get = lambda s: [getattr(s.root_finder, name) for name in names]
    return eqx.tree_at(get, solver, values)
