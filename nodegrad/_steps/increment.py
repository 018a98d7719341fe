r"""Computes the increment of a Runge-Kutta step, and pulls it back stage by stage.

With stages $k_i = f(t_0 + c_i h, Y_i)\, u$, $Y_i = y_0 + \sum_{j<i} a_{ij} k_j$ and
control $u$, the increment is $\sum_i b_i k_i$. Let $\lambda$ be its cotangent and
$\mu_i$ that of $Y_i$. Then, for $i = s, \dots, 1$,

$$\lambda_{k_i} = b_i \lambda + \sum_{j>i} a_{ji} \mu_j, \qquad
  (\mu_i, \Delta\lambda_\theta) = (f u)^* \lambda_{k_i}, \qquad
  \lambda_{y_0} = \sum_i \mu_i.$$

If `tableau.is_scanned`, the stages are a loop, and so is this recursion. Its body
evaluates and linearises the vector field again, at the stored $Y_i$. Otherwise JAX
differentiates the unrolled stages and stores the intermediate values of all of them.

Some tableaus need two registers instead of all $k_i$ (`tableau.TwoRegisters`). With
$\delta_i$ for the cotangent of $d_i$, and $\delta_{s+1} = 0$, the recursion is then

$$\delta_i = A_{i+1} \delta_{i+1} + B_i \Bigl(\lambda + \sum_{j>i} \mu_j\Bigr), \qquad
  \lambda_{k_i} = \delta_i,$$

which stores no $\lambda_{k_i}$ and only the sum of the $\mu_j$. For EES(2,5) and a
cheap vector field this takes a third from the memory of a gradient.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._internal.batch import Axes, Batch, set_row
from .._internal.closure_convert import as_struct, closure_convert, pullback, Pure
from .._internal.tree import add, zeros_like
from .implicit_stages import ImplicitStages, SolvedStages
from .tableau import (
    add_weighted,
    coefficients,
    combine,
    is_scanned,
    num_inner_stages,
    scale_and_add,
    scanned_stages,
    stacked,
    stage_time,
    stages,
    Tableau,
    two_register_stages,
    two_registers,
    unstacked,
)


class Increment:
    """A function from `(t0, t1, control, y0)` to the increment and some stages.

    This is for one solve; `closure_convert` makes the form that works for a batch.

    - `tableau`: an explicit Butcher tableau.
    - `product`: a function from `(t, y, control)` to vector field times control.
    - `returns`: which stages to return. `"none"`, `"first"`, or `"all"`: an array with
      an axis of stages, the stage that is shared with the next step included.
    """

    def __init__(
        self,
        tableau: Tableau,
        product: Callable[..., PyTree[Array]],
        returns: Literal["none", "first", "all"],
    ):
        """Stores the arguments; see the class."""
        self.tableau = tableau
        self.product = product
        self.returns: Literal["none", "first", "all"] = returns

    def __call__(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        control: PyTree[Array],
        y0: PyTree[Array],
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Returns the increment, and the stages that `returns` asks for or `None`."""
        increment, ks = self.evaluate(t0, t1, control, y0)
        return increment, self.returned(ks)

    def returned(self, ks: list[PyTree], axis: int = 0) -> PyTree[Array]:
        """Returns what `returns` asks for of the stages `ks`.

        For `"all"` this is one array with the stages along `axis`.
        """
        if self.returns == "none":
            return None
        return ks[0] if self.returns == "first" else stacked(ks, axis)

    def evaluate(
        self,
        t0: Real[ArrayLike, ""],
        t1: Real[ArrayLike, ""],
        control: PyTree[ArrayLike],
        y0: PyTree[Array],
    ) -> tuple[PyTree[Array], list[PyTree[Array]]]:
        """Returns the increment and the list of the stages."""
        product = lambda t, y: self.product(t, y, control)
        times = jnp.asarray(t0), jnp.asarray(t1)
        ks = stages(self.tableau, product, *times, y0)
        increment = self.weighted(ks)
        # Only "all" asks for the stage that is shared with the next step.
        if len(ks) < self.num_stages:
            ks.append(product(t1, add(y0, increment)))
        return increment, ks

    def weighted(self, ks: list[PyTree]) -> PyTree:
        r"""Returns $\sum_i b_i k_i$."""
        return combine(self.weights[: len(ks)], ks)

    @property
    def weights(self) -> np.ndarray:
        """The weights $b_i$ of `num_stages` stages, an array of shape `(stages,)`."""
        # The stage that is shared with the next step has weight zero.
        b = np.zeros(self.num_stages)
        inner = num_inner_stages(self.tableau)
        b[:inner] = self.tableau.b_sol[:inner]
        return b

    @property
    def num_stages(self) -> int:
        """The number of stages to evaluate."""
        every = self.returns == "all"
        return self.tableau.num_stages if every else num_inner_stages(self.tableau)

    def closure_convert(
        self,
        t0: PyTree[Array],
        t1: PyTree[Array],
        control: PyTree[Array],
        y0: PyTree[Array],
    ) -> "tuple[list[Array], StagedIncrement]":
        """Returns the arrays that `product` closes over, and a function of those.

        The arguments are examples (or their shapes), as for the function
        `closure_convert`.
        """
        # Only `product` is traced, not all stages: the loops below call it.
        del t1
        consts, product = closure_convert(self.product, *as_struct((t0, y0, control)))
        return consts, StagedIncrement(Increment(self.tableau, product, self.returns))


