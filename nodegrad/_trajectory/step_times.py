r"""How the times of the accepted steps depend on the times the user gave.

A step size that the error control found is a constant of the gradient, but the grid as
a whole still moves with `t0`, `t1`, and any time at which a step was made to end. Step
`i` runs from $s_i$ to $e_i = s_i + h_i$ with $s_{i+1} = e_i$, and $h_i$ has one of
three origins:

- **ratio**: $h_i = \rho\, h_{i-1}$, the controller's constant factor times the size
  before (the one proposed at the start for $i = 0$);
- **anchor**: $h_i = q\,(A - s_i)$, the step was clipped to end at the time $A$
  ($q = 1$; $q < 1$ if that attempt was rejected and shrunk);
- **constant**: $h_i$ was clipped to `dtmin` or `dtmax`.

These are the derivatives that Diffrax's default adjoint takes. The three classes here
differ in what their anchors are.
"""

import abc
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Real

from .._internal.compat import nondifferentiable, prevbefore


RATIO, CONSTANT, FIRST_ANCHOR = 0, 1, 2


class StepTimes(eqx.Module):
    """When a step was made, and what its times are computed from.

    - `origin`: where its size comes from.
    - `previous_size`: the size of the step before, as the controller saw it.
    - `previous_start`: where the step before started, or this one if it is the first.
    - `step_offset`: the steps of an earlier solve that this one continues.
    """

    index: Int[Array, "..."]
    start: Real[Array, "..."]
    end: Real[Array, "..."]
    made_jump: Bool[Array, "..."]
    origin: Int[Array, "..."]
    previous_size: Real[Array, "..."]
    previous_start: Real[Array, "..."]
    step_offset: Int[Array, "..."]


class AbstractGrid(eqx.Module):
    """Where the steps of a solve end, and which times that depends on."""

    anchors: eqx.AbstractVar[Real[Array, " anchors"]]

    @abc.abstractmethod
    def end(self, index: Int[Array, ""], first_end: Real[Array, ""]) -> Array:
        """The end of step `index`, where it is known without writing it down."""

    @property
    def origin_dtype(self) -> Any:
        """The type in which origins of sizes are written down; `None` if not needed."""
        return None

    def origin(
        self, tprev: Array, tnext: Array, previous_origin: Array, accepted: Array
    ) -> Int[Array, ""]:
        """The origin of the size of the step just proposed, `[tprev, tnext]`."""
        del tprev, tnext, accepted
        return previous_origin

    @abc.abstractmethod
    def origin_of(self, index: Int[Array, ""], logged: Array | None) -> Array:
        """The origin of the size of accepted step `index`."""

    @abc.abstractmethod
    def anchor_time(self, origin: Int[Array, ""], end: Real[Array, ""]) -> Array:
        """The anchor of a step that ends at `end`, as a function of `anchors`."""

    @abc.abstractmethod
    def pull_back_anchor(
        self, ct_anchors: Array, origin: Int[Array, ""], end: Array, ct: Array
    ) -> Array:
        """Adds the cotangent of that anchor to those of `anchors`."""


class AdaptiveGrid(AbstractGrid):
    """Sizes from an error estimate, clipped to `t1` and to `step_ts` and `jump_ts`.

    The ends of its steps have to be written down; those of the other grids are known.
    """

    anchors: Real[Array, " anchors"]
    ends: Real[Array, " anchors"]
    limits: list[Array]

    @property
    def origin_dtype(self):
        # The smallest integer type that can name every anchor.
        return jnp.int8 if len(self.anchors) < 120 else jnp.int32

    def origin(self, tprev, tnext, previous_origin, accepted):
        at_anchor = self.ends == tnext
        at_limit = jnp.array(False)
        for limit in self.limits:
            at_limit = at_limit | (tnext == tprev + limit)
        # A rejected attempt passes its origin on to the smaller one that follows.
        unclipped = jnp.where(accepted, RATIO, previous_origin)
        out = jnp.where(at_limit, CONSTANT, unclipped)
        anchor = FIRST_ANCHOR + jnp.argmax(at_anchor).astype(jnp.int32)
        return jnp.where(jnp.any(at_anchor), anchor, out)

    def origin_of(self, index, logged):
        del index
        assert logged is not None
        return logged.astype(jnp.int32)

    def end(self, index, first_end):
        msg = "The ends of adaptive steps have to be written down."
        raise NotImplementedError(msg)

    def anchor_time(self, origin, end):
        # A jump is stepped up to, but not onto: `ends` are where steps end, and they
        # move with `anchors`.
        del end
        index = jnp.maximum(origin - FIRST_ANCHOR, 0)
        end, moving = jax.lax.stop_gradient(self.ends[index]), self.anchors[index]
        return end + (moving - jax.lax.stop_gradient(moving))

    def pull_back_anchor(self, ct_anchors, origin, end, cotangent):
        del end
        index = jnp.maximum(origin - FIRST_ANCHOR, 0)
        return ct_anchors.at[index].add(cotangent)


