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
pullbacks.

All code outside of the parts is arithmetic without shapes: it works on one state as
well as on a batch of states.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real

from .._internal.compat import ω
from .._steps.tableau import explicit_tableau
from .._trajectory.state_source import Evaluate


# Times have the shape of the batch. Diffrax may also pass Python numbers.
Time: TypeAlias = Real[ArrayLike, "..."]
# Whether the vector field has jumped, as Diffrax passes it.
Flag: TypeAlias = bool | np.ndarray | Bool[Array, ""]
# Whether a step begins with a resync; the literal `False` if it never does.
Resync: TypeAlias = Literal[False] | Bool[Array, "..."]


class AbstractInvertibleStep(eqx.Module):
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

    #: Whether a jump of the vector field is a resync.
    resyncs_at_jumps: ClassVar[bool] = False

    @property
    def resync_every(self) -> int | None:
        """The number of steps from one resync to the next; `None` without resyncs."""
        return getattr(self.solver, "resync_every", None)

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

    def lost(self, solver_state: PyTree) -> Bool[Array, "..."]:
        """Returns whether the solver has reported a lost coupling."""
        return getattr(solver_state, "lost", jnp.array(False))

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """Returns `solver_state` with another replay state."""
        del solver_state
        return replay_state


class _ReversibleHeun(AbstractInvertibleStep):
    r"""The step of `diffrax.ReversibleHeun`, and its inverse.

    With $f$ for the vector field times the control, a step is
    $\hat y_1 = 2 y_0 - \hat y_0 + f(\hat y_0)$ and
    $y_1 = y_0 + (f(\hat y_0) + f(\hat y_1)) / 2$. Its inverse begins with
    $\hat y_0 = 2 y_1 - \hat y_1 - f(\hat y_1)$. The replay state is $\hat y$ and the
    vector field there, without the control.
    """

    # A jump discards the stored vector field, and evaluates it at the state `y`.
    resyncs_at_jumps: ClassVar[bool] = True

    def checked_part(
        self, y: PyTree[Array], replay_state: PyTree[Array]
    ) -> PyTree[Array]:
        del y
        yhat, _ = replay_state
        return yhat

    def parts(self) -> dict[str, Callable]:
        def vf(t: Time, y: PyTree[Array]) -> PyTree[Array]:
            return self.terms.vf(t, y, self.args)

        return dict(
            control=self.terms.contr,
            vf=vf,
            vf_after_jump=lambda t, y, old_vf, jump: jax.lax.cond(
                jump, lambda: vf(t, y), lambda: old_vf
            ),
            product=self.terms.prod,
        )

    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        yhat0, vf0 = state0
        if resync is not False:
            vf0 = evaluate("vf_after_jump", "jump", t0, y0, vf0, resync)
        control = evaluate("control", "control", t0, t1)
        f0 = evaluate("product", "start", vf0, control)
        yhat1 = (2 * y0**ω - yhat0**ω + f0**ω).ω
        vf1 = evaluate("vf", "end", t1, yhat1)
        f1 = evaluate("product", "end", vf1, control)
        y1 = (y0**ω + 0.5 * (f0**ω + f1**ω)).ω
        return y1, (yhat1, vf1), dict(y0=y0, y1=y1)

    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        del before
        # The stored vector field is not used. It is evaluated again, under the key that
        # `forward` uses for its last call, so that this call has a pullback.
        yhat1, _ = state1
        control = evaluate("control", "control", t0, t1)
        vf1 = evaluate("vf", "end", t1, yhat1)
        f1 = evaluate("product", "end", vf1, control)
        yhat0 = (2 * y1**ω - yhat1**ω - f1**ω).ω
        # Not the key "start": after a jump, `forward` calls that with another argument.
        vf0 = evaluate("vf", "undo", t0, yhat0)
        f0 = evaluate("product", "undo", vf0, control)
        y0 = (y1**ω - 0.5 * (f0**ω + f1**ω)).ω
        return y0, (yhat0, vf0)


class _LeapfrogMidpoint(AbstractInvertibleStep):
    r"""The step of `diffrax.LeapfrogMidpoint`, and its inverse.

    A step is $y_1 = y_{-1} + f(y_0)$, with the control from $t_{-1}$ to $t_1$. The
    replay state is $(t_{-1}, y_{-1})$.
    """

    def parts(self) -> dict[str, Callable]:
        product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        return dict(control=self.terms.contr, product=product)

    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        del resync
        # The step starts from the state before the last one.
        before, y_before = state0
        control = evaluate("control", "control", before, t1)
        f0 = evaluate("product", "product", t0, y0, control)
        y1 = (y_before**ω + f0**ω).ω
        return y1, (t0, y0), dict(y0=y0, y1=y1)

    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        # The replay state has `y0` already. Only the state before it is reconstructed.
        _, y0 = state1
        control = evaluate("control", "control", before, t1)
        f0 = evaluate("product", "product", t0, y0, control)
        return y0, (before, (y1**ω - f0**ω).ω)


