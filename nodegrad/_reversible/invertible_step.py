r"""Steps of solvers, and their algebraic inverses.

A reversible solver has a step $\Phi$ whose inverse makes the same evaluations of the
vector field as the step itself. The backward pass reconstructs every state of the solve
with it, and stores none. Each class here implements a step (`forward`) and its inverse
(`backward`) in terms of `parts`: the functions that evaluate the vector field and the
control.

`evaluate(part, key, *args)` calls a part. Calls of `backward` and `forward` with the
same part and key have the same arguments, up to rounding, and are evaluated only once:
the pullback through `forward` uses the values and pullbacks of the calls of `backward`.
So undoing and pulling back a step costs as many evaluations as the step, and as many
pullbacks. A call of `backward` with the key `"undo"` is not shared. No pullback is
stored for it.

A solver of this package names its class by `reversal_cls`. `reversals.py` has the
classes of other solvers, and chooses one.

All code outside of the parts is arithmetic without shapes: it works on one state as
well as on a batch of states.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import diffrax
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real

from .._steps.solvers import AbstractReversibleSolver
from .._trajectory.state_source import Evaluate, StoresStates


# Times have the shape of the batch. Diffrax may also pass Python numbers.
Time: TypeAlias = Real[ArrayLike, "..."]
# Whether the vector field has jumped, as Diffrax passes it.
Flag: TypeAlias = bool | np.ndarray | Bool[Array, ""]
# Whether a step begins with a resync; the literal `False` if it never does.
Resync: TypeAlias = Literal[False] | Bool[Array, "..."]


class AbstractInvertibleStep(StoresStates):
    """The step of `solver`, and its inverse.

    The replay state is the part of the solver state that the next step needs in
    addition to `y`, and that the inverse reconstructs. At a *resync*, a step discards a
    part of the replay state. The inverse cannot find that part again, so the state
    before the step is stored.

    `forward` and `backward` may read arrays of `terms` and `args` only through `parts`:
    otherwise the gradient with respect to these arrays would be incomplete.
    """

    # Any of several solver classes, with different fields.
    solver: Any
    terms: PyTree[diffrax.AbstractTerm]
    args: PyTree

    #: Whether `forward` gets regular resyncs. Otherwise only a state is stored there.
    told_of_regular_resyncs: ClassVar[bool] = True

    @property
    def resyncs_at_jumps(self) -> bool:
        """Whether a jump of the vector field is a resync."""
        return False

    @property
    def resync_every(self) -> int | None:
        """The number of steps from one regular resync to the next, or `None`."""
        every = getattr(self.solver, "resync_every", None)
        return None if self.chooses_resyncs else every

    @property
    def chooses_resyncs(self) -> bool:
        """Whether the solver decides where to resync, by its state's `resync`."""
        return False

    @abc.abstractmethod
    def parts(self) -> dict[str, Callable]:
        """Returns the functions that evaluate the vector field or the control."""

    @abc.abstractmethod
    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        """Makes the step of the solver (up to rounding): `(y1, state1, dense_info)`.

        **Arguments:**

        - `evaluate`: calls a part.
        - `y0`, `state0`: the state and the replay state at `t0`.
        - `resync`: whether the step begins with a resync.
        """

    @abc.abstractmethod
    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Undoes the part of a step after its resync: returns `(y0, state0)`.

        `before` is the start of the previous step, or `t0` if this is the first one.
        """

    def replay_state(self, solver_state: PyTree) -> PyTree:
        """Returns the replay state in a solver state (or in a cotangent of one)."""
        return solver_state

    def checked_part(
        self, y: PyTree[Array], replay_state: PyTree[Array]
    ) -> PyTree[Array]:
        """Returns the part that a resync leaves unchanged: the inverse reconstructs it.

        The reconstruction error is measured on this part.
        """
        del replay_state
        return y

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """Returns `solver_state` with another replay state."""
        del solver_state
        return replay_state


class SharingSolver(AbstractReversibleSolver):
    """A reversible solver whose inverse shares its evaluations with the step."""

    @property
    @abc.abstractmethod
    def reversal_cls(self) -> type[AbstractInvertibleStep]:
        """The class of the step and its inverse."""

    def backward_step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Time,
        t1: Time,
        y1: PyTree[Array],
        args: PyTree,
        ts_state: PyTree[Time],
        solver_state: PyTree,
        made_jump: Flag,
    ) -> tuple[PyTree, dict[str, PyTree], PyTree, Any]:
        """Undoes a step; see `nodegrad.AbstractReversibleSolver`.

        Statistics in the solver state, such as the largest velocity so far, are not
        undone. The state before a resync cannot be found: that after it is returned.
        """
        del made_jump
        step: Any = self.reversal_cls(self, terms, args)
        parts, made = step.parts(), {}

        def evaluate(part: str, key: str, *part_args: PyTree) -> PyTree:
            if (part, key) not in made:
                made[part, key] = parts[part](*part_args)
            return made[part, key]

        (before,) = ts_state
        state1 = step.replay_state(solver_state)
        y0, state0 = step.backward(evaluate, t0, t1, before, y1, state1)
        # The step finds the evaluations that the inverse made.
        _, _, dense_info = step.forward(evaluate, t0, t1, y0, state0, False)
        solver_state = step.with_replay_state(solver_state, state0)
        return y0, dense_info, solver_state, diffrax.RESULTS.successful


def is_regular_resync(resync_every: int | None, count: Int[Array, "..."]) -> Resync:
    """Returns whether a step begins with a resync after every `resync_every` steps.

    `count` is the number of steps before it, including those of an earlier solve that
    this one continues. The first step of all needs no resync.
    """
    if resync_every is None:
        return False
    return (count % resync_every == 0) & (count > 0)
