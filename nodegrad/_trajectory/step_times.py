r"""Differentiates the times of the accepted steps by the times that the user gave.

The error control's decisions are constants of the gradient, but the grid as a whole
still moves with `t0`, `t1`, and any time at which a step was made to end. Step `i` runs
from $s_i$ to $e_i = s_i + h_i$ with $s_{i+1} = e_i$, and $h_i$ has one of three
origins:

- **ratio**: $h_i = \rho\, h_{i-1}$, where $\rho$ is constant: the controller scaled the
  previous size. $h_{-1}$ is the size of the first attempt.
- **anchor**: $h_i = q\,(A - s_i)$, where $q$ is constant: the step was clipped to end
  at the time $A$ ($q = 1$), or was clipped, rejected and shrunk ($q < 1$).
- **constant**: $h_i$ was clipped to `dtmin` or `dtmax`.

These are the derivatives that Diffrax's default adjoint takes. A step is described by
its *origin*, an integer: `RATIO`, `CONSTANT`, or `FIRST_ANCHOR` plus the index of $A$
in the *anchors* of the grid. A grid class knows the anchors of one kind of controller.
"""

import abc
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real

from .._internal.compat import nondifferentiable


RATIO, CONSTANT, FIRST_ANCHOR = 0, 1, 2

# Arrays of one solve, in annotations. Indices and origins are integers.
_Bool = Bool[Array, ""]
_Int = Int[Array, ""]
_Time = Real[Array, ""]
_Anchors = Real[Array, " anchors"]


class StepTimes(eqx.Module):
    """When one step of a solve, or of every solve of a batch, was made.

    - `index`: the number of the step, from 0.
    - `made_jump`, `resync`: whether it starts after a jump, or with a chosen resync.
    - `origin`: what its size depends on; see the module.
    - `previous_size`: the size of the previous step; first, that of the first attempt.
    - `previous_start`: the start of the previous step; first, that of this one.
    - `step_offset`: the number of steps that the solver made before this solve.
    """

    index: Int[Array, "..."]
    start: Real[Array, "..."]
    end: Real[Array, "..."]
    made_jump: Bool[Array, "..."]
    origin: Int[Array, "..."]
    previous_size: Real[Array, "..."]
    previous_start: Real[Array, "..."]
    step_offset: Int[Array, "..."]
    resync: Bool[Array, "..."]


class AbstractGrid(eqx.Module):
    """Where the steps of one solve end, and which times that depends on.

    These times are `anchors`, and the start and end of the first attempt.
    """

    anchors: eqx.AbstractVar[_Anchors]
    # Whether the ends of steps can be computed, and need not be recorded.
    is_computed: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def end(self, index: _Int, first_end: _Time) -> _Time:
        """Computes the end of step `index`; raises if it must be recorded."""

    @property
    def origin_dtype(self) -> Any:
        """The dtype of recorded origins; `None` if origins need not be recorded."""
        return None

    def origin(
        self, tprev: _Time, tnext: _Time, previous_origin: _Int, accepted: _Bool
    ) -> _Int:
        """Returns the origin of the step `[tprev, tnext]` that was just proposed.

        `previous_origin` is that of the attempt before it, which was `accepted` or not.
        """
        del tprev, tnext, accepted
        return previous_origin

    @abc.abstractmethod
    def origin_of(self, index: _Int, logged: _Int | None) -> _Int:
        """Returns the origin of accepted step `index`; `logged` is the recorded one."""

    @abc.abstractmethod
    def anchor_time(self, origin: _Int, end: _Time) -> _Time:
        """Returns the anchor of a step that ends at `end`, as a function of `anchors`.

        The value has no meaning where `origin` is not that of an anchor.
        """

    def pull_back_anchor(
        self, ct_anchors: _Anchors, origin: _Int, end: _Time, cotangent: _Time
    ) -> _Anchors:
        """Returns `ct_anchors` plus the pullback of `anchor_time` at `cotangent`.

        Where `origin` is not that of an anchor, `cotangent` must be zero.
        """
        del end
        index = jnp.maximum(origin - FIRST_ANCHOR, 0)
        return ct_anchors.at[index].add(cotangent)


