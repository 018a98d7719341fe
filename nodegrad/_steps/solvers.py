"""What the steps ask of a Diffrax solver, and base classes of solvers."""

import abc
from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Bool, PyTree, Real


class AbstractReversibleSolver(diffrax.AbstractSolver):
    r"""A Diffrax solver that can undo its steps, for `nodegrad.ReversibleAdjoint`.

    A step is a map $(y_1, s_1) = \Phi(y_0, s_0)$ of the state and the solver state. A
    reversible solver knows a map $\Phi^{-1}$ with
    $\Phi^{-1}(\Phi(y_0, s_0)) = (y_0, s_0)$, exactly or up to a small defect. The
    adjoint reconstructs the states with `backward_step`, and differentiates `step` at
    the reconstructed ones. So the gradient is as exact as the inverse: the relative
    error of a gradient is of the order of `stats["reconstruction_error"]`, which
    `nodegrad.ReversibleAdjoint(check=True)` measures.

    To write one, subclass this class and implement `backward_step` next to what
    `diffrax.AbstractSolver` asks for. Any other Diffrax solver with a method
    `backward_step` of this signature is accepted as well, without this base class.

    **Example:**

    ```python
    import diffrax
    import numpy as np
    import jax.numpy as jnp
    import nodegrad


    class Verlet(nodegrad.AbstractReversibleSolver):
        term_structure = (diffrax.ODETerm, diffrax.ODETerm)
        interpolation_cls = diffrax.LocalLinearInterpolation
        order = lambda self, terms: 2
        init = lambda self, terms, t0, t1, y0, args: None
        func = lambda self, terms, t0, y0, args: y0

        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            (q, p), h, (velocity, force) = y0, t1 - t0, terms
            q = q + h / 2 * velocity.vf(t0, p, args)
            p = p + h * force.vf(t0 + h / 2, q, args)
            y1 = q + h / 2 * velocity.vf(t1, p, args), p
            return y1, None, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

        def backward_step(self, terms, t0, t1, y1, args, ts_state, state, made_jump):
            # The method is symmetric: its inverse is a step of size -h.
            y0, *_ = self.step(terms, t1, t0, y1, args, state, made_jump)
            return y0, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful


    velocity = diffrax.ODETerm(lambda t, p, args: p)
    force = diffrax.ODETerm(lambda t, q, args: -jnp.sin(q))
    sol = diffrax.diffeqsolve(
        (velocity, force), Verlet(), 0.0, 2.0, 0.1, (jnp.array(1.0), jnp.array(0.0)),
        adjoint=nodegrad.ReversibleAdjoint(check=True),
    )
    print(sol.stats["reconstruction_error"] < 1e-5)  # True
    ```

    **Arguments:** those that the subclass defines.

    Two attributes are optional:

    - `resync_every`: an integer `K`, or `None`. The backward pass of
      `nodegrad.ReversibleAdjoint` continues from the exact state and solver state
      before every `K`-th step. It stores 32 of them at most, and computes the others
      again from these. The error of the inverse then accumulates over `K` steps only.
      Without the attribute nothing is stored.
    - `resyncs_at_jumps`: whether a step after a jump of the vector field discards a
      part of the solver state, such as a stored evaluation. The state before each jump
      is then stored. Without the attribute this is `True`, which is always safe. A
      solver without a solver state may set it to `False`.

    **Raises:** `nodegrad.ReversibleAdjoint` refuses the gradient if a reconstructed
    state differs from a known one by more than a relative $10^{-3}$, and if
    `backward_step` returns another result than `diffrax.RESULTS.successful`.

    **Cost:** for each accepted step of a gradient, one `backward_step`, one `step` and
    the pullback of it. `nodegrad.Reversible` and `nodegrad.ALF` share the evaluations
    of the first two.

    **When not to use it:** for implicit methods whose equations may have no solution
    backwards in time.
    """

    @abc.abstractmethod
    def backward_step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y1: PyTree,
        args: PyTree,
        ts_state: PyTree[Real[Array, ""]],
        solver_state: PyTree,
        made_jump: bool | Bool[Array, ""],
    ) -> tuple[PyTree, dict[str, PyTree], PyTree, Any]:
        """Undoes a step: returns `(y0, dense_info, solver_state0, result)`.

        **Arguments:**

        - `terms`, `args`: as for `step`.
        - `t0`, `t1`: the start and the end of the step to undo, as `step` got them.
        - `y1`, `solver_state`: the state and the solver state after the step.
        - `ts_state`: the tuple of one time, the start of the previous step (`t0` if
          there is none), for methods that use it.
        - `made_jump`: `False`. A step that starts at a jump is not undone if
          `resyncs_at_jumps`, and otherwise the jump makes no difference.

        **Returns:** the state and the solver state before the step; the `dense_info`
        of the step, which `nodegrad.ReversibleAdjoint` does not use; and an item of
        `diffrax.RESULTS`.
        """


class DelegatingSolver(diffrax.AbstractWrappedSolver):
    """A base class for solvers that delegate all but the step to a wrapped solver."""

    @property
    def term_structure(self):
        return self.solver.term_structure

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree[diffrax.AbstractTerm]):
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[diffrax.AbstractTerm]):
        return self.solver.error_order(terms)

    def func(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Real[Array, ""],
        y0: PyTree,
        args: PyTree,
    ) -> PyTree:
        return self.solver.func(terms, t0, y0, args)


def has_backward_step(solver: Any) -> bool:
    """Returns whether `solver` can undo its steps by itself."""
    return callable(getattr(solver, "backward_step", None))


def with_scan_kind(solver: Any, kind: str) -> Any:
    """Returns `solver` with the given `scan_kind`, also in the solvers that it wraps.

    A `scan_kind` that the user chose stays. Solvers without one are returned as they
    are. `solver` is any object that may be a solver, so it has no narrower type.
    """
    if isinstance(getattr(solver, "solver", None), diffrax.AbstractSolver):
        inner = with_scan_kind(solver.solver, kind)
        solver = eqx.tree_at(lambda s: s.solver, solver, inner)
    # `issubclass`, as `isinstance` is also true of a wrapper around such a solver.
    if issubclass(type(solver), diffrax.AbstractRungeKutta | diffrax.AbstractSRK):
        if issubclass(type(solver), diffrax.AbstractSRK):
            # Their loops over the stages are scans, which have no "bounded" kind.
            kind = "lax"
        if solver.scan_kind is None:
            solver = eqx.tree_at(
                lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None
            )
    return solver
