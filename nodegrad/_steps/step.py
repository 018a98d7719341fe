"""Defines one step of a solver as a pure function that is cheap to differentiate.

There are two kinds of step with one interface, `AbstractStep`:

- `RungeKuttaStep` evaluates the stages of an explicit Butcher tableau directly.
  Diffrax's own `step` loops over the stages with a checkpointed loop, whose pullback
  runs the loop again. Here the stages are unrolled (or, for long tableaus, scanned),
  the first-same-as-last stage is carried forward, and a replay leaves out the stage
  that only the error estimate needs.
- `SolverStep` calls the `step` of any other Diffrax solver: implicit, stochastic,
  multistep, or a user's own.

A step is made twice. `advance` attempts it in the forward pass. `replay` makes an
accepted step again for a derivative, from `y` and the *replay state*: the part of the
solver state that it needs next to `y`.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Real

from .._internal.tree import as_arrays
from .._layers.find_products import without_statistics
from .implicit_stages import has_implicit_tableau, ImplicitStages
from .increment import Increment
from .solvers import has_backward_step, with_scan_kind
from .tableau import advance_by, combine, has_explicit_tableau, stacked, stages_alone


# Whether a step starts just after a jump of the vector field. The literal `False` means
# that no step does, which saves a `cond`.
_MadeJump = bool | Bool[Array, "..."]


class AbstractStep(eqx.Module):
    """A step of `solver`. Only the step holds the terms and `args` of a solve."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]
    terms: eqx.AbstractVar[PyTree]
    args: eqx.AbstractVar[PyTree]

    @property
    @abc.abstractmethod
    def evaluations(self) -> tuple[int, int] | None:
        """The numbers of vector field evaluations: before the solve, and per attempt.

        `None` if they are not known, as for solvers that iterate.
        """

    @abc.abstractmethod
    def start(
        self, t0: Real[Array, ""], t1: Real[Array, ""], y0: PyTree[Array]
    ) -> PyTree:
        """Returns the solver state before the first step, from `t0` to `t1`."""

    @abc.abstractmethod
    def replay_state(self, solver_state: PyTree, made_jump: _MadeJump | None) -> PyTree:
        """Returns the part of the solver state that a replay needs, next to `y`.

        `made_jump` is `None` if `solver_state` is a tangent or a cotangent.
        """

    @abc.abstractmethod
    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        """Returns `solver_state` with that part replaced."""

    @abc.abstractmethod
    def replay_state_at(self, replay_state: PyTree, made_jump: _MadeJump) -> PyTree:
        """Returns `replay_state` with its jump flag, if any, set to `made_jump`."""

    @abc.abstractmethod
    def advance(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        solver_state: PyTree,
        made_jump: _MadeJump,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], PyTree, Any]:
        """Attempts the step of one solve, as `diffrax.AbstractSolver.step` does.

        Returns `(y1, y_error, dense_info, solver_state1, result)`. `result` is an item
        of `diffrax.RESULTS`, for which type checkers have no type.
        """

    @abc.abstractmethod
    def parts(self, dense: bool) -> dict[str, Callable]:
        """Returns the functions that a replay calls and that may depend on parameters.

        They are for one solve. `dense` says whether a save or an event needs the
        solution between the ends of a step.
        """

    @abc.abstractmethod
    def replay(
        self,
        evaluate: Callable[..., PyTree[Array]],
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y0: PyTree[Array],
        replay_state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Makes an accepted step again: returns `(y1, replay_state1, dense_info)`.

        `evaluate(part, key, *args)` calls a part. The rest is arithmetic that works for
        one solve and for a batch, whose arrays have the batch axes first. Without
        `dense` in `parts`, `dense_info` may be `None`.
        """


class RungeKuttaStep(AbstractStep):
    r"""A step of an explicit Runge-Kutta method with tableau $(A, b, \hat b, c)$.

    $k_i = f(t_0 + c_i h, y_0 + \sum_{j<i} a_{ij} k_j) \cdot h$ and
    $y_1 = y_0 + \sum_i b_i k_i$, where $f \cdot h$ is the product of the terms' vector
    field and control. If the last stage of a step is the first one of the next
    (`tableau.fsal`), the solver state is $f(t_0, y_0)$, otherwise `None`. The replay
    state is `None`: a replay evaluates the first stage again.
    """

    solver: diffrax.AbstractERK
    terms: PyTree
    args: PyTree

    @property
    def tableau(self) -> diffrax.ButcherTableau:
        return self.solver.tableau  # pyright: ignore[reportReturnType]

    def start(
        self, t0: Real[Array, ""], t1: Real[Array, ""], y0: PyTree[Array]
    ) -> PyTree:
        del t1
        return self.terms.vf(t0, y0, self.args) if self.tableau.fsal else None

    def replay_state(self, solver_state: PyTree, made_jump: _MadeJump | None) -> PyTree:
        # A derivative linearises the first stage, so it is evaluated again from `y0`.
        del solver_state, made_jump

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        del replay_state
        return solver_state

    def replay_state_at(self, replay_state: PyTree, made_jump: _MadeJump) -> PyTree:
        del made_jump
        return replay_state

    @property
    def evaluations(self) -> tuple[int, int] | None:
        stages = self.tableau.num_stages
        return (1, stages - 1) if self.tableau.fsal else (0, stages)

    def advance(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        solver_state: PyTree,
        made_jump: _MadeJump,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], PyTree, Any]:
        if self.tableau.fsal:
            f0 = solver_state
            if made_jump is not False:
                # The carried value is from before the jump of the vector field.
                f0 = jax.lax.cond(
                    made_jump, lambda: self.terms.vf(t0, y0, self.args), lambda: f0
                )
        else:
            f0 = None
        y1, ks, f1 = self._stages(t0, t1, y0, f0)
        # `RK4` has no error estimate, and says so with zeros.
        if np.any(self.tableau.b_error):
            y_error = combine(self.tableau.b_error, ks)
        else:
            y_error = None
        dense_info = dict(y0=y0, y1=y1, k=stacked(ks))
        return y1, y_error, dense_info, f1, diffrax.RESULTS.successful

    def parts(self, dense: bool) -> dict[str, Callable]:
        if self.tableau.fsal:
            # `vf` and `prod` separately, as in `_stages`: the carried value is `vf`.
            vf = lambda t, y: self.terms.vf(t, y, self.args)
            product = lambda t, y, control: self.terms.prod(vf(t, y), control)
        else:
            product = lambda t, y, control: self.terms.vf_prod(t, y, self.args, control)
        # Interpolation inside the step needs all stages, the shared one included.
        increment = Increment(self.tableau, product, "all" if dense else "none")
        return dict(control=self.terms.contr, increment=increment)

    def replay(
        self,
        evaluate: Callable[..., PyTree[Array]],
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y0: PyTree[Array],
        replay_state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        del replay_state
        control = evaluate("control", "control", t0, t1)
        increment, k = evaluate("increment", "increment", t0, t1, control, y0)
        y1 = jax.tree.map(jnp.add, y0, increment)
        return y1, None, None if k is None else dict(y0=y0, y1=y1, k=k)

    def _stages(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        f0: PyTree[Array],
    ) -> tuple[PyTree[Array], list[PyTree[Array]], PyTree[Array]]:
        """Returns `(y1, stages, f(t1, y1))`.

        For a first-same-as-last tableau `f0` is $f(t_0, y_0)$, otherwise `f0` and
        `f(t1, y1)` are `None`.
        """
        tableau, terms, args = self.tableau, self.terms, self.args
        control = terms.contr(t0, t1)

        def vf(t: Real[Array, ""], y: PyTree[Array]) -> PyTree[Array]:
            return terms.vf(t, y, args)

        if tableau.fsal:
            product = lambda t, y: terms.prod(vf(t, y), control)
            k0 = terms.prod(f0, control)
        else:
            k0 = None
            # Terms may have a faster product than `prod` of the vector field.
            product = lambda t, y: terms.vf_prod(t, y, args, control)
        ks = stages_alone(tableau, product, t0, t1, y0, k0)
        y1 = advance_by(y0, tableau.b_sol[: len(ks)], ks)
        if not tableau.fsal:
            return y1, ks, None
        # The last stage, at `(t1, y1)`, is carried to the next step as a vector field
        # value: the control of the next step differs.
        f1 = vf(t1, y1)
        return y1, [*ks, terms.prod(f1, control)], f1


class SolverStep(AbstractStep):
    """A step of any Diffrax solver, made by the `step` of that solver.

    The replay state is `(solver_state, made_jump)`: such a `step` may read all of it.

    - `jumps`: whether a step may start just after a jump of the vector field. If not,
      the solver gets the literal `False`. `diffrax.QUICSORT` takes nothing else.
    - `implicit`: whether the step is pulled back by `ImplicitStages`.
    - `run`: calls `solver.step`. It is traced once, however often the step is traced:
      for an implicit solver that takes as long as to compile it.
    """

    solver: diffrax.AbstractSolver
    terms: PyTree
    args: PyTree
    jumps: bool = eqx.field(static=True)
    implicit: bool = eqx.field(static=True)
    run: Callable = eqx.field(static=True)

    def start(
        self, t0: Real[Array, ""], t1: Real[Array, ""], y0: PyTree[Array]
    ) -> PyTree:
        # The statistics of layers are those of the steps, so `init` reports none.
        init = lambda t0, t1, y0: self.solver.init(self.terms, t0, t1, y0, self.args)
        return without_statistics(init, t0, t1, y0)

    def replay_state(self, solver_state: PyTree, made_jump: _MadeJump | None) -> PyTree:
        return solver_state, made_jump

    def with_replay_state(self, solver_state: PyTree, replay_state: PyTree) -> PyTree:
        del solver_state
        solver_state, _ = replay_state
        return solver_state

    def replay_state_at(self, replay_state: PyTree, made_jump: _MadeJump) -> PyTree:
        solver_state, _ = replay_state
        return solver_state, made_jump

    @property
    def evaluations(self) -> tuple[int, int] | None:
        # Solvers of nodegrad have an attribute, those of Diffrax do not.
        known = {
            diffrax.Euler: (0, 1),
            diffrax.ReversibleHeun: (1, 1),
            diffrax.LeapfrogMidpoint: (0, 1),
        }
        return getattr(self.solver, "evaluations", known.get(type(self.solver)))

    def advance(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        solver_state: PyTree,
        made_jump: _MadeJump,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], PyTree, Any]:
        arrays = eqx.filter((self.solver, self.terms, self.args), eqx.is_array)
        return self.run(arrays, t0, t1, y0, solver_state, made_jump)

    def parts(self, dense: bool) -> dict[str, Callable]:
        if self.implicit:
            # Its pullback evaluates the step, and does not differentiate it.
            run = self.advance
        else:
            # Diffrax's default loop over stages, "checkpointed", cannot be
            # differentiated twice; a "bounded" loop can.
            solver = with_scan_kind(self.solver, "bounded")
            run = ft.partial(_run, solver, self.terms, self.args)

        def step(
            t0: Real[Array, ""],
            t1: Real[Array, ""],
            y0: PyTree[Array],
            replay_state: PyTree,
        ) -> tuple[PyTree, PyTree, PyTree]:
            solver_state, made_jump = replay_state
            jump = made_jump if self.jumps else False
            y1, _, dense_info, solver_state, _ = run(t0, t1, y0, solver_state, jump)
            info = dense_info if dense or self.implicit else None
            return as_arrays((y1, (solver_state, made_jump), info))

        if self.implicit:
            terms, args = self.terms, self.args
            field = lambda t0, t1, t, y: (terms.contr(t0, t1), terms.vf(t, y, args))
            # Type checkers do not know that such a solver has a tableau.
            tableau: Any = getattr(self.solver, "tableau")  # noqa: B009
            return {"step": ImplicitStages(tableau, step, field, dense)}
        return {"step": step}

    def replay(
        self,
        evaluate: Callable[..., PyTree[Array]],
        t0: Real[Array, "..."],
        t1: Real[Array, "..."],
        y0: PyTree[Array],
        replay_state: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        return evaluate("step", "step", t0, t1, y0, replay_state)


def make_step(
    solver: diffrax.AbstractSolver,
    terms: PyTree,
    args: PyTree,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    y0: PyTree[Array],
    jumps: bool,
) -> AbstractStep:
    """Returns the cheapest step that computes what `solver.step` computes.

    `jumps` is whether a step may start just after a jump of the vector field.
    """
    # If `is_vf_expensive`, `vf_prod` twice is cheaper than `vf` once. Diffrax's step
    # then does without `vf`, and `RungeKuttaStep` does not.
    if has_explicit_tableau(solver) and not terms.is_vf_expensive(t0, t1, y0, args):
        # The `backward_step` of a user expects the solver state of `solver.step`. A
        # `RungeKuttaStep` has another one if stages are shared.
        step = RungeKuttaStep(solver, terms, args)
        if not (step.tableau.fsal and has_backward_step(solver)):
            return step
    implicit = has_implicit_tableau(solver, terms, y0)
    # Forward mode works through a "lax" loop, not through a "checkpointed" one.
    parts = with_scan_kind(solver, "lax"), terms, args
    _, static = eqx.partition(parts, eqx.is_array)
    # `run` holds no arrays: a static field that does would keep tracers alive.
    run = eqx.filter_jit(
        lambda arrays, *rest: _run(*eqx.combine(arrays, static), *rest)
    )
    return SolverStep(solver, terms, args, jumps, implicit, run)


def _run(
    solver: diffrax.AbstractSolver,
    terms: PyTree,
    args: PyTree,
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    y0: PyTree[Array],
    solver_state: PyTree,
    made_jump: _MadeJump,
) -> tuple[PyTree, PyTree, dict[str, PyTree], PyTree, Any]:
    """Calls `solver.step`, with the arguments that vary in a solve last."""
    return solver.step(terms, t0, t1, y0, args, solver_state, made_jump)
