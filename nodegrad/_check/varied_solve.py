"""A user's loss as a function whose solves can be varied.

The loss calls the function that it gets as `solve` in the place of
`diffrax.diffeqsolve` or `nodegrad.odesolve`. A *variation* is such a function: it gets
the door (one of these two functions) and the arguments that the user wrote, and solves
with some of them replaced.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, ArrayLike, Bool, PyTree, Real

from .._internal.compat import callback_logger, is_sde
from .._internal.results import promoted, RESULTS
from .._internal.tree import where
from .._reversible.reversals import make_invertible_step
from .._solve.aca_adjoint import ACAAdjoint
from .._solve.arguments import as_terms
from .._solve.odesolve import odesolve
from .._solve.recorded_adjoint import AbstractRecordedAdjoint, subs_of
from .._solve.reversible_adjoint import ReversibleAdjoint


# `diffrax.diffeqsolve` or `nodegrad.odesolve`.
Door: TypeAlias = Callable[..., diffrax.Solution]
# By name, with the defaults of the door.
Arguments: TypeAlias = dict[str, Any]
Variation: TypeAlias = Callable[[Door, Arguments], diffrax.Solution]

# The axis of the points at which finite differences evaluate the loss.
POINTS = "nodegrad_points"
_FIXED = diffrax.ConstantStepSize, diffrax.StepTo


class Loss:
    """`loss(params, *args, solve=...)`, with the arrays of its arguments taken out.

    - `params`: the inexact arrays of the parameters, in their tree.
    - `others`: all other arrays, so that they need not be constants of a program.
    """

    def __init__(
        self, loss: Callable[..., Array], door: Door, params: PyTree, args: tuple
    ) -> None:
        if isinstance(params, float | complex):
            params = jnp.asarray(params)
        as_jax = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        params = jax.tree.map(as_jax, params)
        self._loss, self._door = loss, door
        self.params, rest = eqx.partition(params, eqx.is_inexact_array)
        self.others, self._static = eqx.partition((rest, args), eqx.is_array)

    def __call__(self, params: PyTree, others: PyTree, variation: Variation) -> Array:
        """Returns the loss, with its solves varied."""
        rest, args = eqx.combine(others, self._static)
        signature = inspect.signature(self._door)

        def solve(*args: Any, **kwargs: Any) -> diffrax.Solution:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            # `odesolve` collects arguments that it does not have, to refuse them.
            arguments.update(arguments.pop("others", {}))
            return variation(self._door, arguments)

        return self._loss(eqx.combine(params, rest), *args, solve=solve)


@dataclass(frozen=True)
class Call:
    """What is known about one call of `solve` when the loss is traced.

    - `adaptive`: whether an error estimate chooses the steps.
    - `scalable`: whether `scaled` can make the solve more accurate.
    - `stores_steps`: whether arrays of the solution have `max_steps` rows.
    """

    adjoint: diffrax.AbstractAdjoint
    adaptive: bool
    scalable: bool
    noisy: bool
    stores_steps: bool

    @classmethod
    def of(cls, arguments: Arguments) -> "Call":
        """Describes the call with these arguments."""
        controller = _innermost(arguments["stepsize_controller"])
        constant = isinstance(controller, diffrax.ConstantStepSize)
        saveat = arguments["saveat"]
        return cls(
            adjoint=arguments["adjoint"],
            adaptive=not isinstance(controller, _FIXED),
            scalable=constant or _has_tolerances(controller),
            noisy=is_sde(arguments["terms"]),
            stores_steps=saveat.dense or any(s.steps for s in subs_of(saveat)),
        )


# Variations.


def as_written(calls: list[Call]) -> Variation:
    """The user's own solve; appends what is known about it to `calls`."""

    def variation(door: Door, arguments: Arguments) -> diffrax.Solution:
        calls.append(Call.of(arguments))
        return _run(door, arguments)

    return variation


def with_adjoint(adjoint: diffrax.AbstractAdjoint) -> Variation:
    """The solve with another adjoint."""
    return lambda door, arguments: _run(door, arguments | {"adjoint": adjoint})


