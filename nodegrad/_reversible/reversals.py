"""The inverses of steps: those of other packages, of Diffrax, and of this package.

`make_invertible_step` finds the inverse of a solver's step. It asks in this order.

1. A solver of this package says which `AbstractInvertibleStep` it has.
2. Any other solver has a method `backward_step`
   (`nodegrad.AbstractReversibleSolver`).
3. Three solvers of released Diffrax are reversible and have no `backward_step`. Their
   inverses are written down here.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._internal.compat import ω
from .._internal.tree import as_arrays
from .._layers.find_products import without_statistics
from .._steps.explicit_methods import EffectivelySymmetric
from .._steps.increment import Increment
from .._steps.solvers import has_backward_step, with_scan_kind
from .._steps.tableau import explicit_tableau, has_explicit_tableau
from .._trajectory.state_source import Evaluate
from .invertible_step import AbstractInvertibleStep, Resync, Time


class _BackwardStep(AbstractInvertibleStep):
    """The step of any solver, undone by its `backward_step`.

    The replay state is the solver state.
    """

    # The solver gets the flag `made_jump` for the resync. A regular resync only stores
    # a state.
    told_of_regular_resyncs: ClassVar[bool] = False

    @property
    def resyncs_at_jumps(self) -> bool:
        return getattr(self.solver, "resyncs_at_jumps", True)

    def parts(self) -> dict[str, Callable]:
        # As in `SolverStep`: a "bounded" loop over stages has all derivatives.
        solver = with_scan_kind(self.solver, "bounded")
        # The inverse is not differentiated in reverse mode.
        inverse = with_scan_kind(self.solver, "lax")

        def step(
            t0: Time,
            t1: Time,
            y0: PyTree[Array],
            state0: PyTree,
            *made_jump: Bool[Array, ""],
        ) -> tuple[PyTree, PyTree, PyTree]:
            jump = made_jump[0] if made_jump else False
            y1, _, dense_info, state1, _ = solver.step(
                self.terms, t0, t1, y0, self.args, state0, jump
            )
            return as_arrays((y1, state1, dense_info))

        def undo(
            t0: Time, t1: Time, before: Time, y1: PyTree[Array], state1: PyTree
        ) -> tuple[PyTree, PyTree]:
            y0, _, state0, result = inverse.backward_step(
                self.terms, t0, t1, y1, self.args, (before,), state1, False
            )
            # With NaN the next comparison with a known state refuses the gradient.
            failed = result != diffrax.RESULTS.successful
            y0 = jax.tree.map(lambda y: jnp.where(failed, jnp.nan, y), as_arrays(y0))
            return y0, as_arrays(state0)

        # Layers report the uses in the step, and not those in its inverse.
        return dict(step=step, undo=lambda *args: without_statistics(undo, *args))

    def forward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        y0: PyTree[Array],
        state0: PyTree[Array],
        resync: Resync,
    ) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array]]:
        made_jump = () if resync is False else (resync,)
        return evaluate("step", "step", t0, t1, y0, state0, *made_jump)

    def backward(
        self,
        evaluate: Evaluate,
        t0: Time,
        t1: Time,
        before: Time,
        y1: PyTree[Array],
        state1: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        return evaluate("undo", "undo", t0, t1, before, y1, state1)


class _EffectivelySymmetricStep(AbstractInvertibleStep):
    r"""The step of an `EffectivelySymmetric` solver, and its approximate inverse.

    With $\Psi$ for the increment, a step is $y_1 = y_0 + \Psi_h(y_0)$ and its inverse
    is $y_0 = y_1 + \Psi_{-h}(y_1)$. There is no replay state.
    """

    def parts(self) -> dict[str, Callable]:
        product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        # No stage is shared with the next step, so "all" costs no evaluation.
        increment = Increment(self.solver.tableau, product, "all")
        return dict(control=self.terms.contr, increment=increment)

    def replay_state(self, solver_state: PyTree) -> PyTree:
        del solver_state

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        del replay_state
        return solver_state

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
        control = evaluate("control", "control", t0, t1)
        increment, k = evaluate("increment", "increment", t0, t1, control, y0)
        y1 = (y0**ω + increment**ω).ω
        return y1, None, dict(y0=y0, y1=y1, k=k)

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
        # The control is not evaluated from `t1` to `t0`: some paths have no such value.
        control = jax.tree.map(jnp.negative, evaluate("control", "control", t0, t1))
        increment, _ = evaluate("increment", "undo", t1, t0, control, y1)
        return (y1**ω + increment**ω).ω, None


class _ReversibleHeun(AbstractInvertibleStep):
    r"""The step of `diffrax.ReversibleHeun`, and its inverse.

    With $f$ for the vector field times the control, a step is
    $\hat y_1 = 2 y_0 - \hat y_0 + f(\hat y_0)$ and
    $y_1 = y_0 + (f(\hat y_0) + f(\hat y_1)) / 2$. Its inverse begins with
    $\hat y_0 = 2 y_1 - \hat y_1 - f(\hat y_1)$. The replay state is $\hat y$ and the
    vector field there, without the control.
    """

    @property
    def resyncs_at_jumps(self) -> bool:
        # A jump discards the stored vector field, and evaluates it at the state `y`.
        return True

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
        # Solves of a batch may share `t0`, but a replay state is that of each solve.
        return y1, (jnp.broadcast_to(t0, before.shape), y0), dict(y0=y0, y1=y1)

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
        last, y0 = state1
        control = evaluate("control", "control", before, t1)
        f0 = evaluate("product", "product", t0, y0, control)
        before = jnp.broadcast_to(before, last.shape)
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


# Solvers of Diffrax 0.7.2 that can be undone, and have no `backward_step`.
_OF_DIFFRAX = {
    diffrax.ReversibleHeun: _ReversibleHeun,
    diffrax.LeapfrogMidpoint: _LeapfrogMidpoint,
    diffrax.SemiImplicitEuler: _SemiImplicitEuler,
}


def make_invertible_step(
    solver: diffrax.AbstractSolver, terms: PyTree[diffrax.AbstractTerm], args: PyTree
) -> AbstractInvertibleStep:
    """Returns the step of `solver` with its inverse, or raises if there is none."""
    cls = getattr(solver, "reversal_cls", None)
    if isinstance(solver, EffectivelySymmetric) and has_explicit_tableau(solver):
        cls = _EffectivelySymmetricStep
    elif cls is None and has_backward_step(solver):
        cls = _BackwardStep
    # A subclass may make other steps.
    cls = cls or _OF_DIFFRAX.get(type(solver))
    if cls is None:
        name = type(solver).__name__
        # Suggest `Reversible(...)` of the user's own solver, if it is an explicit
        # Runge-Kutta method.
        inner = name if explicit_tableau(solver) is not None else "Tsit5"
        msg = (
            f"`nodegrad.ReversibleAdjoint` needs a solver whose steps can be undone, "
            f"and those of `{name}` cannot. Use `nodegrad.Reversible({inner}())`, "
            "`nodegrad.ALF()`, `diffrax.ReversibleHeun()`, "
            "`diffrax.SemiImplicitEuler()` or `diffrax.LeapfrogMidpoint()`; write a "
            "method `backward_step` (see `nodegrad.AbstractReversibleSolver`); or keep "
            "the solver and use `nodegrad.ACAAdjoint()`."
        )
        raise TypeError(msg)
    return cls(solver, terms, args)
