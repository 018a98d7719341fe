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
"""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree, Real

from .._internal.batch import Axes, Batch
from .._internal.closure_convert import as_struct, closure_convert, pullback, Pure
from .._internal.tree import add, set_row, zeros_like
from .tableau import (
    add_weighted,
    coefficients,
    combine,
    is_scanned,
    num_inner_stages,
    scanned_stages,
    stacked,
    stage_time,
    stages,
    Tableau,
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
        return consts, StagedIncrement(self, product)


class _Cotangents(NamedTuple):
    """The cotangents that the scan over the stages carries.

    - `states`: those of all $Y_i$, `(stages, *batch, *y)`; zero for those that the scan
      has not reached.
    - `constants`: the sum over the stages so far, of constants with `wrt`.
    - `control`: the same, of the control.
    - `t0`, `t1`: the same, of the times of the step, through the times of the stages.
    """

    states: PyTree[Array]
    constants: PyTree[Array]
    control: PyTree[Array]
    t0: Array
    t1: Array


class StagedIncrement:
    """The closure-converted form of an `Increment`, with the interface of `Pure`."""

    def __init__(self, increment: Increment, product: Pure):
        """`product` is the closure-converted `increment.product`."""
        self.increment = increment
        self.product = product
        #: The traced vector field.
        self.jaxpr = product.jaxpr
        #: Whether the stages and their pullbacks are loops.
        self.scanned = is_scanned(increment.tableau, product.jaxpr)

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
        ks, _ = self._stages(batch, consts, axes, args)
        return self._results(batch, ks)

    def _stages(
        self, batch: Batch, consts: list[Any], axes: list[Axes], args: tuple
    ) -> tuple[PyTree, PyTree]:
        """Returns the stages and the states $Y_i$: arrays `(stages, *batch, *y)`.

        Here and in the pullback the axis of stages comes first, because `scan` runs
        over it. In what is returned it comes after the batch axes.
        """
        t0, t1, control, y0 = args
        evaluate = batch.map_shared(self.product, consts, axes)
        product = lambda t, y: evaluate(t, y, control)
        tableau, num = self.increment.tableau, self.increment.num_stages
        return scanned_stages(tableau, num, product, t0, t1, y0)

    def _results(self, batch: Batch, ks: PyTree[Array]) -> tuple[PyTree, PyTree]:
        """Returns what `Increment` returns, from the stages `(stages, *batch, *y)`."""
        as_list = unstacked(ks, self.increment.num_stages)
        returned = self.increment.returned(as_list, len(batch.sizes))
        return self.increment.weighted(as_list), returned

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
        t0, t1, control, y0 = args
        wrt_t0, wrt_t1, wrt_control, wrt_y0 = spec
        product_spec = wrt_t0 or wrt_t1, wrt_y0, wrt_control
        ks, states = self._stages(batch, consts, axes, args)
        increment, num = self.increment, self.increment.num_stages
        a, c = coefficients(increment.tableau, num, jnp.result_type(t0))

        def stage(cts: _Cotangents, inputs: tuple[PyTree[Array], ...]):
            # `a` is a column of the matrix, `(stages,)`. Stages before this one have
            # weight 0 in it, and their `cts.states` are zero as well.
            index, state, ct_k, a, c = inputs
            ct_k = jax.tree.map(ft.partial(add_weighted, a), ct_k, cts.states)
            t = stage_time(c, t0, t1)
            _, pull = self.product.pullback(
                batch, consts, axes, wrt, (t, state, control), product_spec
            )
            ct_consts, (ct_t, ct_state, ct_control) = pull(ct_k)
            # The stage time is `(1 - c) * t0 + c * t1`.
            new = _Cotangents(
                states=set_row(cts.states, index, ct_state),
                constants=add(cts.constants, ct_consts),
                control=add(cts.control, ct_control),
                t0=cts.t0 if ct_t is None else cts.t0 + (1 - c) * ct_t,
                t1=cts.t1 if ct_t is None else cts.t1 + c * ct_t,
            )
            return new, None

        def pull(ct: tuple[PyTree, PyTree]) -> tuple[list[Any], tuple[PyTree, ...]]:
            # Cotangents of what is not differentiated are `None`.
            init = _Cotangents(
                states=zeros_like(states),
                constants=zeros_like(eqx.filter(consts, wrt)),
                control=zeros_like(eqx.filter(control, wrt_control)),
                t0=jnp.zeros_like(t0),
                t1=jnp.zeros_like(t1),
            )
            # Column `i` of the matrix, row `i` of `a.T`, has the weights of `k_i` in
            # the states of later stages.
            ct_ks = self._cotangents_of_stages(batch, *ct)
            inputs = jnp.arange(num), states, ct_ks, a.T, c
            cts, _ = jax.lax.scan(stage, init, inputs, reverse=True)
            # `y0` enters every state with weight one.
            ct_y0 = ft.reduce(add, unstacked(cts.states, num))
            ct_t0, ct_t1 = cts.t0 if wrt_t0 else None, cts.t1 if wrt_t1 else None
            return cts.constants, (ct_t0, ct_t1, cts.control, ct_y0)

        return self._results(batch, ks), pull

    def _cotangents_of_stages(
        self, batch: Batch, ct_increment: PyTree, ct_returned: PyTree
    ) -> PyTree[Array]:
        r"""Returns the part of $\lambda_{k_i}$ that does not depend on later stages.

        An array `(stages, *batch, *y)`: $b_i \lambda$, plus the cotangents of the
        stages that were returned.
        """
        b = self.increment.weights
        weigh = lambda ct: jnp.multiply.outer(jnp.asarray(b, ct.dtype), ct)
        ct_ks = jax.tree.map(weigh, ct_increment)
        if self.increment.returns == "none":
            return ct_ks
        if self.increment.returns == "first":
            return jax.tree.map(lambda x, ct: x.at[0].add(ct), ct_ks, ct_returned)
        # From `(*batch, stages, *y)` to `(stages, *batch, *y)`.
        axis = len(batch.sizes)
        in_front = lambda x, ct: x + jnp.moveaxis(ct, axis, 0)
        return jax.tree.map(in_front, ct_ks, ct_returned)


def closure_convert_part(
    part: Callable[..., PyTree], *args: PyTree
) -> tuple[list[Any], Pure | StagedIncrement]:
    """Splits a part of a step into the arrays it closes over and a function of those.

    The shapes and dtypes of `args` are those that the function is traced for.
    """
    if isinstance(part, Increment):
        return part.closure_convert(*args)
    return closure_convert(part, *as_struct(args))