class _SemiImplicitEuler(AbstractInvertibleStep):
    r"""The step of `diffrax.SemiImplicitEuler` for a pair $(p, q)$, and its inverse.

    A step is $p_1 = p_0 + f(q_0)$, then $q_1 = q_0 + g(p_1)$. The inverse undoes these
    in the opposite order. There is no replay state.
    """

    def parts(self) -> dict[str, Callable]:
        first, second = self.terms
        f = lambda t, y, control: first.vf_prod(t, y, self.args, control)
        g = lambda t, y, control: second.vf_prod(t, y, self.args, control)
        return dict(control_f=first.contr, control_g=second.contr, f=f, g=g)

    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        del state0, resync
        p0, q0 = y0
        control_f = evaluate("control_f", "f", t0, t1)
        control_g = evaluate("control_g", "g", t0, t1)
        p1 = (p0**ω + evaluate("f", "f", t0, q0, control_f) ** ω).ω
        q1 = (q0**ω + evaluate("g", "g", t0, p1, control_g) ** ω).ω
        return (p1, q1), None, dict(y0=y0, y1=(p1, q1))

    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        del before, state1
        p1, q1 = y1
        control_f = evaluate("control_f", "f", t0, t1)
        control_g = evaluate("control_g", "g", t0, t1)
        q0 = (q1**ω - evaluate("g", "g", t0, p1, control_g) ** ω).ω
        p0 = (p1**ω - evaluate("f", "f", t0, q0, control_f) ** ω).ω
        return (p0, q0), None


# Solvers of Diffrax. A solver of nodegrad names its class by `reversal_cls`.
_REVERSALS = {
    diffrax.ReversibleHeun: _ReversibleHeun,
    diffrax.LeapfrogMidpoint: _LeapfrogMidpoint,
    diffrax.SemiImplicitEuler: _SemiImplicitEuler,
}


def make_invertible_step(
    solver: diffrax.AbstractSolver, terms: PyTree[diffrax.AbstractTerm], args: PyTree
) -> AbstractInvertibleStep:
    """Returns the step of `solver` with its inverse, or raises if there is none."""
    cls = _REVERSALS.get(type(solver)) or getattr(solver, "reversal_cls", None)
    if cls is None:
        name = type(solver).__name__
        # Suggest `Reversible(...)` of the user's own solver, if it is an explicit
        # Runge-Kutta method.
        inner = name if explicit_tableau(solver) is not None else "Tsit5"
        msg = (
            f"`nodegrad.ReversibleAdjoint` needs a solver whose steps can be undone, "
            f"and those of `{name}` cannot. Use `nodegrad.Reversible({inner}())`, "
            "`nodegrad.ALF()`, `diffrax.ReversibleHeun()`, "
            "`diffrax.SemiImplicitEuler()` or `diffrax.LeapfrogMidpoint()`; or keep "
            "the solver and use `nodegrad.ACAAdjoint()`."
        )
        raise TypeError(msg)
    return cls(solver, terms, args)


def is_regular_resync(resync_every: int | None, count: Int[Array, "..."]) -> Resync:
    """Returns whether a step begins with a resync after every `resync_every` steps.

    `count` is the number of steps before it, including those of an earlier solve that
    this one continues. The first step of all needs no resync.
    """
    if resync_every is None:
        return False
    return (count % resync_every == 0) & (count > 0)


def check_number(name: str, value: object) -> None:
    """Raises unless the argument `name` has a Python or NumPy number for its value."""
    # It is a static field of a solver, so an array would fail later, when hashed.
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        msg = (
            f"`{name}` must be a number that is known before the solve; got "
            f"{value!r}, a {type(value).__name__}."
        )
        raise TypeError(msg)


def check_resync_every(name: str, resync_every: Any) -> None:
    """Raises unless `resync_every` of solver `name` is `None` or a positive integer."""
    if resync_every is None:
        return
    # NumPy integers have `__index__` as well, and so has `bool`.
    if isinstance(resync_every, bool) or not hasattr(resync_every, "__index__"):
        msg = (
            f"`nodegrad.{name}(resync_every=...)` must be `None` or an integer; got "
            f"{resync_every!r}."
        )
        raise TypeError(msg)
    if resync_every < 1:
        msg = f"`resync_every` must be at least one step; got {resync_every}."
        raise ValueError(msg)