class _Cotangents(NamedTuple):
    """The cotangents that are sums over the stages.

    - `constants`: of constants with `wrt`.
    - `control`: of the control.
    - `t0`, `t1`: of the times of the step, through the times of the stages.
    """

    constants: PyTree[Array]
    control: PyTree[Array]
    t0: Array
    t1: Array


class StagedIncrement:
    """The closure-converted form of an `Increment`, with the interface of `Pure`."""

    def __init__(self, increment: Increment):
        """The `product` of `increment` is closure-converted.

        So it holds no tracer: JAX keeps this object after the trace has ended.
        """
        self.increment = increment
        self.product: Any = increment.product
        #: The traced vector field.
        self.jaxpr = self.product.jaxpr
        #: Whether the stages and their pullbacks are loops.
        self.scanned = is_scanned(increment.tableau, self.jaxpr)
        inner = num_inner_stages(increment.tableau)
        #: The coefficients for two registers; `None` to use the tableau itself. A stage
        #: that is shared with the next step has no place in that form.
        self.registers = (
            two_registers(increment.tableau) if increment.num_stages == inner else None
        )

    def __call__(self, consts: list[Any], *args: PyTree) -> PyTree:
        """Returns what `Increment` returns, for one solve with these constants."""
        if self.scanned:
            return self.evaluate(Batch(), consts, [Axes(()) for _ in consts], args)
        product = ft.partial(self.product, consts)
        increment = self.increment
        return Increment(increment.tableau, product, increment.returns)(*args)

    def evaluate(
        self, batch: Batch, consts: list[Any], axes: list[Axes], args: tuple
    ) -> PyTree:
        """Returns the results for every solve of a batch, as `Pure.evaluate` does."""
        # Nothing is differentiated here, so a loop costs little and compiles fast.
        results, _ = self._results(batch, consts, axes, args)
        return results

    def _results(
        self, batch: Batch, consts: list[Any], axes: list[Axes], args: tuple
    ) -> tuple[tuple[PyTree, PyTree], PyTree[Array]]:
        """Returns what `Increment` returns, and the states $Y_i$.

        The states are arrays `(stages, *batch, *y)`. Here and in the pullback the axis
        of stages comes first, because `scan` runs over it. In what is returned it comes
        after the batch axes.
        """
        t0, t1, control, y0 = args
        evaluate = batch.map_shared(self.product, consts, axes)
        product = lambda t, y: evaluate(t, y, control)
        tableau, num = self.increment.tableau, self.increment.num_stages
        if self.registers is not None:
            _, c = coefficients(tableau, num, jnp.result_type(t0))
            increment, ks, states = two_register_stages(
                self.registers, c, product, t0, t1, y0
            )
        else:
            ks, states = scanned_stages(tableau, num, product, t0, t1, y0)
            increment = self.increment.weighted(unstacked(ks, num))
        returned = self.increment.returned(unstacked(ks, num), len(batch.sizes))
        return (increment, returned), states

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

        `args` are `(t0, t1, control, y0)`, with all batch axes; `spec` marks which of
        them to differentiate.
        """
        if not self.scanned:
            return pullback(self, batch, consts, axes, wrt, args, spec)
        t0, t1, control, _ = args
        wrt_t0, wrt_t1, wrt_control, wrt_y0 = spec
        product_spec = wrt_t0 or wrt_t1, wrt_y0, wrt_control
        results, states = self._results(batch, consts, axes, args)

        def pull_stage(
            sums: _Cotangents, c: Array, state: PyTree[Array], ct_k: PyTree[Array]
        ) -> tuple[_Cotangents, PyTree[Array]]:
            t = stage_time(c, t0, t1)
            _, pull = self.product.pullback(
                batch, consts, axes, wrt, (t, state, control), product_spec
            )
            ct_consts, (ct_t, ct_state, ct_control) = pull(ct_k)
            # The stage time is `(1 - c) * t0 + c * t1`.
            new = _Cotangents(
                constants=add(sums.constants, ct_consts),
                control=add(sums.control, ct_control),
                t0=sums.t0 if ct_t is None else sums.t0 + (1 - c) * ct_t,
                t1=sums.t1 if ct_t is None else sums.t1 + c * ct_t,
            )
            return new, ct_state

        def pull(
            ct: tuple[PyTree, PyTree], total: list[Any] | None = None
        ) -> tuple[list[Any], tuple[PyTree, ...]]:
            # Cotangents of what is not differentiated are `None`.
            start = zeros_like(eqx.filter(consts, wrt)) if total is None else total
            init = _Cotangents(
                constants=start,
                control=zeros_like(eqx.filter(control, wrt_control)),
                t0=jnp.zeros_like(t0),
                t1=jnp.zeros_like(t1),
            )
            pull_all = (
                self._pull_tableau if self.registers is None else self._pull_registers
            )
            sums, ct_y0 = pull_all(batch, pull_stage, init, states, ct)
            ct_t0, ct_t1 = sums.t0 if wrt_t0 else None, sums.t1 if wrt_t1 else None
            return sums.constants, (ct_t0, ct_t1, sums.control, ct_y0)

        return results, pull

    def _pull_tableau(
        self,
        batch: Batch,
        pull_stage: Callable,
        init: _Cotangents,
        states: PyTree[Array],
        ct: tuple[PyTree, PyTree],
    ) -> tuple[_Cotangents, PyTree[Array]]:
        """Pulls all stages back: returns the sums, which start as `init`, and `ct_y0`.

        The scan carries the cotangents of all $Y_i$, `(stages, *batch, *y)`; zero for
        those that it has not reached.
        """
        num, dtype = self.increment.num_stages, init.t0.dtype
        a, c = coefficients(self.increment.tableau, num, dtype)
        b = jnp.asarray(self.increment.weights, dtype)

        def stage(carry: tuple[PyTree, _Cotangents], inputs: tuple):
            # `a` is a column of the matrix, `(stages,)`. Stages before this one have
            # weight 0 in it, and their `ct_states` are zero as well.
            ct_states, sums = carry
            index, state, row, a, b, c = inputs
            ct_k = jax.tree.map(lambda ct: b.astype(ct.dtype) * ct, ct[0])
            ct_k = self._with_returned(ct_k, index, row, ct[1])
            ct_k = jax.tree.map(ft.partial(add_weighted, a), ct_k, ct_states)
            sums, ct_state = pull_stage(sums, c, state, ct_k)
            return (set_row(ct_states, index, ct_state), sums), None

        # Column `i` of the matrix, row `i` of `a.T`, has the weights of `k_i` in
        # the states of later stages.
        rows = self._rows(batch, ct[1])
        inputs = np.arange(num), states, rows, a.T, b, c
        carry = zeros_like(states), init
        (ct_states, sums), _ = jax.lax.scan(stage, carry, inputs, reverse=True)
        # `y0` enters every state with weight one.
        return sums, ft.reduce(add, unstacked(ct_states, num))

    def _pull_registers(
        self,
        batch: Batch,
        pull_stage: Callable,
        init: _Cotangents,
        states: PyTree[Array],
        ct: tuple[PyTree, PyTree],
    ) -> tuple[_Cotangents, PyTree[Array]]:
        """Does the same as `_pull_tableau`, by the recursion for two registers."""
        assert self.registers is not None
        num, dtype = self.increment.num_stages, init.t0.dtype
        _, c = coefficients(self.increment.tableau, num, dtype)
        a, b = (jnp.asarray(x, dtype) for x in self.registers)
        ct_increment, ct_returned = ct

        def stage(carry: tuple[PyTree, PyTree, _Cotangents], inputs: tuple):
            # `ct_d` is $A_{i+1} \delta_{i+1}$, `ct_y0` the sum of the $\mu_j$ so far.
            ct_d, ct_y0, sums = carry
            index, state, row, a, b, c = inputs
            ct_w = add(ct_increment, ct_y0)
            ct_d = jax.tree.map(ft.partial(scale_and_add, b), ct_w, ct_d)
            ct_k = self._with_returned(ct_d, index, row, ct_returned)
            sums, ct_state = pull_stage(sums, c, state, ct_k)
            ct_d = jax.tree.map(lambda ct: a.astype(ct.dtype) * ct, ct_d)
            return (ct_d, add(ct_y0, ct_state), sums), None

        none = zeros_like(ct_increment)
        rows = self._rows(batch, ct_returned)
        inputs = np.arange(num), states, rows, a, b, c
        (_, ct_y0, sums), _ = jax.lax.scan(
            stage, (none, none, init), inputs, reverse=True
        )
        return sums, ct_y0

    def _rows(self, batch: Batch, ct_returned: PyTree) -> PyTree[Array]:
        """Returns the cotangents of the stages, if all of them were returned.

        The axis of stages comes first, as the loop over them needs it.
        """
        if self.increment.returns != "all":
            return None
        axis = len(batch.sizes)
        return jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), ct_returned)

    def _with_returned(
        self, ct_k: PyTree, index: Array, row: PyTree, ct_returned: PyTree
    ) -> PyTree[Array]:
        """Adds the cotangent of stage `index` as one that was returned to `ct_k`.

        `row` is that of `_rows`.
        """
        if self.increment.returns == "all":
            return add(ct_k, row)
        if self.increment.returns == "none":
            return ct_k
        first = lambda ct_k, ct: ct_k + jnp.where(index == 0, ct, 0)
        return jax.tree.map(first, ct_k, ct_returned)


def closure_convert_part(
    part: Callable[..., PyTree], *args: PyTree
) -> tuple[list[Any], Pure | StagedIncrement | SolvedStages]:
    """Splits a part of a step into the arrays it closes over and a function of those.

    The shapes and dtypes of `args` are those that the function is traced for.
    """
    if isinstance(part, Increment | ImplicitStages):
        return part.closure_convert(*args)
    return closure_convert(part, *as_struct(args))