def scaled(
    adjoint: diffrax.AbstractAdjoint,
    scale: Real[ArrayLike, ""],
    throw: bool,
    more_steps: int,
) -> Variation:
    """The solve with tolerances, or a constant step size, multiplied by `scale`.

    `more_steps` multiplies `max_steps`. With `throw`, failures raise also where the
    user wrote `throw=False`.
    """

    def variation(door: Door, arguments: Arguments) -> diffrax.Solution:
        changed = {"adjoint": adjoint, "throw": throw or arguments["throw"]}
        controller, dt0 = arguments["stepsize_controller"], arguments["dt0"]
        if isinstance(controller, diffrax.ConstantStepSize):
            changed["dt0"] = dt0 * scale
        elif _has_tolerances(_innermost(controller)):
            smaller = lambda c: eqx.tree_at(
                _tolerances, c, replace_fn=lambda x: x * scale
            )
            changed["stepsize_controller"] = _with_innermost(controller, smaller)
        if arguments["max_steps"] is not None:
            changed["max_steps"] = more_steps * arguments["max_steps"]
        return _run(door, arguments | changed)

    return variation


def synchronized(active: Bool[Array, ""]) -> Variation:
    """The solve without derivatives, as finite differences need it.

    Where `active`, the step sizes of all points on the axis `POINTS` follow from the
    decisions that the controller makes at the first point.
    """

    def variation(door: Door, arguments: Arguments) -> diffrax.Solution:
        controller = arguments["stepsize_controller"]
        if not isinstance(_innermost(controller), _FIXED):
            share = lambda c: _Synchronized(c, active)  # pyright: ignore[reportCallIssue]
            controller = _with_innermost(controller, share)
        changed = {"stepsize_controller": controller, "adjoint": _forward(door)}
        sol = _run(door, arguments | changed | {"throw": False})
        # A failure at one point must not stop the others, nor look like a result.
        return _nan_where_failed(sol) if arguments["throw"] else sol

    return variation


def observed(seen: list[dict[str, Any]]) -> Variation:
    """The solve without derivatives; appends statistics of every solve to `seen`.

    Of a solver whose steps can be undone, the reconstruction error is measured too.
    """

    def append(stats: dict[str, Any]) -> None:
        seen.append({name: np.asarray(x).item() for name, x in stats.items()})

    def variation(door: Door, arguments: Arguments) -> diffrax.Solution:
        adjoint = _forward(door)
        if _is_reversible(arguments["solver"]) and arguments["max_steps"] is not None:
            adjoint = ReversibleAdjoint(check=True)
        sol = _run(door, arguments | {"adjoint": adjoint, "throw": False})
        names = "num_accepted_steps", "coupling_distance", "reconstruction_error"
        stats = {name: sol.stats[name] for name in names if name in sol.stats}
        stats["failed"] = _failed(sol)
        # Under `jax.vmap` it is called for every sample. A solve of a batch with
        # `batched=True` has rows.
        report = lambda row: io_callback(append, None, row)
        for _ in range(jnp.ndim(stats["failed"])):
            report = jax.vmap(report)
        report(stats)
        return sol

    return variation


def _run(door: Door, arguments: Arguments) -> diffrax.Solution:
    """Solves through `door`, or through Diffrax if `door` lacks the adjoint."""
    if door is not odesolve or isinstance(
        arguments["adjoint"], AbstractRecordedAdjoint
    ):
        return door(**arguments)
    arguments = dict(arguments)
    batched, y0 = arguments.pop("batched"), arguments.pop("y0")
    arguments["terms"] = as_terms(arguments["terms"])
    solve = lambda y0: diffrax.diffeqsolve(y0=y0, **arguments)
    return eqx.filter_vmap(solve)(y0) if batched else solve(y0)


def _failed(sol: diffrax.Solution) -> Bool[Array, "..."]:
    result = promoted(sol.result)
    return (result != RESULTS.successful) & (result != RESULTS.event_occurred)


