"""The adjoint that undoes the steps of a solve, from the final state on."""

import diffrax
import equinox as eqx

from .._internal.tree import check_counts
from .._reversible.reconstruction import ReconstructedStates
from .._reversible.restarts import Restarts
from .._reversible.reversals import make_invertible_step
from .._steps.step import AbstractStep
from .._trajectory.step_times import AbstractGrid, has_unknown_jumps, may_jump
from .._trajectory.trajectory import choose_recorded_steps
from .recorded_adjoint import AbstractRecordedAdjoint


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
    the states before resyncs are kept in at most 33 rows, of two states each for
    `nodegrad.Reversible`. If a solve resyncs more than 16 times, only every second,
    fourth, ... of these states is kept, and the steps between two of them are made
    again: once for up to 256 resyncs, and at most $n / 256 + 1 / 2$ times for $n$ of
    them. Times: at most 9 bytes for each of `max_recorded_steps` where an error
    estimate chooses the steps, none with `diffrax.ConstantStepSize` and
    `diffrax.StepTo`; and one byte for each step where the solver decides to resync.

    **When not to use it:** if there is memory for about `2.5 sqrt(max_steps)` states: a
    plain solver with `nodegrad.ACAAdjoint` takes half the evaluations. (With resyncs it
    also takes no more memory up to about a thousand steps.) With a solver
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
        check_counts(None, max_recorded_steps=self.max_recorded_steps)

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
