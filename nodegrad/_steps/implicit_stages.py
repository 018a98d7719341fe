r"""Pulls a step of a diagonally implicit Runge-Kutta method back, without iterations.

With stages $k_i = u f_i$, $f_i = f(t_i, Y_i)$, $Y_i = y_0 + \sum_{j \le i} a_{ij} k_j$
and the control $u = t_1 - t_0$, the step is $y_1 = y_0 + \sum_i b_i k_i$. The solver
finds the stages by iteration. Once they are known, the implicit function theorem gives
the pullback. Let $\lambda$ be the cotangent of $y_1$, $\mu_i$ that of $Y_i$ and $J_i =
\partial_y f(t_i, Y_i)$. Then, for $i = s, \dots, 1$,

$$\lambda_i = b_i \lambda + \sum_{j>i} a_{ji} \mu_j, \qquad
  (I - u\, a_{ii} J_i)^\top w_i = u \lambda_i, \qquad
  (\mu_i, \Delta\lambda_\theta) = (\partial_{y, \theta} f_i)^\top w_i, \qquad
  \lambda_{y_0} = \lambda + \sum_i \mu_i.$$

A method that shares its last stage with the next step carries $f_s$ from step to step.
Its cotangent is added to $u \lambda_s$, and $w_1$ is that of the $f_1$ it has carried.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree, Real

from .._internal.batch import Axes, Batch, set_row
from .._internal.closure_convert import as_struct, closure_convert, Pure
from .._internal.compat import WrapTerm
from .._internal.tree import add, flatten, is_real, widest, zeros_like
from .tableau import add_weighted, stage_time, stage_weights, unstacked


def has_implicit_tableau(solver: Any, terms: PyTree, y0: PyTree[Array]) -> bool:
    """Whether a step is that of a diagonally implicit method for an ordinary equation.

    The state must be real. Methods with several tableaus (IMEX) are not among these.
    Nor are those whose root finder minimises the residual: what it leaves of it has a
    part in the derivative.
    """
    cls = type(solver)
    return (
        issubclass(cls, diffrax.AbstractDIRK)
        # A subclass with another `step` does not do what its tableau says.
        and cls.step is diffrax.AbstractDIRK.step
        and isinstance(solver.tableau, diffrax.ButcherTableau)
        and isinstance(solver.root_finder, optx.AbstractRootFinder)
        and type(terms) is WrapTerm
        and type(terms.term) is diffrax.ODETerm
        and all(is_real(y) for y in jax.tree.leaves(y0))
    )


class ImplicitStages:
    """A step of one solve; `closure_convert` makes the form that works for a batch.

    - `tableau`: that of the method.
    - `step`: a function from `(t0, t1, y0, replay_state)` to `(y1, replay_state1,
      dense_info)`, as in `SolverStep`.
    - `field`: a function from `(t0, t1, t, y)` to the control and $f(t, y)$.
    - `dense`: whether to return the dense information.
    """

    def __init__(
        self,
        tableau: diffrax.ButcherTableau,
        step: Callable[..., PyTree],
        field: Callable[..., PyTree[Array]],
        dense: bool,
    ):
        """Stores the arguments; see the class."""
        self.tableau = tableau
        self.step = step
        self.field = field
        self.dense = dense

    def __call__(self, *args: PyTree) -> PyTree:
        """Returns the results of the step."""
        y1, replay_state1, dense_info = self.step(*args)
        return y1, replay_state1, dense_info if self.dense else None

    def closure_convert(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        replay_state: PyTree,
    ) -> "tuple[list[Any], SolvedStages]":
        """Returns the arrays that the functions close over, and a function of those."""
        of_step = as_struct((t0, t1, y0, replay_state))
        consts, step = closure_convert(self.step, *of_step)
        field_consts, field = closure_convert(self.field, *as_struct((t0, t1, t0, y0)))
        # Both functions close over the same arrays. Each of these is one constant.
        places = {id(x): i for i, x in enumerate(consts)}
        for x in field_consts:
            if places.setdefault(id(x), len(consts)) == len(consts):
                consts.append(x)
        of_field = [places[id(x)] for x in field_consts]
        return consts, SolvedStages(self.tableau, step, field, of_field, self.dense)


class SolvedStages:
    """The closure-converted form of `ImplicitStages`, with the interface of `Pure`.

    - `step`, `field`: the traced functions. The first constants are those of `step`.
    - `of_field`: the places of those of `field` among all constants.
    """

    def __init__(
        self,
        tableau: diffrax.ButcherTableau,
        step: Pure,
        field: Pure,
        of_field: list[int],
        dense: bool,
    ):
        """Stores the arguments; see the class and `ImplicitStages`."""
        self.tableau = tableau
        self.step = step
        self.field = field
        self.of_field = of_field
        self.dense = dense
        #: The traced step.
        self.jaxpr = step.jaxpr

    def __call__(self, consts: list[Any], *args: PyTree) -> PyTree:
        """Returns the results of the step of one solve with these constants."""
        y1, replay_state1, dense_info = self._solved(consts, *args)
        return y1, replay_state1, dense_info if self.dense else None

    def _solved(self, consts: list[Any], *args: PyTree) -> PyTree:
        """Returns the results of the step, always with the dense information."""
        return self.step(consts[: len(self.jaxpr.constvars)], *args)

    def evaluate(
        self, batch: Batch, consts: list[Any], axes: list[Axes], args: tuple
    ) -> PyTree:
        """Returns the results for every solve of a batch, as `Pure.evaluate` does."""
        return batch.map_shared(self, consts, axes)(*args)

    def pullback(
        self,
        batch: Batch,
        consts: list[Any],
        axes: list[Axes],
        wrt: list[bool],
        args: tuple,
        spec: tuple,
    ) -> tuple[PyTree, Callable]:
        """Returns the results and their pullback, as the function `pullback` does.

        `args` are `(t0, t1, y0, replay_state)`, with all batch axes; `spec` marks which
        of them to differentiate.
        """
        solved = batch.map_shared(self._solved, consts, axes)(*args)
        y1, replay_state1, dense_info = solved
        # The axis of stages comes first here, because `scan` runs over it.
        to_front = ft.partial(jnp.moveaxis, source=len(batch.sizes), destination=0)
        ks = jax.tree.map(to_front, dense_info["k"])
        # Only a method that shares a stage has a solver state, `(first_step, f_1)`.
        t0, t1, y0, (solver_state, made_jump) = args
        shares = solver_state is not None
        # If one solve of a batch evaluates its first stage, all do (as in Diffrax).
        evaluates = jnp.any(solver_state[0] | made_jump) if shares else True

        def pull(
            ct: tuple[PyTree, PyTree, PyTree], totals: list[Any] | None = None
        ) -> tuple[list[Any], tuple[PyTree, ...]]:
            ct_y1, (ct_solver_state, _), ct_info = ct
            ct_f, ct_ks = ct_solver_state[1] if shares else zeros_like(y0), None
            ct_y0 = zeros_like(y0)
            if self.dense:
                ct_y0, ct_y1 = ct_info["y0"], add(ct_y1, ct_info["y1"])
                ct_ks = jax.tree.map(to_front, ct_info["k"])
            zeros = zeros_like(eqx.filter(consts, wrt))
            totals = list(zeros if totals is None else totals)
            pull_stage = self._pull_stage(
                batch, consts, axes, wrt, (t0, t1, y0, ks), spec[0], evaluates
            )
            times = (
                (jnp.zeros_like(t0), jnp.zeros_like(t1)) if spec[0] else (None, None)
            )
            carry = zeros_like(ks), self._constants(totals), times, ct_y1, ct_f
            rows = self._rows(jnp.result_type(t0))
            (ct_states, sums, ct_times, *_), ws = jax.lax.scan(
                pull_stage, carry, (ks, ct_ks, *rows), reverse=True
            )
            for place, total in zip(self.of_field, sums, strict=True):
                totals[place] = total
            # `y0` enters every state, and `y1`, with weight one.
            states = unstacked(ct_states, self.tableau.num_stages)
            ct_y0 = ft.reduce(add, states, add(ct_y0, ct_y1))
            # A first stage that was evaluated here does not depend on the carried one.
            carried = jax.tree.map(lambda w: jnp.where(evaluates, 0, w[0]), ws)
            ct_state = (None, carried) if shares else None
            return totals, (*ct_times, ct_y0, (ct_state, None))

        value = y1, replay_state1, dense_info if self.dense else None
        return eqx.filter(value, eqx.is_inexact_array), pull

    def _constants(self, values: list[Any]) -> list[Any]:
        """Returns those of `values`, one for each constant, that belong to `field`."""
        return [values[place] for place in self.of_field]

    def _pull_stage(
        self,
        batch: Batch,
        consts: list[Any],
        axes: list[Axes],
        wrt: list[bool],
        step: tuple,
        wrt_time: bool,
        evaluates: Any,
    ) -> Callable[[tuple, tuple], tuple[tuple, PyTree[Array]]]:
        """Returns the body of the loop over the stages, from last to first.

        `step` is `(t0, t1, y0, ks)`, with stages `(stages, *batch, *y)`. The carry is
        `(ct_states, sums, ct_times, ct_y1, ct_f)`: of all $Y_i$ (zero for those that
        the loop has not reached), of constants of `field`, of `(t0, t1)`, of $y_1$, and
        of $f_i$ as the carried stage. The body also returns $w_i$.
        """
        t0, t1, y0, ks = step
        constants = self._constants(consts), self._constants(axes)
        solve = batch.map_shared(self._solve_stage, *constants)

        def stage(carry: tuple, inputs: tuple) -> tuple[tuple, PyTree[Array]]:
            ct_states, sums, ct_times, ct_y1, ct_f = carry
            k, ct_k, index, row, column, diagonal, b, c = inputs
            y = jax.tree.map(ft.partial(add_weighted, row), y0, ks)
            t = stage_time(c, t0, t1)
            weighted = jax.tree.map(lambda ct: b.astype(ct.dtype) * ct, ct_y1)
            ct_k = weighted if ct_k is None else add(weighted, ct_k)
            ct_k = jax.tree.map(ft.partial(add_weighted, column), ct_k, ct_states)
            w, ct_control = solve(t0, t1, t, y, k, ct_k, ct_f, diagonal)
            used = evaluates | (index > 0)
            ct_field = ct_control, jax.tree.map(lambda w: jnp.where(used, w, 0), w)
            at, spec = (t0, t1, t, y), (wrt_time, wrt_time, wrt_time, True)
            _, pull = self.field.pullback(
                batch, *constants, self._constants(wrt), at, spec
            )
            sums, (ct_t0, ct_t1, ct_t, ct_state) = pull(ct_field, sums)
            if wrt_time:
                # The stage time is `(1 - c) * t0 + c * t1`.
                new = ct_t0 + (1 - c) * ct_t, ct_t1 + c * ct_t
                ct_times = add(ct_times, new)
            ct_states = set_row(ct_states, index, ct_state)
            return (ct_states, sums, ct_times, ct_y1, zeros_like(ct_f)), w

        return stage

    def _solve_stage(
        self,
        consts: list[Any],
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        t: Real[Array, ""],
        y: PyTree[Array],
        k: PyTree[Array],
        ct_k: PyTree[Array],
        ct_f: PyTree[Array],
        diagonal: Float[Array, ""],
    ) -> tuple[PyTree[Array], Real[Array, ""]]:
        r"""Returns $w_i$ of one solve, and the cotangent of the control.

        `ct_k` and `ct_f` are the cotangents of $k_i$ and of $f_i$ through all later
        uses of them; `diagonal` is $a_{ii}$.
        """
        dtype = widest([y.dtype for y in jax.tree.leaves(y)])
        flat = lambda tree: flatten(tree, dtype)[0]
        _, unflatten = flatten(y, dtype)

        def field(y: Float[Array, " n"]) -> tuple[Array, Array]:
            control, f = self.field(consts, t0, t1, t, unflatten(y))
            return flat(f), control

        jacobian, control = jax.jacfwd(field, has_aux=True)(flat(y))  # (n, n), ()
        u = control.astype(dtype)
        scale = u * diagonal.astype(dtype)
        matrix = jnp.eye(len(jacobian), dtype=dtype) - scale * jacobian
        w = jnp.linalg.solve(matrix.T, u * flat(ct_k) + flat(ct_f))
        # $f_i$ is $k_i / u$. The whole cotangent of $k_i$, with the part through $Y_i$,
        # is $w_i$ without that of $f_i$, divided by $u$.
        # (The square of $u$ would underflow in float32 for steps of 1e-20.)
        ct_control = (w - flat(ct_f)) @ (flat(k) / u) / u
        return unflatten(w), ct_control.astype(control.dtype)

    def _rows(self, dtype: Any) -> tuple[Any, ...]:
        """Returns, for each stage: index, row and column, diagonal, weight, and node.

        The column, of weights of the stage in later ones, is without the diagonal.
        Times have type `dtype`.
        """
        tableau, num = self.tableau, self.tableau.num_stages
        lower, diagonal = stage_weights(tableau, num), np.asarray(tableau.a_diagonal)
        first = 0.0 if tableau.c1 is None else tableau.c1
        nodes = jnp.asarray(np.concatenate([[first], tableau.c]), dtype)
        weights = lower + np.diag(diagonal), lower.T, diagonal, tableau.b_sol
        return np.arange(num), *map(jnp.asarray, weights), nodes
