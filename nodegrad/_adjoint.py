"""The Diffrax door: `ACAAdjoint` as an adjoint of `diffrax.diffeqsolve`.

The forward pass is Diffrax's own loop, with every `SaveAt`, event, progress meter, term
and solver it knows; it takes the `while` loop it runs as an argument, and is handed
ours (`_record.recorded_loop`).
"""

import functools as ft
from dataclasses import replace
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp

from ._checkpoints import choose_checkpoints
from ._diffrax import solver_loop
from ._grid import make_grid, may_jump, without_derivatives
from ._record import recorded_loop, Solve
from ._save import Save
from ._step import AbstractStep, make_step, RungeKuttaStep


class ACAAdjoint(diffrax.AbstractAdjoint):
    r"""The adaptive checkpoint adjoint: search once, replay the accepted steps once.

    The forward pass searches for the step sizes without derivatives and records the
    accepted steps. The backward pass replays each of them once and pulls back through
    it, last to first. With $\Phi_i$ the map of accepted step $i$ from $y_i$ to
    $y_{i+1}$ and $\theta$ whatever it depends on (`args`, arrays inside the terms,
    arrays that the vector field closes over),

    $$\lambda_i = (\partial \Phi_i / \partial y)^\top \lambda_{i+1}, \qquad
      \frac{dL}{d\theta} = \sum_i (\partial \Phi_i / \partial \theta)^\top
      \lambda_{i+1}.$$

    That is the exact gradient of the computed solution with the step sizes held
    constant, to rounding; it is what `diffrax.RecursiveCheckpointAdjoint` computes, and
    not, as with `diffrax.BacksolveAdjoint`, an approximation that comes apart wherever
    the equation cannot be integrated backwards.

    One object serves `nodegrad.odesolve(..., adjoint=...)` and
    `diffrax.diffeqsolve(..., adjoint=...)`; the latter with every term, solver,
    controller, `SaveAt`, event and progress meter that Diffrax has.

    **Arguments:**

    - `checkpoints`: how many states to keep. `None` keeps about `2 sqrt(max_steps)` (a
      power of two: 128 for the default `max_steps=4096`), and nothing is computed twice
      while the solve takes no more accepted steps than that. An integer `K` keeps at
      most `K` states, and one segment of the `max_steps / K` states between two of them
      (both numbers as powers of two); the sum is least near `K = sqrt(max_steps)`.
      `"all"` keeps every accepted state, `max_steps` of them.

    **Raises:** `TypeError` or `ValueError` for other `checkpoints`. `RuntimeError` on
    differentiating with `max_steps=None`, with respect to tolerances, or in reverse
    mode over reverse mode. `TypeError` on plain `jax.jvp`.

    **What is differentiated:** `y0`, `args`, terms, closures, `t0`, `t1`, `dt0`,
    `SaveAt(ts=...)`, the `ts` of `diffrax.StepTo`, and the `step_ts` and `jump_ts` of
    `diffrax.ClipStepSizeController`; the times of the accepted steps move with these
    as in Diffrax (an unclipped step size is a constant multiple of the one before).
    Second derivatives: forward mode over reverse mode, `jax.jvp(jax.grad(f), ...)` or
    `jax.hessian(f)`, with the step sizes held constant.

    **Cost:** one forward pass; per accepted step, one replay and its pullback; at most
    one more sweep over the accepted steps if `checkpoints` were too few for them.
    Rejected steps cost nothing backwards. Memory: the states kept, and 9 bytes (in
    float32: 5) for each of `max_steps`. With an adaptive solver and `SaveAt(ts=...)`,
    `SaveAt(dense=True)` or an event, each replay also evaluates the last stage, which
    interpolation needs.

    **When not to use it:** where memory must not grow with the number of steps at all;
    for forward mode alone (`diffrax.ForwardMode`); for steady states
    (`diffrax.ImplicitAdjoint`).

    ??? cite "Reference"

        Zhuang, Dvornek, Li, Tatikonda, Papademetris, Duncan: Adaptive Checkpoint
        Adjoint Method for Gradient Estimation in Neural ODE, ICML 2020, Algorithm 2.
    """

    checkpoints: int | str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        checkpoints = self.checkpoints
        if checkpoints is None or checkpoints == "all":
            return
        if not isinstance(checkpoints, int) or isinstance(checkpoints, bool):
            msg = (
                "`ACAAdjoint(checkpoints=...)` must be `None`, a positive integer or "
                f"'all'; got {checkpoints!r}."
            )
            raise TypeError(msg)
        if checkpoints < 1:
            msg = (
                "`ACAAdjoint(checkpoints=...)` needs room for at least one state; got "
                f"{checkpoints}. The least memory is needed with about "
                "`sqrt(max_steps)` of them."
            )
            raise ValueError(msg)

    def loop(
        self, *, solver, stepsize_controller, saveat, terms, args, init_state,
        max_steps, throw, passed_solver_state, passed_controller_state, **kwargs,
    ):  # fmt: skip
        """Diffrax's loop, recorded. Called by `diffrax.diffeqsolve`."""
        del throw, passed_solver_state, passed_controller_state
        step = make_step(
            solver, terms, args, init_state.tprev, init_state.tnext, init_state.y
        )
        run = ft.partial(
            solver_loop,
            solver=_StepSolver(solver, step),
            stepsize_controller=without_derivatives(stepsize_controller),
            saveat=saveat,
            terms=terms,
            args=args,
            init_state=_started(step, init_state),
            max_steps=max_steps,
            inner_while_loop=ft.partial(eqxi.while_loop, kind="lax"),
            **kwargs,
        )
        if max_steps is None:
            final_state, stats = run(
                outer_while_loop=ft.partial(eqxi.while_loop, kind="lax")
            )
            return without_gradient(final_state), stats
        t0, t1 = kwargs["t0"], kwargs["t1"]
        solve = Solve(
            step=step,
            interpolation_cls=solver.interpolation_cls,
            saves=saves_of(subs_of(saveat)),
            grid=make_grid(stepsize_controller, t0, t1),
            checkpoints=choose_checkpoints(self.checkpoints, max_steps),
            dense=saveat.dense,
            event=kwargs["event"] is not None,
            jumps=may_jump(stepsize_controller),
            lanes=False,
            args=args,
            t0=t0,
            t1=t1,
        )
        final_state, stats = run(outer_while_loop=ft.partial(recorded_loop, solve))
        if isinstance(step, RungeKuttaStep):
            final_state = _with_diffrax_solver_state(step, saveat, final_state)
        if step.evaluations is not None and not solve.jumps:
            first, each_attempt = step.evaluations
            count = first + each_attempt * final_state.num_steps
            stats = {**stats, "num_vector_field_evaluations": count}
        return final_state, stats