class PrescribedGrid(AbstractGrid):
    """`diffrax.StepTo`: step `i` ends at `anchors[i + 1]`."""

    anchors: Real[Array, " anchors"]

    def end(self, index, first_end):
        del first_end
        return self.anchors[index + 1]

    def origin_of(self, index, logged):
        del logged
        return jnp.where(index == 0, RATIO, FIRST_ANCHOR + index + 1)

    def anchor_time(self, origin, end):
        del end
        return self.anchors[jnp.maximum(origin - FIRST_ANCHOR, 0)]

    def pull_back_anchor(self, ct_anchors, origin, end, cotangent):
        del end
        return ct_anchors.at[jnp.maximum(origin - FIRST_ANCHOR, 0)].add(cotangent)


class UniformGrid(AbstractGrid):
    """`diffrax.ConstantStepSize`: from the second step on, fractions of `[t0, t1]`."""

    anchors: Real[Array, " 2"]
    num_steps: Any

    def end(self, index, first_end):
        """The end of step `index`, computed as the controller does."""
        t0, t1 = self.anchors
        num_steps = jnp.asarray(self.num_steps)
        state = index.astype(num_steps.dtype), num_steps, t0, t1
        step = diffrax.ConstantStepSize().adapt_step_size
        _, _, end, *_ = step(t0, t1, None, None, None, None, None, state)
        return jnp.where(index == 0, first_end, jnp.minimum(end, t1))

    def origin_of(self, index, logged):
        del logged
        return jnp.where(index == 0, RATIO, FIRST_ANCHOR)

    def anchor_time(self, origin, end):
        del origin
        t0, t1 = self.anchors
        end, weight = jax.lax.stop_gradient((end, (end - t0) / (t1 - t0)))
        moving = (1 - weight) * t0 + weight * t1
        return end + (moving - jax.lax.stop_gradient(moving))

    def pull_back_anchor(self, ct_anchors, origin, end, cotangent):
        del origin
        t0, t1 = self.anchors
        weight = (end - t0) / (t1 - t0)
        return ct_anchors + cotangent * jnp.stack([1 - weight, weight])


def may_jump(controller: PyTree) -> bool:
    """Whether a step may start elsewhere than the one before it ended."""
    inner = controller
    while isinstance(inner, diffrax.ClipStepSizeController):
        if inner.jump_ts is not None:
            return True
        inner = inner.controller
    return has_unknown_jumps(controller)


def has_unknown_jumps(controller: PyTree) -> bool:
    """Whether it cannot be known where a step may start elsewhere."""
    while isinstance(controller, diffrax.ClipStepSizeController | _ConstantSizes):
        controller = controller.controller
    return not isinstance(
        controller, diffrax.StepTo | diffrax.ConstantStepSize | diffrax.PIDController
    )


class _ConstantSizes(diffrax.AbstractAdaptiveStepSizeController):
    """Any controller, with no derivative from the states it looks at."""

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

    def wrap(self, direction):
        return type(self)(self.controller.wrap(direction))  # pyright: ignore

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        y0 = jax.lax.stop_gradient(y0)
        return self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, *rest):
        y0, y1_candidate, y_error = jax.lax.stop_gradient((y0, y1_candidate, y_error))
        return self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, *rest
        )


_NOT_DIFFERENTIABLE = (
    "Step sizes are constants of a gradient taken with an adjoint of nodegrad, so "
    "there is no derivative with respect to the tolerances or other settings of a step "
    "size controller. Wrap them in `jax.lax.stop_gradient`. (Times that steps are made "
    "to end at, `StepTo(ts=...)` and the `step_ts` and `jump_ts` of "
    "`ClipStepSizeController`, are differentiable.)"
)


