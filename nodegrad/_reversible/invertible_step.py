r"""Steps that can be undone exactly, by algebra alone.

A reversible method has a step $\Phi$ whose inverse takes the same evaluations as the
step itself. The backward pass can then walk back to every state of the solve, and needs
none of them stored. Here is what a solver has to provide for that: its step (`forward`)
and the inverse of it (`backward`), both written in terms of `parts`, the functions that
evaluate the vector field and the control.

`evaluate(part, key, *args)` calls a part. What `backward` and `forward` call by the
same part and key is evaluated once: the pullback of `forward` uses the value
and the pullback that `backward` found. So a step back costs as many evaluations as a
step, and as many pullbacks.

Everything besides the parts is arithmetic that works alike on one state and on a batch.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._internal.compat import ω
from .._steps.tableau import explicit_tableau
from .._trajectory.state_source import Evaluate


class AbstractInvertibleStep(eqx.Module):
    """How to step with `solver`, and back.

    The replay state is what a step hands to the next one beside `y`: the part of the
    solver's state that the inverse reconstructs. At a *resync* a step discards some of
    it; the state before is stored there. `forward` and `backward` read no array of the
    terms or of `args` but through the parts.
    """

    solver: Any
    terms: PyTree
    args: PyTree

    #: Whether a jump of the vector field is a resync.
    resyncs_at_jumps: ClassVar[bool] = False

    @property
    def resync_every(self) -> int | None:
        """The number of steps from one resync to the next, if there are any."""
        return getattr(self.solver, "resync_every", None)

    @abc.abstractmethod
    def parts(self) -> dict[str, Callable]:
        """The functions that evaluate something, by name."""

    @abc.abstractmethod
    def forward(
        self, evaluate: Evaluate, t0, t1, y0: PyTree, state0: PyTree, resync: Any
    ) -> tuple[PyTree, PyTree, PyTree]:
        """The step: `(y1, state1, dense_info)`. `resync` is `False` where none can be.

        It is the step that the solver itself makes, up to rounding.
        """

    @abc.abstractmethod
    def backward(
        self, evaluate: Evaluate, t0, t1, before, y1: PyTree, state1: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The inverse of the step after its resync, if any: `(y0, state0)`.

        `before` is the start of the step before this one (or `t0` if there is none).
        """

    def replay_state(self, solver_state: PyTree) -> PyTree:
        """The replay state in a solver state (or in its cotangent)."""
        return solver_state

    def checked_part(self, y: PyTree, replay_state: PyTree) -> PyTree:
        """What a resync leaves as it was, so that the inverse finds it again."""
        del replay_state
        return y

    def lost(self, solver_state: PyTree) -> Any:
        """Whether the solver found that it is no longer solving anything."""
        return getattr(solver_state, "lost", jnp.array(False))

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """`solver_state` with that part replaced."""
        del solver_state
        return replay_state


class _ReversibleHeun(AbstractInvertibleStep):
    r"""`diffrax.ReversibleHeun`: with $\hat y$ and $f(\hat y)$ kept,

    $\hat y_1 = 2 y_0 - \hat y_0 + f(\hat y_0)$ and
    $y_1 = y_0 + (f(\hat y_0) + f(\hat y_1)) / 2$, where $f$ includes the control; so
    $\hat y_0 = 2 y_1 - \hat y_1 - f(\hat y_1)$.
    """

    resyncs_at_jumps: ClassVar[bool] = True

    def checked_part(self, y, replay_state):
        del y
        yhat, _ = replay_state
        return yhat

    def parts(self):
        vf = lambda t, y: self.terms.vf(t, y, self.args)
        return dict(
            control=self.terms.contr,
            vf=vf,
            vf_after_jump=lambda t, y, old_vf, jump: jax.lax.cond(
                jump, lambda: vf(t, y), lambda: old_vf
            ),
            product=self.terms.prod,
        )

    def forward(self, evaluate, t0, t1, y0, state0, resync):
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

    def backward(self, evaluate, t0, t1, before, y1, state1):
        del before
        yhat1, _ = state1
        control = evaluate("control", "control", t0, t1)
        vf1 = evaluate("vf", "end", t1, yhat1)
        f1 = evaluate("product", "end", vf1, control)
        yhat0 = (2 * y1**ω - yhat1**ω - f1**ω).ω
        # Not "start": that is another one after a jump.
        vf0 = evaluate("vf", "undo", t0, yhat0)
        f0 = evaluate("product", "undo", vf0, control)
        y0 = (y1**ω - 0.5 * (f0**ω + f1**ω)).ω
        return y0, (yhat0, vf0)