class _StepSolver(diffrax.AbstractWrappedSolver):
    """`solver`, stepping through `step`."""

    solver: diffrax.AbstractSolver
    stepper: AbstractStep

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        del terms, args
        return self.stepper.start(t0, t1, y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del terms, args
        return self.stepper.advance(t0, t1, y0, solver_state, made_jump)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


def _started(step: AbstractStep, init_state: Any) -> Any:
    """Diffrax's initial state with the solver state that `step` wants.

    Diffrax evaluates the first stage inside its loop; we do it once, before.
    """
    if not isinstance(step, RungeKuttaStep):
        return init_state
    solver_state = step.start(init_state.tprev, init_state.tnext, init_state.y)
    return replace(init_state, solver_state=solver_state)


def _with_diffrax_solver_state(step: RungeKuttaStep, saveat, final_state: Any) -> Any:
    """The final state with the solver state that Diffrax's Runge-Kutta methods have."""
    solver_state = None
    if saveat.solver_state and step.tableau.fsal:
        # Evaluated anew, because its gradient must reach `y` and `args`.
        f0 = step.start(final_state.tprev, final_state.tnext, final_state.y)
        solver_state = jnp.array(False), f0
    return replace(final_state, solver_state=solver_state)


def subs_of(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    """The `SubSaveAt`s of `saveat`, in order."""
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
    return jax.tree.leaves(saveat.subs, is_leaf=is_sub)


def saves_of(subs: list[diffrax.SubSaveAt]) -> list[Save]:
    """What is to be saved during the loop."""
    return [Save(ts=sub.ts, steps=sub.steps, fn=sub.fn) for sub in subs]


def without_gradient(tree: Any) -> Any:
    """Refuses to be differentiated, for want of a bound on the number of steps."""
    msg = (
        "`max_steps=None` cannot be combined with a gradient through "
        "`nodegrad.ACAAdjoint`: the memory for the accepted steps must be allocated "
        "before the solve. Pass a bound, `max_steps=...`; it costs 8 bytes a step, and "
        "the states kept are set by `ACAAdjoint(checkpoints=...)`."
    )
    return eqxi.nondifferentiable_backward(tree, msg=msg)
