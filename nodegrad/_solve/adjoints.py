"""The adjoints: how a gradient through a solve is computed."""

from typing import Any, ClassVar

import equinox as eqx

from .._reversible.invertible_step import make_invertible_step
from .._reversible.reconstruction import ReconstructedStates, Resyncs
from .._trajectory.checkpoints import CheckpointedStates, choose_checkpoints
from .._trajectory.step_times import has_unknown_jumps, may_jump
from .._trajectory.trajectory import choose_recorded_steps
from .recorded_adjoint import AbstractRecordedAdjoint


class ACAAdjoint(AbstractRecordedAdjoint):
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

    The derivative is one linear map, so every mode of JAX has it: `jax.grad`,
    `jax.jvp`, `jax.linearize`, `jax.jacfwd`, `jax.jacrev`. Forward mode makes the
    accepted steps again with tangents, and needs no stored state. Under `jax.vmap` each
    sample takes its own steps, and the gradient of parameters that samples share is
    summed inside every step.

    **Arguments:**

    - `checkpoints`: how many states to keep. `None` keeps about `2 sqrt(max_steps)` (a
      power of two, and 32 at least: 128 for the default `max_steps=4096`), and nothing
      is computed twice while the solve takes no more accepted steps than that. An
      integer `K` keeps at most `K` states, and one segment of the `max_steps / K`
      states between two of them (both numbers as powers of two); the sum is least near
      `K = sqrt(max_steps)`. `"all"` keeps every accepted state, `max_steps` of them.
    - `max_recorded_steps`: where an error estimate chooses the steps, the times of how
      many accepted steps to keep; a derivative of a longer solve is refused. `None`
      stands for a quarter of `max_steps`, between 1024 and 131072 (with
      `checkpoints="all"` for `max_steps`): many times what a solve usually takes, and
      few enough that a large `max_steps` costs little.

    **Raises:** `TypeError` or `ValueError` for other arguments. `RuntimeError` on
    differentiating by reverse mode with `max_steps=None`, with respect to tolerances,
    or in reverse mode over any other derivative; and a solve of more accepted steps
    than `max_recorded_steps` (with `throw=False` its derivative is NaN instead).

    **What is differentiated:** `y0`, `args`, terms, closures, `t0`, `t1`, `dt0`,
    `SaveAt(ts=...)`, the `ts` of `diffrax.StepTo`, and the `step_ts` and `jump_ts` of
    `diffrax.ClipStepSizeController`; the times of the accepted steps move with these
    as in Diffrax (an unclipped step size is a constant multiple of the one before).
    Second derivatives: forward mode over reverse mode, `jax.jvp(jax.grad(f), ...)` or
    `jax.hessian(f)`, and forward mode over forward mode, with the step sizes held
    constant.

    **Cost:** one forward pass; per accepted step, one replay and its pullback; at most
    one more sweep over the accepted steps if `checkpoints` were too few for them.
    Forward mode: one forward pass; per accepted step, one replay with its tangents,
    however many these are. Rejected steps cost nothing in either. The replay evaluates
    each stage once. So does the pullback, for vector fields of operations on single
    elements, whose stages are loops; where products of matrices dominate, it evaluates
    nothing again. Memory: the states kept and, with adaptive steps, 9 bytes (in
    float32: 5) for each of `max_recorded_steps`; forward mode alone: none. With an
    adaptive solver and `SaveAt(ts=...)`, `SaveAt(dense=True)` or an event, each
    replay also evaluates the last stage, which interpolation needs.

    **When not to use it:** where memory must not grow with the number of steps at all
    (`nodegrad.ReversibleAdjoint`); for steady states (`diffrax.ImplicitAdjoint`).

    ??? cite "Reference"

        Zhuang, Dvornek, Li, Tatikonda, Papademetris, Duncan: Adaptive Checkpoint
        Adjoint Method for Gradient Estimation in Neural ODE, ICML 2020, Algorithm 2.
    """

    checkpoints: int | str | None = eqx.field(static=True, default=None)
    max_recorded_steps: int | None = eqx.field(static=True, default=None)

    check: ClassVar[bool] = False

    def __check_init__(self):
        _check_recorded_steps("ACAAdjoint", self.max_recorded_steps)
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

    def recorded_steps(self, max_steps):
        """Where all states are stored, so are all times."""
        if self.checkpoints == "all" and self.max_recorded_steps is None:
            return max_steps
        return choose_recorded_steps(self.max_recorded_steps, max_steps)

    def make_state_source(self, step, controller, grid, max_steps, dense, first_jump):
        """States are stored, thinned as need be."""
        del controller, grid, first_jump
        checkpoints = choose_checkpoints(self.checkpoints, max_steps)
        return CheckpointedStates(step, checkpoints, dense)


class ReversibleAdjoint(AbstractRecordedAdjoint):
    r"""Undoes the steps of a reversible solver, so that no state need be stored.

    The backward pass starts from the final state and walks back: the inverse of an
    accepted step $y_{i+1} = \Phi_i(y_i)$ is known in closed form, and takes the very
    evaluations that the pullback of the step is built on. The recursion of cotangents
    is that of `nodegrad.ACAAdjoint`, and the gradient is exact for the computed
    solution, to the rounding that the way back picks up.

    One object serves `nodegrad.odesolve(..., adjoint=...)` and
    `diffrax.diffeqsolve(..., adjoint=...)`, with every `SaveAt`, term and event of
    theirs, and every controller of Diffrax.

    The solver has to be one of `nodegrad.Reversible(...)`, `nodegrad.ALF(...)`,
    `diffrax.ReversibleHeun()`, `diffrax.SemiImplicitEuler()` and
    `diffrax.LeapfrogMidpoint()`.

    **Arguments:**

    - `check`: whether to walk back right after the solve, once more and without
      derivatives, for `Solution.stats["reconstruction_error"]`: by how much the way
      back misses `y0` (and states before resyncs), relatively. Rounding makes about
      $10^{-12}$ (in float32: $10^{-4}$) of it; a gradient is refused from $10^{-3}$ on,
      whether or not this is asked for.
    - `max_recorded_steps`: as for `nodegrad.ACAAdjoint`.

    **Raises:** `TypeError` for another solver. `RuntimeError` if the way back misses
    a known state (the start of the solve, or a resync) by more than a relative
    $10^{-3}$; with `throw=False` the gradient of that solve is NaN instead. Otherwise
    as `nodegrad.ACAAdjoint`.

    **What is differentiated:** as with `nodegrad.ACAAdjoint`, second derivatives
    included.

    **Cost:** per accepted step as many evaluations and pullbacks as the step has
    evaluations (12 of each for `Reversible(Tsit5())`, whose pullbacks evaluate cheap
    vector fields once more, see `nodegrad.ACAAdjoint`; `ReversibleHeun` takes two
    evaluations and one pullback). Memory: no state, whatever the number of steps. With
    `resync_every=K` two states for each `K` of `max_steps`. Times: 9 bytes for each of
    `max_recorded_steps` where an error estimate chooses the steps, none with
    `diffrax.ConstantStepSize` and `diffrax.StepTo`.

    **When not to use it:** where the memory for about `2.5 sqrt(max_steps)` states is
    there: a plain solver with `nodegrad.ACAAdjoint` takes half the evaluations. On
    problems that decay, only with `resync_every`: what the solution forgets on the way
    forwards, rounding reinvents on the way back, at the same rate.

    ??? cite "Reference"

        McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs,
        2024, arXiv:2410.11648, Algorithm 1; Kidger, Foster, Li, Lyons: Efficient and
        Accurate Gradients for Neural SDEs, 2021, arXiv:2105.13493, Algorithm 2.
    """

    check: bool = eqx.field(static=True, default=False)
    max_recorded_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_recorded_steps("ReversibleAdjoint", self.max_recorded_steps)

    def recorded_steps(self, max_steps):
        """Those that are asked for, or a number that almost always suffices."""
        return choose_recorded_steps(self.max_recorded_steps, max_steps)

    def make_state_source(self, step, controller, grid, max_steps, dense, first_jump):
        """Steps are undone; states are stored before resyncs."""
        del dense
        invertible_step = make_invertible_step(step.solver, step.terms, step.args)
        jumps = 0
        if invertible_step.resyncs_at_jumps and may_jump(controller):
            if has_unknown_jumps(controller):
                msg = (
                    f"`{type(step.solver).__name__}` has to be resynced where the "
                    "vector field jumps, and `nodegrad.ReversibleAdjoint` cannot tell "
                    f"how often {controller} makes it jump. Use "
                    "`diffrax.ClipStepSizeController(..., jump_ts=...)` around one of "
                    "Diffrax's controllers, or `nodegrad.ACAAdjoint()`."
                )
                raise TypeError(msg)
            jumps = len(grid.anchors) + 1
        first_jump = first_jump and invertible_step.resyncs_at_jumps
        resyncs = Resyncs(invertible_step.resync_every, jumps, first_jump, max_steps)
        return ReconstructedStates(invertible_step, resyncs)


def _check_recorded_steps(name: str, value: Any) -> None:
    """Raises unless it is `None` or a positive integer."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (is_integer and value > 0):
        return
    msg = (
        f"`{name}(max_recorded_steps=...)` must be `None` or a positive integer; got "
        f"{value!r}."
    )
    raise (ValueError if is_integer else TypeError)(msg)