def _nan_where_failed(sol: diffrax.Solution) -> diffrax.Solution:
    """Returns `sol` with NaN for all that the user can read of a failed solve."""
    failed = _failed(sol)

    def spoil(x: Any) -> Any:
        if not eqx.is_inexact_array(x):
            return x
        # A solve of a batch has a result for each row.
        return where(failed, jnp.full_like(x, jnp.nan), x)

    outputs = lambda sol: (sol.ys, sol.interpolation)
    spoiled = jax.tree.map(spoil, outputs(sol))
    return eqx.tree_at(outputs, sol, spoiled, is_leaf=lambda x: x is None)


def _forward(door: Door) -> diffrax.AbstractAdjoint:
    """An adjoint for solves that are not differentiated."""
    return ACAAdjoint() if door is odesolve else diffrax.ForwardMode()


def _is_reversible(solver: diffrax.AbstractSolver) -> bool:
    try:
        make_invertible_step(solver, None, None)
    except TypeError:
        return False
    return True


# Controllers. `ClipStepSizeController` contains the controller that adapts the steps.


def _innermost(controller: Any) -> Any:
    while isinstance(controller, diffrax.ClipStepSizeController):
        controller = controller.controller
    return controller


def _with_innermost(controller: Any, change: Callable[[Any], Any]) -> Any:
    """Returns `controller` with `change` applied to the one that adapts the steps."""
    if not isinstance(controller, diffrax.ClipStepSizeController):
        return change(controller)
    inner = _with_innermost(controller.controller, change)
    return eqx.tree_at(lambda c: c.controller, controller, inner)


def _tolerances(controller: Any) -> tuple[Any, Any]:
    return controller.rtol, controller.atol


def _has_tolerances(controller: Any) -> bool:
    # Fields can be replaced, but properties cannot.
    return {"rtol", "atol"} <= {field.name for field in fields(controller)}


class _Synchronized(diffrax.AbstractAdaptiveStepSizeController):
    """A controller whose decisions at the first point hold at all `POINTS`.

    A step size is a constant multiple of the one before it, as in the derivatives of
    adjoints. Times at which the user lets steps end still move from point to point:
    the solver loop clips to `t1`, and `ClipStepSizeController` to its times.
    """

    controller: Any
    active: Bool[Array, ""]

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return self.controller.norm

    def _first(self, x: Any) -> Array:
        x = jnp.asarray(x)
        return jnp.where(self.active, jax.lax.all_gather(x, POINTS)[0], x)

    def wrap(self, direction: Real[Array, ""]):
        return type(self)(self.controller.wrap(direction), self.active)  # pyright: ignore

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        end, state = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        # Otherwise the user chose the size, which may depend on the parameters.
        if dt0 is None:
            end = t0 + self._first(end - t0)
        return end, state

    def adapt_step_size(self, t0, t1, *rest: Any):
        keep, next_t0, next_t1, *others = self.controller.adapt_step_size(t0, t1, *rest)
        factor = self._first((next_t1 - next_t0) / (t1 - t0))
        keep = self._first(keep)
        next_t0 = jnp.where(keep, t1, t0)
        return keep, next_t0, next_t0 + factor * (t1 - t0), *others


class Program:
    """Value and gradient of a loss, compiled. It takes `scales` of a variation."""

    def __init__(
        self, loss: Loss, make_variation: Callable[..., Variation], *scales: float
    ) -> None:
        self._loss = loss

        def value(params: PyTree, others: PyTree, *scales: Any) -> Array:
            return loss(params, others, make_variation(*scales))

        arguments = loss.params, loss.others, *map(jnp.asarray, scales)
        self._run = jax.jit(jax.value_and_grad(value)).lower(*arguments).compile()
        analysis = self._run.memory_analysis()
        self.temp_bytes = None if analysis is None else analysis.temp_size_in_bytes

    def __call__(self, *scales: float) -> tuple[Array, PyTree]:
        """Returns value and gradient. Raises if a solve does."""
        arrays = map(jnp.asarray, scales)
        # An error is raised as well as logged.
        callback_logger.addFilter(_nothing)
        try:
            out = self._run(self._loss.params, self._loss.others, *arrays)
            return jax.block_until_ready(out)
        finally:
            callback_logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    """A filter of log records that lets none through."""
    del record
    return False