class _LeapfrogMidpoint(AbstractInvertibleStep):
    r"""`diffrax.LeapfrogMidpoint`: $y_1 = y_{-1} + f(y_0)$ from $t_{-1}$ to $t_1$."""

    def parts(self):
        product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        return dict(control=self.terms.contr, product=product)

    def forward(self, evaluate, t0, t1, y0, state0, resync):
        del resync
        before, y_before = state0
        control = evaluate("control", "control", before, t1)
        f0 = evaluate("product", "product", t0, y0, control)
        y1 = (y_before**ω + f0**ω).ω
        return y1, (t0, y0), dict(y0=y0, y1=y1)

    def backward(self, evaluate, t0, t1, before, y1, state1):
        _, y0 = state1
        control = evaluate("control", "control", before, t1)
        f0 = evaluate("product", "product", t0, y0, control)
        return y0, (before, (y1**ω - f0**ω).ω)


class _SemiImplicitEuler(AbstractInvertibleStep):
    r"""`diffrax.SemiImplicitEuler` for a pair of states $(p, q)$:

    $p_1 = p_0 + f(q_0)$, then $q_1 = q_0 + g(p_1)$, undone in the opposite order.
    """

    def parts(self):
        first, second = self.terms
        f = lambda t, y, control: first.vf_prod(t, y, self.args, control)
        g = lambda t, y, control: second.vf_prod(t, y, self.args, control)
        return dict(control_f=first.contr, control_g=second.contr, f=f, g=g)

    def forward(self, evaluate, t0, t1, y0, state0, resync):
        del state0, resync
        p0, q0 = y0
        control_f = evaluate("control_f", "f", t0, t1)
        control_g = evaluate("control_g", "g", t0, t1)
        p1 = (p0**ω + evaluate("f", "f", t0, q0, control_f) ** ω).ω
        q1 = (q0**ω + evaluate("g", "g", t0, p1, control_g) ** ω).ω
        return (p1, q1), None, dict(y0=y0, y1=(p1, q1))

    def backward(self, evaluate, t0, t1, before, y1, state1):
        del before, state1
        p1, q1 = y1
        control_f = evaluate("control_f", "f", t0, t1)
        control_g = evaluate("control_g", "g", t0, t1)
        q0 = (q1**ω - evaluate("g", "g", t0, p1, control_g) ** ω).ω
        p0 = (p1**ω - evaluate("f", "f", t0, q0, control_f) ** ω).ω
        return (p0, q0), None


_REVERSALS = {
    diffrax.ReversibleHeun: _ReversibleHeun,
    diffrax.LeapfrogMidpoint: _LeapfrogMidpoint,
    diffrax.SemiImplicitEuler: _SemiImplicitEuler,
}


def make_invertible_step(solver, terms, args) -> AbstractInvertibleStep:
    """How to undo the steps of `solver`."""
    cls = _REVERSALS.get(type(solver)) or getattr(solver, "reversal_cls", None)
    if cls is None:
        name = type(solver).__name__
        # Of an explicit Runge-Kutta method, wrapped or not, there is a reversible one.
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


def is_regular_resync(resync_every: int | None, count):
    """Whether to resync before a step, `count` others after the start of it all."""
    if resync_every is None:
        return False
    return (count % resync_every == 0) & (count > 0)


def check_number(name: str, value: Any):
    """Raises unless it is a Python or NumPy number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        msg = (
            f"`{name}` must be a number that is known before the solve; got "
            f"{value!r}, a {type(value).__name__}."
        )
        raise TypeError(msg)


def check_resync_every(name: str, resync_every: Any):
    """Raises unless it is `None` or a positive integer."""
    if resync_every is None:
        return
    if isinstance(resync_every, bool) or not hasattr(resync_every, "__index__"):
        msg = (
            f"`nodegrad.{name}(resync_every=...)` must be `None` or an integer; got "
            f"{resync_every!r}."
        )
        raise TypeError(msg)
    if resync_every < 1:
        msg = f"`resync_every` must be at least one step; got {resync_every}."
        raise ValueError(msg)
