"""Directional derivatives by central differences, with an estimate of their error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .varied_solve import Loss, POINTS, synchronized


# Step sizes are relative to the parameters. The largest one is where smooth functions
# are usually still close to their Taylor expansion; the smallest one, where rounding
# errors of the loss begin to dominate.
_LARGEST, _NUM = 0.03, 8
# A difference is believed to this many times the spread of three successive ones. The
# window with the smallest of several spreads is chosen, so the spread alone is too
# optimistic.
_CAUTION = 3.0
# An error that grows by this many times more than it should shows a jump of the loss.
_LEAP = 4.0
# Errors of a loss by rounding, in units of its rounding.
_ROUNDING = 100.0


@dataclass(frozen=True)
class Estimate:
    """A derivative, and a bound on its error by rounding and truncation.

    `has_converged`: whether it is known to a tenth of itself, or to rounding. Where the
    loss varies faster than the step sizes resolve, as in chaotic problems, differences
    are meaningless, but small compared with the gradient.
    """

    value: float
    uncertainty: float
    has_converged: bool


@dataclass(frozen=True)
class Differences:
    """Central differences of the loss in one direction.

    - `leaves`: the names of the parameters that the direction moves.
    - `step_sizes`: relative to the parameters.
    - `frozen`: the differences with the step sizes of the solve held constant.
    - `adaptive`: those with step sizes that adapt; `None` if no solve adapts them.
    - `estimate`: the derivative that `frozen` converges to.
    - `adaptive_estimate`: the same for `adaptive`.
    - `is_smooth`: whether the differences look like those of a smooth function.
    - `expected`: the gradient times the direction.
    - `scale`: the size that a sum of such terms usually has.
    """

    leaves: tuple[str, ...]
    step_sizes: np.ndarray
    frozen: np.ndarray
    adaptive: np.ndarray | None
    estimate: Estimate
    adaptive_estimate: Estimate | None
    is_smooth: bool
    expected: float
    scale: float


def element_scales(params: PyTree[Array]) -> list[np.ndarray]:
    """Returns the sizes of changes of parameters that count as equally large.

    That is the absolute value of a parameter. For a zero it is a thousandth of the root
    mean square of its leaf, and 1 in a leaf of zeros. One array for each leaf.
    """

    def scales(x: Array) -> np.ndarray:
        sizes = np.abs(np.asarray(x, complex))
        typical = np.sqrt(np.mean(sizes**2)) if x.size else 0.0
        return np.where(sizes > 0, sizes, 1e-3 * typical if typical else 1.0)

    return [scales(x) for x in jax.tree.leaves(params)]


def directions(params: PyTree[Array], num: int) -> list[PyTree[Array]]:
    """Returns `num` random directions, each of which moves a part of the leaves.

    An entry of a direction is the scale of its parameter, times a number between 1/2
    and 1 with a random sign. The leaves that it does not move have entries of zero.
    """
    leaves, structure = jax.tree.flatten(params)
    scales, random = element_scales(params), np.random.default_rng(0)
    groups = min(num, len(leaves))

    def move(scale: np.ndarray) -> np.ndarray:
        # Random sizes, so that errors of two entries cannot cancel in all directions.
        sizes = random.uniform(0.5, 1.0, scale.shape)
        return scale * sizes * random.choice([-1.0, 1.0], scale.shape)

    def direction(j: int) -> PyTree[Array]:
        new = [
            jnp.asarray(move(s) if i % groups == j % groups else 0 * s, x.dtype)
            for i, (x, s) in enumerate(zip(leaves, scales, strict=True))
        ]
        return jax.tree.unflatten(structure, new)

    return [direction(j) for j in range(num)]


def step_sizes(eps: float) -> np.ndarray:
    """Returns the step sizes for a loss with the machine precision `eps`."""
    smallest = min(0.25 * eps ** (1 / 3), 0.1 * _LARGEST)
    return np.geomspace(smallest, _LARGEST, _NUM)


def make_differences(
    loss: Loss, eps: float, adaptive: bool, tolerance: float
) -> Callable[[PyTree, PyTree], Differences]:
    """Returns a function of a direction and the gradient. It compiles one program."""
    h = step_sizes(eps)

    @eqx.filter_jit
    def losses(
        params: PyTree,
        others: PyTree,
        direction: PyTree,
        hs: Float[Array, " points"],
        active: Any,
    ) -> Float[Array, " points"]:
        def at(h: Array) -> Array:
            move = lambda x, v: x + h.astype(v.real.dtype) * v
            moved = jax.tree.map(move, params, direction)
            return loss(moved, others, synchronized(active))

        return jax.vmap(at, axis_name=POINTS)(hs)

    def evaluate(direction: PyTree, active: bool) -> np.ndarray:
        hs = jnp.asarray(np.concatenate([[0.0], h, -h]))
        args = loss.params, loss.others, direction, hs, jnp.asarray(active)
        return np.asarray(losses(*args), float)

    def differences(direction: PyTree, gradient: PyTree) -> Differences:
        products = [
            np.real(np.asarray(g, complex) * np.asarray(v, complex))
            for g, v in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
        ]
        expected = float(sum(p.sum() for p in products))
        typical = float(np.sqrt(sum((p**2).sum() for p in products)))
        values = evaluate(direction, True)
        frozen, estimate = _estimate(h, values, eps)
        free, free_estimate = None, None
        if adaptive:
            free, free_estimate = _estimate(h, evaluate(direction, False), eps)
        # The estimate is NaN if solves failed at too many points.
        scale = np.nanmax([abs(estimate.value), abs(expected), typical])
        return Differences(
            leaves=_names(direction),
            step_sizes=h,
            frozen=frozen,
            adaptive=free,
            estimate=estimate,
            adaptive_estimate=free_estimate,
            is_smooth=_is_smooth(h, values, estimate, eps, tolerance * scale),
            expected=expected,
            scale=float(scale),
        )

    return differences


def _names(direction: PyTree[Array]) -> tuple[str, ...]:
    leaves, _ = jax.tree.flatten_with_path(direction)
    return tuple(
        jax.tree_util.keystr(path) or "params"
        for path, v in leaves
        if np.any(np.asarray(v) != 0)
    )


def _windows(h: np.ndarray, values: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """Returns central differences, and medians and errors of windows of three.

    `values` are the losses at 0, `h` and `-h`. Richardson's extrapolation removes the
    error of second order in `h` from two successive differences.
    """
    plus, minus = values[1 : 1 + len(h)], values[1 + len(h) :]
    central = (plus - minus) / (2 * h)
    ratio = (h[1] / h[0]) ** 2
    extrapolated = central[:-1] + (central[:-1] - central[1:]) / (ratio - 1)
    windows = np.lib.stride_tricks.sliding_window_view(extrapolated, 3)
    rounding = eps * np.nanmax(np.abs(values)) / h[: len(windows)]
    errors = _CAUTION * (np.ptp(windows, axis=-1) + rounding)
    errors = np.where(np.isfinite(errors), errors, np.inf)
    return central, np.median(windows, axis=-1), errors


def _estimate(
    h: np.ndarray, values: np.ndarray, eps: float
) -> tuple[np.ndarray, Estimate]:
    """Returns the central differences, and the derivative that they agree on best."""
    central, medians, errors = _windows(h, values, eps)
    best = int(np.argmin(errors))
    value, error = float(medians[best]), float(errors[best])
    rounding = _ROUNDING * eps * np.nanmax(np.abs(values)) / h[best]
    has_converged = error <= max(0.1 * abs(value), rounding)
    return central, Estimate(value, error, bool(has_converged))


def _is_smooth(
    h: np.ndarray, values: np.ndarray, estimate: Estimate, eps: float, limit: float
) -> bool:
    """Returns whether differences differ by no more than those of smooth functions.

    `limit` is the error of a derivative that matters.
    """
    central, medians, errors = _windows(h, values, eps)
    rounding = 4 * eps * np.nanmax(np.abs(values)) / h
    # Differences at other step sizes agree among each other, but on another value.
    apart = np.abs(medians - estimate.value) > limit + errors + estimate.uncertainty
    # From smaller step sizes to the next one, the error leaps. That of a smooth
    # function is proportional to the second power of `h`, or to the fourth.
    off = np.abs(central - estimate.value)
    so_far = np.fmax.accumulate(off + rounding)[:-1]
    most = _LEAP * (h[1] / h[0]) ** 4 * so_far
    leaps = (off[1:] > limit) & (off[1:] > most)
    # The slopes to both sides differ. They approach each other in proportion to `h`
    # if the function is smooth, and not at all if it has a kink.
    plus, minus = values[1 : 1 + len(h)], values[1 + len(h) :]
    turn = np.abs(plus - 2 * values[0] + minus) / h
    kink = (turn[:-1] > limit + 10 * rounding[:-1]) & (turn[:-1] > 0.8 * turn[1:])
    return not (apart.any() or leaps.any() or kink[:3].all())