class AdaptiveGrid(AbstractGrid):
    """The grid of a controller that adapts step sizes, such as `PIDController`.

    Its steps are clipped to `t1`, `step_ts` and `jump_ts`. Their ends must be recorded.

    - `anchors`: those times.
    - `ends`: where a step that is clipped to each anchor ends, to the last bit.
    - `limits`: `dtmin` and `dtmax`, where the controller has them.
    """

    anchors: _Anchors
    ends: _Anchors
    limits: list[Array]
    is_computed: ClassVar[bool] = False

    @property
    def origin_dtype(self) -> Any:
        # There is one origin per recorded step, so the type is as small as it can be:
        # `int8` has room for `FIRST_ANCHOR` plus the index of one of 119 anchors.
        return jnp.int8 if len(self.anchors) < 120 else jnp.int32

    def origin(
        self, tprev: _Time, tnext: _Time, previous_origin: _Int, accepted: _Bool
    ) -> _Int:
        # The controller does not say why it chose `tnext`. It sets clipped times and
        # sizes exactly, so they are recognised by equality.
        at_anchor = self.ends == tnext
        at_limit = jnp.array(False)
        for limit in self.limits:
            at_limit = at_limit | (tnext == tprev + limit)
        # After a rejection the size is a constant times that of the rejected attempt,
        # so the origin stays the same: a ratio of a ratio is a ratio, and a part of
        # `A - s` is `q * (A - s)`. After an accepted step it is a ratio.
        unclipped = jnp.where(accepted, RATIO, previous_origin)
        out = jnp.where(at_limit, CONSTANT, unclipped)
        anchor = FIRST_ANCHOR + jnp.argmax(at_anchor).astype(jnp.int32)
        return jnp.where(jnp.any(at_anchor), anchor, out)

    def origin_of(self, index: _Int, logged: _Int | None) -> _Int:
        del index
        assert logged is not None
        return logged.astype(jnp.int32)

    def end(self, index: _Int, first_end: _Time) -> _Time:
        msg = "The ends of adaptive steps must be recorded."
        raise NotImplementedError(msg)

    def anchor_time(self, origin: _Int, end: _Time) -> _Time:
        # A step before a jump ends at the number before the time of the jump. So the
        # value is that of `ends`, and the derivative that of `anchors`.
        del end
        index = jnp.maximum(origin - FIRST_ANCHOR, 0)
        end, moving = jax.lax.stop_gradient(self.ends[index]), self.anchors[index]
        return end + (moving - jax.lax.stop_gradient(moving))


class PrescribedGrid(AbstractGrid):
    """`diffrax.StepTo`: step `i` ends at `anchors[i + 1]`."""

    anchors: _Anchors
    is_computed: ClassVar[bool] = True

    def end(self, index: _Int, first_end: _Time) -> _Time:
        del first_end
        return self.anchors[index + 1]

    def origin_of(self, index: _Int, logged: _Int | None) -> _Int:
        # The first step is the first attempt, with a ratio of one. `first_start` and
        # `first_end` carry its derivatives.
        del logged
        return jnp.where(index == 0, RATIO, FIRST_ANCHOR + index + 1)

    def anchor_time(self, origin: _Int, end: _Time) -> _Time:
        del end
        return self.anchors[jnp.maximum(origin - FIRST_ANCHOR, 0)]


