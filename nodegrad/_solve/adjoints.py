"""The two adjoints. They differ in how states are recovered in the backward pass.

`ACAAdjoint` stores states, and makes the steps between them again.
`ReversibleAdjoint` undoes the steps, from the final state on.
"""

from typing import Any, ClassVar

import diffrax
import equinox as eqx

from .._reversible.reconstruction import ReconstructedStates
from .._reversible.restarts import Restarts
from .._reversible.reversals import make_invertible_step
from .._steps.step import AbstractStep
from .._trajectory.checkpoints import CheckpointedStates, choose_checkpoints
from .._trajectory.step_times import AbstractGrid, has_unknown_jumps, may_jump
from .._trajectory.trajectory import choose_recorded_steps
from .recorded_adjoint import AbstractRecordedAdjoint


class ACAAdjoint(AbstractRecordedAdjoint):
    r"""The adaptive checkpoint adjoint (ACA): replays each accepted step once.

    The forward pass searches for the step sizes without derivatives and records the
    accepted steps. The backward pass replays each of them once, last to first, and
    pulls cotangents back through it. Let $\Phi_i$ be the map of accepted step $i$ from
    $y_i$ to $y_{i+1}$, and $\theta$ the arrays that it depends on: `args`, arrays
    inside the terms, and arrays that the vector field closes over. Then

    $$\lambda_i = (\partial \Phi_i / \partial y)^\top \lambda_{i+1}, \qquad
      \frac{dL}{d\theta} = \sum_i (\partial \Phi_i / \partial \theta)^\top
      \lambda_{i+1}.$$

    To rounding, this is the exact gradient of the computed solution with the step sizes
    held constant. `diffrax.RecursiveCheckpointAdjoint` computes the same gradient.
    `diffrax.BacksolveAdjoint` computes an approximation, which fails where the equation
    cannot be integrated backwards.

    The adjoint works in `nodegrad.odesolve(..., adjoint=...)` and in
    `diffrax.diffeqsolve(..., adjoint=...)`, there with every term, solver, controller,
    `SaveAt`, event and progress meter of Diffrax.

    All modes of JAX work: `jax.grad`, `jax.jvp`, `jax.linearize`, `jax.jacfwd`,
    `jax.jacrev`. Forward mode makes the accepted steps again with tangents, and needs
    no stored state. Under `jax.vmap` each sample takes its own steps, and the gradient
    of parameters that samples share is summed inside every step.

    **Example:**

    ```python
    import diffrax
    import jax
    import nodegrad

    decay = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    solve = lambda rate: diffrax.diffeqsolve(
        decay, diffrax.Tsit5(), 0.0, 1.0, 0.1, 2.0, rate, adjoint=nodegrad.ACAAdjoint()
    )
    print(jax.grad(lambda rate: solve(rate).ys[0])(0.7).round(3))  # -0.993
    ```

    **Arguments:**

    - `checkpoints`: how many states to keep. `None` keeps about `2 sqrt(max_steps)` (a
      power of two, and at least 32: 128 for the default `max_steps=4096`). No step is
      made again if the solve takes no more accepted steps than that. An integer `K`
      keeps at most `K` states, and one segment of the `max_steps / K` states between
      two of them (both numbers as powers of two); the sum is least near
      `K = sqrt(max_steps)`. `"all"` keeps every accepted state, `max_steps` of them.
    - `max_recorded_steps`: where an error estimate chooses the steps, the number of
      accepted steps whose times are kept. A derivative of a longer solve is refused.
      `None` stands for a quarter of `max_steps`, between 1024 and 131072 (with
      `checkpoints="all"` for `max_steps`). This is many times what a solve usually
      takes, and costs little memory for a large `max_steps`.

    **Raises:** `TypeError` or `ValueError` for other arguments. `RuntimeError` for
    reverse mode with `max_steps=None`, for derivatives with respect to tolerances, for
    reverse mode over any other derivative, and for a derivative of a solve of more
    accepted steps than `max_recorded_steps` (with `throw=False` that is NaN instead).

    **What is differentiated:** `y0`, `args`, terms, closures, `t0`, `t1`, `dt0`,
    `SaveAt(ts=...)`, the `ts` of `diffrax.StepTo`, and the `step_ts` and `jump_ts` of
    `diffrax.ClipStepSizeController`. The times of the accepted steps move with these
    as in Diffrax: an unclipped step size is a constant multiple of the previous one.
    Second derivatives: forward mode over reverse mode, `jax.jvp(jax.grad(f), ...)` or
    `jax.hessian(f)`, and forward mode over forward mode, with the step sizes held
    constant.

    **Cost:** one forward pass; one replay and its pullback for each accepted step; at
    most one more pass over the accepted steps if they outnumber the `checkpoints`.
    Forward mode: one forward pass, and for each accepted step one replay with all of
    its tangents. Rejected steps cost nothing in both. The replay evaluates each stage
    once. The pullback evaluates each stage again if the vector field consists of
    elementwise operations, and evaluates nothing if matrix products dominate.

    Memory: the states kept and, with adaptive steps, 9 bytes (in float32: 5) for each
    of `max_recorded_steps`; forward mode alone: none. With an adaptive solver and
    `SaveAt(ts=...)`, `SaveAt(dense=True)` or an event, each replay also evaluates the
    last stage, which interpolation needs.

    **When not to use it:** if memory must not grow with the number of steps
    (`nodegrad.ReversibleAdjoint`); for steady states (`diffrax.ImplicitAdjoint`).

    ??? cite "Reference"

        Zhuang, Dvornek, Li, Tatikonda, Papademetris, Duncan: Adaptive Checkpoint
        Adjoint Method for Gradient Estimation in Neural ODE, ICML 2020, Algorithm 2.
    """

    checkpoints: int | str | None = eqx.field(static=True, default=None)
    max_recorded_steps: int | None = eqx.field(static=True, default=None)

    # Nothing is reconstructed, so there is no error to measure.
    check: ClassVar[bool] = False

    def __check_init__(self) -> None:
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
                f"{checkpoints}. The memory is least with about `sqrt(max_steps)` of "
                "them."
            )
            raise ValueError(msg)

    def recorded_steps(self, max_steps: int) -> int:
        """Returns `max_recorded_steps`, or the number that `None` stands for."""
        # The states of all steps take more memory than their times.
        if self.checkpoints == "all" and self.max_recorded_steps is None:
            return max_steps
        return choose_recorded_steps(self.max_recorded_steps, max_steps)

    def make_state_source(
        self,
        step: AbstractStep,
        controller: diffrax.AbstractStepSizeController,
        grid: AbstractGrid,
        max_steps: int,
        dense: bool,
        first_jump: bool,
    ) -> CheckpointedStates:
        """Returns a source that stores states, thinned out as the solve goes on."""
        # Jumps need no rows: the state before any step may be replayed from.
        del controller, grid, first_jump
        checkpoints = choose_checkpoints(self.checkpoints, max_steps)
        return CheckpointedStates(step, checkpoints, dense)


