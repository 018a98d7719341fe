r"""The increment of a Runge-Kutta step, with a pullback that takes stage by stage.

With stages $k_i = f(t_0 + c_i h, Y_i)\, u$, $Y_i = y_0 + \sum_{j<i} a_{ij} k_j$ and
control $u$, the increment is $\sum_i b_i k_i$. Given its cotangent $\lambda$, and
$\mu_i$ for the cotangent of $Y_i$, for $i = s, \dots, 1$

$$\lambda_{k_i} = b_i \lambda + \sum_{j>i} a_{ji} \mu_j, \qquad
  (\mu_i, \Delta\lambda_\theta) = (f u)^* \lambda_{k_i}, \qquad
  \lambda_{y_0} = \sum_i \mu_i.$$

For some vector fields (`_stages.is_scanned`) the stages are a loop, and so is this; its
body evaluates the vector field once more. For others JAX differentiates the stages one
after another, with what it kept of their evaluation.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

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
    unstacked,
)


class Increment:
    """`(t0, t1, control, y0)` to the increment of a step, and to some of its stages.

    - `tableau`: the coefficients.
    - `product`: `(t, y, control)` to the vector field times the control.
    - `returns`: which stages: `"none"`, the `"first"`, or `"all"` of them as one array,
      with the one that is shared with the next step.
    """

    def __init__(self, tableau: Any, product: Callable, returns: str):
        self.tableau = tableau
        self.product = product
        self.returns = returns

    def __call__(self, t0, t1, control: PyTree, y0: PyTree) -> tuple[PyTree, PyTree]:
        """The increment and the stages, one after another."""
        increment, ks = self.evaluate(t0, t1, control, y0)
        return increment, self.returned(ks)

    def returned(self, ks: list[PyTree], axis: int = 0) -> PyTree[Array]:
        """What to return of the stages; `axis` is that of the stages in the array."""
        if self.returns == "none":
            return None
        return ks[0] if self.returns == "first" else stacked(ks, axis)

    def evaluate(self, t0, t1, control, y0) -> tuple[PyTree, list[PyTree]]:
        """The increment and the list of the stages."""
        product = lambda t, y: self.product(t, y, control)
        ks = stages(self.tableau, product, t0, t1, y0)
        increment = self.weighted(ks)
        if len(ks) < self.num_stages:
            ks.append(product(t1, add(y0, increment)))
        return increment, ks

    def weighted(self, ks: list[PyTree]) -> PyTree:
        r"""$\sum_i b_i k_i$."""
        return combine(self.weights[: len(ks)], ks)

    @property
    def weights(self) -> np.ndarray:
        """$b_i$, for all stages."""
        b = np.zeros(self.num_stages)
        inner = num_inner_stages(self.tableau)
        b[:inner] = self.tableau.b_sol[:inner]
        return b

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        every = self.returns == "all"
        return self.tableau.num_stages if every else num_inner_stages(self.tableau)

    def closure_convert(
        self, t0, t1, control, y0
    ) -> "tuple[list[Array], StagedIncrement]":
        """The arrays that it closes over, and a function of those."""
        del t1
        consts, product = closure_convert(self.product, *as_struct((t0, y0, control)))
        return consts, StagedIncrement(self, product)


class _Cotangents(NamedTuple):
    """What the scan over the stages carries.

    - `states`: those of all $Y_i$, zero for the stages to come.
    - `t0`, `t1`: those of the times, by way of the times of the stages.
    """

    states: PyTree[Array]
    constants: PyTree[Array]
    control: PyTree[Array]
    t0: Array
    t1: Array


class StagedIncrement:
    """A hoisted `Increment`, used as a `Pure` is."""

    def __init__(self, increment: Increment, product: Pure):
        """`product` is the hoisted vector field of `increment`."""
        self.increment = increment
        self.product = product
        #: What the vector field does.
        self.jaxpr = product.jaxpr
        #: Whether derivatives take the stages in a loop.
        self.scanned = is_scanned(increment.tableau, product.jaxpr)

    def __call__(self, consts: list[Array], *args: PyTree) -> PyTree:
        """The increment and the stages for these constants."""
        if self.scanned:
            return self.evaluate(Batch(), consts, [Axes(()) for _ in consts], args)
        product = ft.partial(self.product, consts)
        increment = self.increment
        return Increment(increment.tableau, product, increment.returns)(*args)

    def evaluate(
        self, batch: Batch, consts: list[Array], axes: list[Axes], args: tuple
    ) -> PyTree:
        """As `Pure.evaluate`. The stages are a loop, which compiles fast."""
        ks, _ = self._stages(batch, consts, axes, args)
        return self._results(batch, ks)

    def _stages(
        self, batch: Batch, consts: list[Array], axes: list[Axes], args: tuple
    ) -> tuple[PyTree, PyTree]:
        """The stages, and the states that they are evaluated at.

        Here and in the pullback stages are the first axis of all that has one.
        """
        t0, t1, control, y0 = args
        evaluate = batch.map_shared(self.product, consts, axes)
        product = lambda t, y: evaluate(t, y, control)
        tableau, num = self.increment.tableau, self.increment.num_stages
        return scanned_stages(tableau, num, product, t0, t1, y0)

    def _results(self, batch: Batch, ks: PyTree) -> tuple[PyTree, PyTree]:
        as_list = unstacked(ks, self.increment.num_stages)
        returned = self.increment.returned(as_list, len(batch.sizes))
        return self.increment.weighted(as_list), returned

    def pullback(
        self,
        batch: Batch,
        consts: list[Array],
        axes: list[Axes],
        wrt: list[bool],
        args: tuple,
        spec: tuple,
    ) -> tuple[PyTree, Callable]:
        """As `_hoist.pullback`."""
        if not self.scanned:
            return pullback(self, batch, consts, axes, wrt, args, spec)
        t0, t1, control, y0 = args
        wrt_t0, wrt_t1, wrt_control, wrt_y0 = spec
        product_spec = wrt_t0 or wrt_t1, wrt_y0, wrt_control
        ks, states = self._stages(batch, consts, axes, args)
        increment, num = self.increment, self.increment.num_stages
        a, c = coefficients(increment.tableau, num, jnp.result_type(t0))

        def stage(cts: _Cotangents, inputs):
            index, state, ct_k, a, c = inputs
            ct_k = jax.tree.map(ft.partial(add_weighted, a), ct_k, cts.states)
            t = stage_time(c, t0, t1)
            _, pull = self.product.pullback(
                batch, consts, axes, wrt, (t, state, control), product_spec
            )
            ct_consts, (ct_t, ct_state, ct_control) = pull(ct_k)
            new = _Cotangents(
                states=set_row(cts.states, index, ct_state),
                constants=add(cts.constants, ct_consts),
                control=add(cts.control, ct_control),
                t0=cts.t0 if ct_t is None else cts.t0 + (1 - c) * ct_t,
                t1=cts.t1 if ct_t is None else cts.t1 + c * ct_t,
            )
            return new, None

        def pull(ct):
            init = _Cotangents(
                states=zeros_like(states),
                constants=zeros_like(eqx.filter(consts, wrt)),
                control=zeros_like(eqx.filter(control, wrt_control)),
                t0=jnp.zeros_like(t0),
                t1=jnp.zeros_like(t1),
            )
            # Column `i` of the matrix has the weights that `k_i` has in later states.
            ct_ks = self._cotangents_of_stages(batch, *ct)
            inputs = jnp.arange(num), states, ct_ks, a.T, c
            cts, _ = jax.lax.scan(stage, init, inputs, reverse=True)
            ct_y0 = ft.reduce(add, unstacked(cts.states, num))
            ct_t0, ct_t1 = cts.t0 if wrt_t0 else None, cts.t1 if wrt_t1 else None
            return cts.constants, (ct_t0, ct_t1, cts.control, ct_y0)

        return self._results(batch, ks), pull

    def _cotangents_of_stages(
        self, batch: Batch, ct_increment: PyTree, ct_returned: PyTree
    ) -> PyTree[Array]:
        """Those that do not come by way of later stages."""
        b = self.increment.weights
        weigh = lambda ct: jnp.multiply.outer(jnp.asarray(b, ct.dtype), ct)
        ct_ks = jax.tree.map(weigh, ct_increment)
        if self.increment.returns == "none":
            return ct_ks
        if self.increment.returns == "first":
            return jax.tree.map(lambda x, ct: x.at[0].add(ct), ct_ks, ct_returned)
        axis = len(batch.sizes)
        in_front = lambda x, ct: x + jnp.moveaxis(ct, axis, 0)
        return jax.tree.map(in_front, ct_ks, ct_returned)