class UniformGrid(AbstractGrid):
    """`diffrax.ConstantStepSize`: steps end at fixed fractions of an interval.

    - `anchors`: the ends of this interval, and the time `t1` at which the solve ends.
      The interval is `[t0, t1]`, or that of another solve that this one continues. If
      `t1` is infinite, the second number is the step size.
    - `num_steps`: how many steps there are in the interval; -1 if `t1` is infinite.
    - `nearly_t1`: a step that would end later than this ends at `t1`.
    - `is_computed`: whether the solve starts at the start of the interval.
    """

    anchors: Real[Array, " 3"]
    num_steps: Int[ArrayLike, ""]
    nearly_t1: _Time
    is_computed: bool = eqx.field(static=True)

    def end(self, index: _Int, first_end: _Time) -> _Time:
        """Computes the end of step `index` as the controller does, to the last bit.

        (Of an infinite solve up to rounding: the controller adds up step sizes.)
        """
        start, stop, t1 = self.anchors
        num_steps = jnp.asarray(self.num_steps)
        # Times stand for states here. `previous` is read only if there is no end.
        state = index.astype(num_steps.dtype), num_steps, start, stop
        previous = first_end + (index - 1).astype(stop.dtype) * stop
        step = diffrax.ConstantStepSize().adapt_step_size
        _, _, end, *_ = step(start, previous, start, start, None, None, 1, state)
        end = jnp.where(end > self.nearly_t1, t1, end)
        return jnp.where(index == 0, first_end, end)

    def origin_of(self, index: _Int, logged: _Int | None) -> _Int:
        # The first step ends at `t0 + dt0`, which is not a fraction.
        del logged
        is_ratio = (index == 0) | (jnp.asarray(self.num_steps) < 0)
        return jnp.where(is_ratio, RATIO, FIRST_ANCHOR)

    def anchor_time(self, origin: _Int, end: _Time) -> _Time:
        # The value is `end` itself, free of the rounding of this sum.
        del origin
        end = jax.lax.stop_gradient(end)
        weights = jax.lax.stop_gradient(self._weights(end))
        # An infinite `t1` has no weight, and no derivative.
        anchors = jnp.where(weights == 0, 0, self.anchors)
        moving = jnp.sum(weights * anchors)
        return end + (moving - jax.lax.stop_gradient(moving))

    def pull_back_anchor(
        self, ct_anchors: _Anchors, origin: _Int, end: _Time, cotangent: _Time
    ) -> _Anchors:
        del origin
        return ct_anchors + cotangent * self._weights(end)

    def _weights(self, end: _Time) -> Real[Array, " 3"]:
        """Returns the weights of the anchors in a step that ends at `end`.

        These are `(1 - w, w, 0)` for the fraction `w` of the interval, or `(0, 0, 1)`
        at `t1`.
        """
        start, stop, t1 = self.anchors
        size = stop - start
        fraction = (end - start) / _or_one(size)
        inside = jnp.stack([1 - fraction, fraction, jnp.zeros_like(fraction)])
        return jnp.where(end == t1, jnp.array([0, 0, 1], inside.dtype), inside)


def may_jump(controller: PyTree) -> bool:
    """Whether a step may start elsewhere than the previous step ended."""
    inner = controller
    while isinstance(inner, diffrax.ClipStepSizeController):
        if inner.jump_ts is not None:
            return True
        inner = inner.controller
    return has_unknown_jumps(controller)


def has_unknown_jumps(controller: PyTree) -> bool:
    """Whether the jump times are not known, as for controllers other than Diffrax's."""
    while isinstance(controller, diffrax.ClipStepSizeController | _ConstantSizes):
        controller = controller.controller
    return not isinstance(
        controller, diffrax.StepTo | diffrax.ConstantStepSize | diffrax.PIDController
    )


class _ConstantSizes(diffrax.AbstractAdaptiveStepSizeController):
    """Any controller, without derivatives by the states and errors that it reads."""

    controller: diffrax.AbstractStepSizeController

    @property
    def rtol(self):
        return self.controller.rtol  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def atol(self):
        return self.controller.atol  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def norm(self):
        return self.controller.norm  # pyright: ignore[reportAttributeAccessIssue]

    def wrap(self, direction: _Int):
        return type(self)(self.controller.wrap(direction))  # pyright: ignore

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        y0 = jax.lax.stop_gradient(y0)
        return self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)

    def adapt_step_size(
        self,
        t0: _Time,
        t1: _Time,
        y0: PyTree,
        y1_candidate: PyTree,
        args: PyTree,
        y_error: PyTree,
        *rest: Any,  # the error order, and the state of the wrapped controller
    ):
        y0, y1_candidate, y_error = jax.lax.stop_gradient((y0, y1_candidate, y_error))
        return self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, *rest
        )