def without_derivatives(controller: PyTree) -> PyTree:
    """`controller`, refusing derivatives other than those of its grid's anchors."""
    if isinstance(controller, diffrax.StepTo | diffrax.ConstantStepSize):
        return controller
    if isinstance(controller, diffrax.ClipStepSizeController):
        inner = without_derivatives(controller.controller)
        return eqx.tree_at(lambda c: c.controller, controller, inner)
    controller = nondifferentiable(controller, msg=_NOT_DIFFERENTIABLE)
    if isinstance(controller, diffrax.PIDController):
        return controller  # stops its gradients itself
    return _ConstantSizes(controller)  # pyright: ignore[reportCallIssue]


def make_grid(controller: PyTree, t0: Array, t1: Array, dt0: Any) -> AbstractGrid:
    """The grid that a step size controller makes, and the times it hangs on."""
    if isinstance(controller, diffrax.StepTo):
        return PrescribedGrid(controller.ts)
    if isinstance(controller, diffrax.ConstantStepSize):
        init = controller.init
        _, (_, num_steps, *_) = init(None, t0, t1, None, dt0, None, None, None)  # pyright: ignore
        return UniformGrid(jnp.stack([t0, t1]), num_steps)
    anchors, ends = [t1[None]], [t1[None]]
    while isinstance(controller, diffrax.ClipStepSizeController):
        if controller.step_ts is not None:
            anchors.append(controller.step_ts.astype(t1.dtype))
            ends.append(anchors[-1])
        if controller.jump_ts is not None:
            anchors.append(controller.jump_ts.astype(t1.dtype))
            ends.append(prevbefore(anchors[-1]))
        controller = controller.controller
    limits = []
    if isinstance(controller, diffrax.PIDController):
        limits = [controller.dtmin, controller.dtmax]
        limits = [jnp.asarray(x, t1.dtype) for x in limits if x is not None]
    return AdaptiveGrid(jnp.concatenate(anchors), jnp.concatenate(ends), limits)


def moving_end(
    grid: AbstractGrid, times: StepTimes, start: Array, previous_size: Array
) -> Real[Array, ""]:
    """The end of a step, as a function of its start and of what else it depends on.

    The value is that of `times`, to the last bit.
    """
    stop = jax.lax.stop_gradient
    ratio, fraction = stop(_factors(grid, times))
    anchor = grid.anchor_time(times.origin, times.end)
    size = ratio * previous_size + fraction * (anchor - start)
    return times.end + (start - stop(start)) + (size - stop(size))


def pull_back_times(
    grid: AbstractGrid, ct_anchors: Array, times: StepTimes, cts: tuple
) -> tuple[Array, Array, Array]:
    """Pulls the cotangents of a step's times back to the step before.

    **Arguments:**

    - `times`: those of this step.
    - `cts`: cotangents of this step's `start`, of its `end`, of the next step's start,
      and of this step's size as the next step's size depends on it.

    **Returns:**

    The cotangents of the anchors, of `start`, and of the size of the step before.
    """
    ct_start, ct_end, ct_next_start, ct_size = cts
    ct_end = ct_end + ct_next_start
    ct_size = ct_size + ct_end
    ct_start = ct_start + ct_end
    ratio, fraction = _factors(grid, times)
    ct_anchor = fraction * ct_size
    ct_anchors = grid.pull_back_anchor(ct_anchors, times.origin, times.end, ct_anchor)
    return ct_anchors, ct_start - ct_anchor, ratio * ct_size


def _factors(grid: AbstractGrid, times: StepTimes) -> tuple[Array, Array]:
    r"""The constant factors of a step's size: the ratio $\rho$, the fraction $q$."""
    size, origin = times.end - times.start, times.origin
    is_ratio, is_anchor = origin == RATIO, origin >= FIRST_ANCHOR
    ratio = jnp.where(is_ratio, size / times.previous_size, 0)
    reach = grid.anchor_time(origin, times.end) - times.start
    return ratio, jnp.where(is_anchor, size / jnp.where(is_anchor, reach, 1), 0)