class ReversibleAdjoint(AbstractRecordedAdjoint):
    r"""Undoes the steps of a reversible solver, so that states need not be stored.

    The backward pass starts from the final state and reconstructs the states, last to
    first. The inverse of an accepted step $y_{i+1} = \Phi_i(y_i)$ is known in closed
    form, and makes the same evaluations as the pullback of the step, which are shared.
    The recursion of cotangents is that of `nodegrad.ACAAdjoint`. The gradient is that
    of the computed solution, up to the rounding errors of the reconstruction.

    The adjoint works in `nodegrad.odesolve(..., adjoint=...)` and in
    `diffrax.diffeqsolve(..., adjoint=...)`, with every `SaveAt`, term and event of
    these, and every controller of Diffrax.

    The solver has to be one of `nodegrad.Reversible(...)`, `nodegrad.ALF(...)`,
    `diffrax.ReversibleHeun()`, `diffrax.SemiImplicitEuler()` and
    `diffrax.LeapfrogMidpoint()`; `nodegrad.EES25()` and `nodegrad.EES27()`, whose
    inverse and gradient are not exact; or any Diffrax solver with a method
    `backward_step` (see `nodegrad.AbstractReversibleSolver`).

    **Example:**

    ```python
    import diffrax
    import nodegrad

    solver = nodegrad.Reversible(diffrax.Bosh3())
    sol = nodegrad.odesolve(
        lambda t, y, rate: -rate * y, solver, 0.0, 1.0, 0.01, 2.0, 0.7,
        adjoint=nodegrad.ReversibleAdjoint(check=True),
    )
    print(sol.stats["reconstruction_error"] < 1e-3)  # True
    ```

    **Arguments:**

    - `check`: whether to reconstruct the states right after the solve, without
      derivatives, and return `Solution.stats["reconstruction_error"]`: the largest
      relative difference between a reconstructed state and one that is known (`y0`, and
      the states before resyncs). Rounding alone makes about $10^{-12}$ (in float32:
      $10^{-4}$). A gradient is refused from $10^{-3}$ on, also without `check`.
    - `max_recorded_steps`: as for `nodegrad.ACAAdjoint`.

    **Raises:** `TypeError` for another solver. `RuntimeError` if a reconstructed state
    differs from a known one by more than a relative $10^{-3}$; with `throw=False` the
    gradient of that solve is NaN instead. Otherwise as `nodegrad.ACAAdjoint`.

    **What is differentiated:** as with `nodegrad.ACAAdjoint`, second derivatives
    included.

    **Cost:** for each accepted step, as many evaluations and pullbacks as the step has
    evaluations. `Reversible(Tsit5())` has 12 of each, and its pullbacks evaluate cheap
    vector fields once more (see `nodegrad.ACAAdjoint`); `ReversibleHeun` has two
    evaluations and one pullback.

    Memory: no state, for any number of steps, if the solver does not resync. Otherwise
    the states before resyncs are kept in at most 32 rows, of two states each for
    `nodegrad.Reversible`. If a solve resyncs more than 16 times, only every second,
    fourth, ... of these states is kept, and the steps between two of them are made
    again: once for up to 256 resyncs, and at most $n / 256 + 1 / 2$ times for $n$ of
    them. Times: 9 bytes for each of `max_recorded_steps` where an error
    estimate chooses the steps, none with `diffrax.ConstantStepSize` and
    `diffrax.StepTo`; and one byte for each step where the solver decides to resync.

    **When not to use it:** if there is memory for about `2.5 sqrt(max_steps)` states: a
    plain solver with `nodegrad.ACAAdjoint` takes half the evaluations. With a solver
    that does not resync, not on decaying problems: rounding errors grow in the backward
    pass at the rate at which the solution decays.

    ??? cite "Reference"

        McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs,
        2024, arXiv:2410.11648, Algorithm 1; Kidger, Foster, Li, Lyons: Efficient and
        Accurate Gradients for Neural SDEs, 2021, arXiv:2105.13493, Algorithm 2.
    """

    check: bool = eqx.field(static=True, default=False)
    max_recorded_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        _check_recorded_steps("ReversibleAdjoint", self.max_recorded_steps)

    def recorded_steps(self, max_steps: int) -> int:
        """Returns `max_recorded_steps`, or the number that `None` stands for."""
        return choose_recorded_steps(self.max_recorded_steps, max_steps)

    def make_state_source(
        self,
        step: AbstractStep,
        controller: diffrax.AbstractStepSizeController,
        grid: AbstractGrid,
        max_steps: int,
        dense: bool,
        first_jump: bool,
    ) -> ReconstructedStates:
        """Returns a source that undoes steps, and stores the states before resyncs.

        A jump is such a resync for solvers that carry an evaluation from step to step.
        """
        # The inverse makes all evaluations of the step, also those for interpolation.
        del dense
        invertible_step = make_invertible_step(step.solver, step.terms, step.args)
        jumps = invertible_step.resyncs_at_jumps and (
            first_jump or may_jump(controller)
        )
        # At most one jump between two anchors, which contain the `jump_ts`.
        known = not has_unknown_jumps(controller)
        max_jumps = len(grid.anchors) + 2 if known else max_steps
        restarts = Restarts(
            every=invertible_step.resync_every,
            chosen=invertible_step.chooses_resyncs,
            jumps=jumps,
            max_steps=max_steps,
            max_jumps=max_jumps,
        )
        return ReconstructedStates(invertible_step, restarts)


def _check_recorded_steps(name: str, value: Any) -> None:
    """Raises an error unless `value` is `None` or a positive integer."""
    # `True` and `False` are integers in Python.
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (is_integer and value > 0):
        return
    msg = (
        f"`{name}(max_recorded_steps=...)` must be `None` or a positive integer; got "
        f"{value!r}."
    )
    raise (ValueError if is_integer else TypeError)(msg)