_NOT_DIFFERENTIABLE = (
    "The adjoints of nodegrad treat step sizes as constants. There is no derivative "
    "with respect to the tolerances or other settings of a step size controller: wrap "
    "them in `jax.lax.stop_gradient`. (The times at which steps must end are "
    "differentiable: `StepTo(ts=...)`, and the `step_ts` and `jump_ts` of "
    "`ClipStepSizeController`.)"
)


def without_derivatives(controller: PyTree) -> PyTree:
    """Returns `controller`; derivatives by anything but its grid's anchors raise."""
    if isinstance(controller, diffrax.StepTo | diffrax.ConstantStepSize):
        return controller
    if isinstance(controller, diffrax.ClipStepSizeController):
        inner = without_derivatives(controller.controller)
        return eqx.tree_at(lambda c: c.controller, controller, inner)
    controller = nondifferentiable(controller, msg=_NOT_DIFFERENTIABLE)
    if isinstance(controller, diffrax.PIDController):
        # It stops the gradients of its step size factors itself.
        return controller
    return _ConstantSizes(controller)  # pyright: ignore[reportCallIssue]


def moving_end(
    grid: AbstractGrid, times: StepTimes, start: _Time, previous_size: _Time
) -> _Time:
    """Returns the end of a step, with derivatives by what it depends on.

    These are `start`, `previous_size` and the anchors of `grid`. The value is
    `times.end`, to the last bit.
    """
    # `x - stop(x)` is zero and has the derivative of `x`.
    stop = jax.lax.stop_gradient
    ratio, fraction = stop(_factors(grid, times))
    anchor = grid.anchor_time(times.origin, times.end)
    size = ratio * previous_size + fraction * (anchor - start)
    return times.end + (start - stop(start)) + (size - stop(size))


def pull_back_times(
    grid: AbstractGrid,
    ct_anchors: _Anchors,
    times: StepTimes,
    cts: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Pulls the cotangents of a step's times back to the previous step.

    `times` are those of this step. `cts` are the cotangents of its start, of its end,
    of the next step's start, and of its size as the next step's size depends on it.
    Returns `ct_anchors` plus the cotangents of this step's anchor, and the cotangents
    of this step's start and of the previous step's size.
    """
    ct_start, ct_end, ct_next_start, ct_size = cts
    # The pullbacks of `next_start = end`, of `end = start + size`, and of
    # `size = ratio * previous_size + fraction * (anchor - start)`.
    ct_end = ct_end + ct_next_start
    ct_size = ct_size + ct_end
    ct_start = ct_start + ct_end
    ratio, fraction = _factors(grid, times)
    ct_anchor = fraction * ct_size
    ct_anchors = grid.pull_back_anchor(ct_anchors, times.origin, times.end, ct_anchor)
    return ct_anchors, ct_start - ct_anchor, ratio * ct_size


def _factors(grid: AbstractGrid, times: StepTimes) -> tuple[_Time, _Time]:
    r"""Returns the constant factors of a step's size: ratio $\rho$ and fraction $q$.

    Each is 0 where the size has another origin.
    """
    size, origin = times.end - times.start, times.origin
    is_ratio, is_anchor = origin == RATIO, origin >= FIRST_ANCHOR
    reach = grid.anchor_time(origin, times.end) - times.start
    # Without an anchor `reach` has no meaning, and may be zero. In a batch a solve that
    # has ended goes on with steps of size zero.
    ratio = jnp.where(is_ratio, size / _or_one(times.previous_size), 0)
    return ratio, jnp.where(is_anchor, size / _or_one(reach), 0)


def _or_one(divisor: _Time) -> _Time:
    return jnp.where(divisor == 0, 1, divisor)
