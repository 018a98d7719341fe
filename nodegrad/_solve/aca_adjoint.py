"""The adjoint that stores states, and makes the steps between them again."""

from typing import ClassVar

import diffrax
import equinox as eqx

from .._internal.tree import check_counts
from .._steps.step import AbstractStep
from .._trajectory.checkpoints import CheckpointedStates, choose_checkpoints
from .._trajectory.step_times import AbstractGrid
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
      keeps `K` states (one less if `K` is odd), and one segment of the states between
      two of them: `max_steps / K`, rounded up to a power of two. The sum is least near
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

    Memory: the states kept and, with adaptive steps, at most 9 bytes (in float32: 5;
    with `jump_ts` 18 and 10) for each of `max_recorded_steps`; forward mode: none. With
    an adaptive solver and `SaveAt(ts=...)`, `SaveAt(dense=True)` or an event, each
    replay also evaluates the last stage, which interpolation needs.

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
        check_counts(None, max_recorded_steps=self.max_recorded_steps)
        check_counts(None, "all", checkpoints=self.checkpoints)

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
