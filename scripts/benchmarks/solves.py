"""The ways to differentiate a solve that are compared, and the true gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import nodegrad

from .problems import loss, Problem


@dataclass(frozen=True)
class Method:
    """A way to solve and to differentiate.

    - `solve`: `diffrax.diffeqsolve` or `nodegrad.odesolve`.
    - `make_adjoint`: the adjoint, given `max_steps`.
    - `lanes`: what the leading axis of the state is: part of one solve (`None`), mapped
      over (`"vmap"`), or the batch axis of `odesolve(batched=True)` (`"batched"`).
    - `expendable`: may be left out where it takes long.
    """

    name: str
    solve: Callable[..., diffrax.Solution]
    make_adjoint: Callable[[int], diffrax.AbstractAdjoint]
    lanes: str | None = None
    expendable: bool = False

    def __call__(self, problem: Problem, vector_field, y0, args, span, controller):
        """The solution over `span = (t1, step size)`."""
        t1, size = span
        extra = {"batched": True} if self.lanes == "batched" else {}

        def solve(y0):
            return self.solve(
                diffrax.ODETerm(vector_field),
                problem.solver,
                0.0,
                t1,
                size,
                y0,
                args,
                stepsize_controller=problem.controller(controller, size),
                adjoint=self.make_adjoint(problem.max_steps),
                max_steps=problem.max_steps,
                **extra,
            )

        return jax.vmap(solve)(y0) if self.lanes == "vmap" else solve(y0)


_recursive = diffrax.RecursiveCheckpointAdjoint

DIFFRAX = Method("Diffrax default", diffrax.diffeqsolve, lambda _: _recursive())
ACA = Method("ACA", nodegrad.odesolve, lambda _: nodegrad.ACAAdjoint())
ACA_IN_DIFFRAX = Method(
    "ACA in diffeqsolve", diffrax.diffeqsolve, lambda _: nodegrad.ACAAdjoint()
)
METHODS = (
    DIFFRAX,
    ACA,
    ACA_IN_DIFFRAX,
    Method("ACA, 16 checkpoints", nodegrad.odesolve, lambda _: nodegrad.ACAAdjoint(16)),
    Method(
        "ACA, all",
        nodegrad.odesolve,
        lambda _: nodegrad.ACAAdjoint("all"),
        expendable=True,
    ),
    Method(
        "Diffrax, checkpoint each step",
        diffrax.diffeqsolve,
        lambda max_steps: _recursive(checkpoints=max_steps),
        expendable=True,
    ),
    Method(
        "Diffrax DirectAdjoint",
        diffrax.diffeqsolve,
        lambda _: diffrax.DirectAdjoint(),
        expendable=True,
    ),
    Method(
        "Diffrax BacksolveAdjoint",
        diffrax.diffeqsolve,
        lambda _: diffrax.BacksolveAdjoint(),
        expendable=True,
    ),
)

VMAP_DIFFRAX = Method(
    "vmap of Diffrax default", diffrax.diffeqsolve, lambda _: _recursive(), "vmap"
)
VMAP_ACA = Method(
    "vmap of ACA", nodegrad.odesolve, lambda _: nodegrad.ACAAdjoint(), "vmap"
)
VMAP_ACA_IN_DIFFRAX = Method(
    "vmap of ACA in diffeqsolve",
    diffrax.diffeqsolve,
    lambda _: nodegrad.ACAAdjoint(),
    "vmap",
)
BATCHED_ACA = Method(
    "ACA, batched=True", nodegrad.odesolve, lambda _: nodegrad.ACAAdjoint(), "batched"
)


def value_function(
    problem: Problem, method: Method, controller: str, counter: Any = None
) -> Callable[..., Any]:
    """`(y0__args, span) -> (loss, (accepted steps, rejected steps))`, a new function.

    New for JAX, that is: no trace of it is in a cache. With a `counter` it is
    instrumented.
    """
    field = problem.vector_field if counter is None else counter.instrument(
        problem.vector_field
    )  # fmt: skip
    vector_field = lambda t, y, args: field(t, y, args)

    def value(y0__args, span):
        y0, args = y0__args
        sol = method(problem, vector_field, y0, args, span, controller)
        stats = sol.stats
        steps = stats["num_accepted_steps"], stats["num_rejected_steps"]
        return loss(sol.ys), steps

    return value


def gradient_function(*args: Any) -> Callable[..., Any]:
    """`value_and_grad` of `value_function(*args)`, with respect to `y0` and `args`."""
    return jax.value_and_grad(value_function(*args), has_aux=True)


def accepted_times(problem: Problem, controller: str) -> Callable[..., Any]:
    """`(y0__args, span) -> times`: the accepted grid, padded with infinities."""

    def times(y0__args, span):
        y0, args = y0__args
        t1, size = span
        nothing = lambda *_: None
        return diffrax.diffeqsolve(
            diffrax.ODETerm(problem.vector_field),
            diffrax.Tsit5(),
            0.0,
            t1,
            size,
            y0,
            args,
            saveat=diffrax.SaveAt(t0=True, steps=True, fn=nothing),
            stepsize_controller=problem.controller(controller, size),
            max_steps=problem.max_steps,
        ).ts

    return times


def frozen_grid_gradient(problem: Problem) -> Callable[..., Any]:
    """`(y0__args, times) -> (loss, gradient)` on a grid that is given.

    The floor: nobody searches for step sizes, nothing is recorded but the states, and
    each step is stepped once forwards and once more with its pullback. It shares no
    code with nodegrad.
    """
    tableau = diffrax.Tsit5.tableau

    def step(y, start__end, args):
        start, end = start__end
        size = end - start
        ks = [problem.vector_field(start, y, args)]
        # The last row is for the error estimate.
        for row, c in zip(tableau.a_lower[:-1], tableau.c[:-1], strict=True):
            increment = sum(float(a) * k for a, k in zip(row, ks, strict=True))
            time = start + float(c) * size
            ks.append(problem.vector_field(time, y + size * increment, args))
        weights = tableau.b_sol[:-1]
        increment = sum(float(b) * k for b, k in zip(weights, ks, strict=True))
        return y + size * increment, None

    def value(y0__args, times):
        y0, args = y0__args
        # In a scan there is nothing that could undo the checkpoint.
        body = jax.checkpoint(lambda y, ends: step(y, ends, args), prevent_cse=False)
        y1, _ = jax.lax.scan(body, y0, (times[:-1], times[1:]))
        return loss(y1)

    return jax.value_and_grad(value)


def exact_gradient(problem: Problem, tolerance: float = 1e-11) -> Any:
    """The gradient of the differential equation itself, in double precision."""
    with jax.enable_x64(True):
        y0__args = in_double((problem.y0, problem.args))

        def value(y0__args):
            y0, args = y0__args
            solve = lambda y0: diffrax.diffeqsolve(
                diffrax.ODETerm(problem.vector_field),
                diffrax.Dopri8(),
                0.0,
                problem.t1,
                None,
                y0,
                args,
                stepsize_controller=diffrax.PIDController(
                    rtol=tolerance, atol=tolerance
                ),
                max_steps=2**14,
            )
            return loss(solve(y0).ys)

        return jax.tree.map(np.asarray, jax.jit(jax.grad(value))(y0__args))


def frozen_grid_reference(problem: Problem, times: Any) -> Any:
    """The gradient on the grid `times`, in double precision."""
    with jax.enable_x64(True):
        inputs = in_double(((problem.y0, problem.args), times))
        _, gradient = jax.jit(frozen_grid_gradient(problem))(*inputs)
        return jax.tree.map(np.asarray, gradient)


def in_double(tree: Any) -> Any:
    """Every array of `tree` in double precision."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)
