"""One step of a solver, as a pure function that is cheap to differentiate.

Two kinds of step, one interface, `AbstractStep`:

- `RungeKuttaStep` evaluates the stages of an explicit Butcher tableau directly.
  Diffrax's own `step` loops over the stages with a checkpointed loop, which is run
  again when a step is replayed; here the stages are unrolled (or, for long tableaus,
  scanned), the first-same-as-last stage is carried forward, and a replay leaves out
  the stage that only the error estimate needs.
- `SolverStep` is any other Diffrax solver (implicit, stochastic, multistep, your own)
  through its `step` method and `solver_state`.
"""

import abc
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._internal.tree import as_arrays
from .._layers.find_products import without_statistics
from .increment import Increment
from .tableau import advance_by, combine, has_explicit_tableau, stacked, stages


class AbstractStep(eqx.Module):
    """A step of `solver`. It is the one owner of the terms and of `args`."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]
    terms: eqx.AbstractVar[PyTree]
    args: eqx.AbstractVar[PyTree]

    @property
    @abc.abstractmethod
    def evaluations(self) -> tuple[int, int] | None:
        """Vector field evaluations before the first attempt, and of each attempt.

        `None` where they are not known, as for solvers that iterate.
        """

    @abc.abstractmethod
    def start(self, t0, t1, y0: PyTree) -> PyTree:
        """The solver state before the first step."""

    @abc.abstractmethod
    def replay_state(self, solver_state: PyTree, made_jump: Any) -> PyTree:
        """The part of the solver state that a replay needs besides `y`."""

    @abc.abstractmethod
    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """`solver_state` with that part replaced."""

    @abc.abstractmethod
    def replay_state_at(self, replay_state: PyTree, made_jump: Any) -> PyTree:
        """`replay_state` for a step that does or does not start just after a jump."""

    @abc.abstractmethod
    def advance(self, t0, t1, y0: PyTree, solver_state: PyTree, made_jump: Any) -> Any:
        """As `diffrax.AbstractSolver.step`."""

    @abc.abstractmethod
    def parts(self, dense: bool) -> dict[str, Callable]:
        """The functions that a replay calls and that may depend on parameters.

        `dense` is whether anything reads between the ends of a step.
        """

    @abc.abstractmethod
    def replay(
        self, evaluate: Callable, t0, t1, y0: PyTree, replay_state: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """The accepted step again: `(y1, replay_state1, dense_info)`.

        `evaluate(part, key, *args)` calls a part. All else is arithmetic that works
        alike on one state and on a batch.
        """


class RungeKuttaStep(AbstractStep):
    r"""A step of an explicit Runge-Kutta method with tableau $(A, b, \hat b, c)$.

    $k_i = f(t_0 + c_i h, y_0 + \sum_{j<i} a_{ij} k_j) \cdot h$ and
    $y_1 = y_0 + \sum_i b_i k_i$, with $f \cdot h$ the product of the terms' vector
    field and control. The solver state is $f(t_0, y_0)$ if the last stage of one step
    is the first of the next (`tableau.fsal`), otherwise there is none.
    """

    solver: diffrax.AbstractERK
    terms: PyTree
    args: PyTree

    @property
    def tableau(self) -> diffrax.ButcherTableau:
        return self.solver.tableau  # pyright: ignore[reportReturnType]

    def start(self, t0, t1, y0):
        del t1
        return self.terms.vf(t0, y0, self.args) if self.tableau.fsal else None

    def replay_state(self, solver_state, made_jump):
        # The first stage is evaluated again, so nothing is needed.
        del solver_state, made_jump

    def with_replay_state(self, solver_state, replay_state):
        del replay_state
        return solver_state

    def replay_state_at(self, replay_state, made_jump):
        del made_jump
        return replay_state

    @property
    def evaluations(self) -> tuple[int, int] | None:
        stages = self.tableau.num_stages
        return (1, stages - 1) if self.tableau.fsal else (0, stages)

    def advance(self, t0, t1, y0, solver_state, made_jump):
        if self.tableau.fsal:
            f0 = solver_state
            if made_jump is not False:
                # The vector field is discontinuous here: the carried value is stale.
                f0 = jax.lax.cond(
                    made_jump, lambda: self.terms.vf(t0, y0, self.args), lambda: f0
                )
        else:
            f0 = None
        y1, ks, f1 = self._stages(t0, t1, y0, f0)
        if np.any(self.tableau.b_error):
            y_error = combine(self.tableau.b_error, ks)
        else:
            y_error = None
        dense_info = dict(y0=y0, y1=y1, k=stacked(ks))
        return y1, y_error, dense_info, f1, diffrax.RESULTS.successful

    def parts(self, dense):
        if self.tableau.fsal:
            # As in a step, where the last stage is the first of the next one.
            vf = lambda t, y: self.terms.vf(t, y, self.args)
            product = lambda t, y, control: self.terms.prod(vf(t, y), control)
        else:
            product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        increment = Increment(self.tableau, product, "all" if dense else "none")
        return dict(control=self.terms.contr, increment=increment)

    def replay(self, evaluate, t0, t1, y0, replay_state):
        del replay_state
        control = evaluate("control", "control", t0, t1)
        increment, k = evaluate("increment", "increment", t0, t1, control, y0)
        y1 = jax.tree.map(jnp.add, y0, increment)
        return y1, None, None if k is None else dict(y0=y0, y1=y1, k=k)

    def _stages(self, t0, t1, y0, f0):
        """`(y1, stages, f(t1, y1))`, the first stage taken from `f0` if given.

        `f(t1, y1)` is known if the tableau is first-same-as-last, and else `None`.
        """
        tableau, terms, args = self.tableau, self.terms, self.args
        control = terms.contr(t0, t1)
        if tableau.fsal:
            vf = lambda t, y: terms.vf(t, y, args)
            product = lambda t, y: terms.prod(vf(t, y), control)
            k0 = terms.prod(f0, control)
        else:
            vf, k0 = None, None
            product = lambda t, y: terms.vf_prod(t, y, args, control)
        ks = stages(tableau, product, t0, t1, y0, k0)
        y1 = advance_by(y0, tableau.b_sol[: len(ks)], ks)
        if vf is None:
            return y1, ks, None
        f1 = vf(t1, y1)
        return y1, [*ks, terms.prod(f1, control)], f1


class SolverStep(AbstractStep):
    """A step of any Diffrax solver, through its own `step`."""

    solver: diffrax.AbstractSolver
    terms: PyTree
    args: PyTree

    def start(self, t0, t1, y0):
        init = lambda t0, t1, y0: self.solver.init(self.terms, t0, t1, y0, self.args)
        return without_statistics(init, t0, t1, y0)

    def replay_state(self, solver_state, made_jump):
        return solver_state, made_jump

    def with_replay_state(self, solver_state, replay_state):
        del solver_state
        solver_state, _ = replay_state
        return solver_state

    def replay_state_at(self, replay_state, made_jump):
        solver_state, _ = replay_state
        return solver_state, made_jump

    @property
    def evaluations(self) -> tuple[int, int] | None:
        known = {
            diffrax.Euler: (0, 1),
            diffrax.ReversibleHeun: (1, 1),
            diffrax.LeapfrogMidpoint: (0, 1),
        }
        return getattr(self.solver, "evaluations", known.get(type(self.solver)))

    def advance(self, t0, t1, y0, solver_state, made_jump):
        # A loop that forward mode can pass.
        solver = with_scan_kind(self.solver, "lax")
        return solver.step(self.terms, t0, t1, y0, self.args, solver_state, made_jump)

    def parts(self, dense):
        # Diffrax's default for loops over stages cannot be differentiated twice.
        solver = with_scan_kind(self.solver, "bounded")

        def step(t0, t1, y0, replay_state):
            solver_state, made_jump = replay_state
            y1, _, dense_info, solver_state, _ = solver.step(
                self.terms, t0, t1, y0, self.args, solver_state, made_jump
            )
            out = y1, (solver_state, made_jump), dense_info if dense else None
            return as_arrays(out)

        return dict(step=step)

    def replay(self, evaluate, t0, t1, y0, replay_state):
        return evaluate("step", "step", t0, t1, y0, replay_state)


class DelegatingSolver(diffrax.AbstractWrappedSolver):
    """A solver with the terms, orders and vector field of the one that it wraps."""

    @property
    def term_structure(self):
        return self.solver.term_structure

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


def make_step(solver, terms, args, t0, t1, y0) -> AbstractStep:
    """The cheapest step that does exactly what `solver` does."""
    if has_explicit_tableau(solver) and not terms.is_vf_expensive(t0, t1, y0, args):
        return RungeKuttaStep(solver, terms, args)
    return SolverStep(solver, terms, args)


def with_scan_kind(solver: Any, kind: str) -> Any:
    """`solver`, and any solver inside it, with the given kind of loop over stages."""
    if isinstance(getattr(solver, "solver", None), diffrax.AbstractSolver):
        inner = with_scan_kind(solver.solver, kind)
        solver = eqx.tree_at(lambda s: s.solver, solver, inner)
    if issubclass(type(solver), diffrax.AbstractRungeKutta | diffrax.AbstractSRK):
        if issubclass(type(solver), diffrax.AbstractSRK):
            # These run over the stages with a scan, which knows no bounded kind.
            kind = "lax"
        if solver.scan_kind is None:
            solver = eqx.tree_at(
                lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None
            )
    return solver
