r"""The length of a step from a quadratic model of the loss: no learning rate.

A step is a combination $\delta = \sum_i c_i d_i$ of few directions: a preconditioned
mean of gradients, and the step before. With the gradient $g$ and the curvature $C$ of
the batch, the coefficients minimise

$$m(c) = b^\top c + \tfrac{1}{2} c^\top (Q + \lambda N)\, c, \quad
  b_i = \langle d_i, g \rangle, \quad Q_{ij} = d_i^\top C\, d_j, \quad
  N_{ij} = \langle d_i, d_j \rangle.$$

Where the parameters scatter around their mean too far, the slope of the mean of
gradients counts less, see `Progress`.

$Q$ comes from values of the loss at the ends of the directions, and $\lambda$ from how
well the model predicted the loss. Martens and Grosse (2015, sections 6 and 7;
arXiv:1503.05671) take the Gauss-Newton matrix for $C$. The loss has some advantages:
$Q$ costs three evaluations, and is right for steps as long as the last one. On the
tasks in `docs/training.md` the steps were as good or better.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._internal.norms import dot
from .._internal.tree import at_least_float32
from .preconditioner import eigh, Scalar


# Martens and Grosse (section 6.5) take 0.95 for both. The first one brings a damping
# that dominates the curvature to its size in a few steps. (Then the loss falls by up to
# twice what the model predicts.) With 0.5 and 0.85 losses ended higher.
_SHRINK_FAST, _SHRINK = 0.7, 0.95
# In units of the curvature along the direction, which has the unit of the loss. (On the
# tasks of docs/training.md it is 1 to 10 times the mean of the moments.) Where the loss
# jumps, no damping makes the model right: without a bound it grew by eleven orders of
# magnitude, and no step led out. The characters of docs/reproduction.md need 30: with a
# tenth of that nothing is learned.
_FIRST_DAMPING, _GREATEST_DAMPING = 0.3, 300.0
# A step that raises the loss is not taken, and the next one is much shorter.
_GROW_AFTER_FAILURE, _SHORTEN_AFTER_FAILURE = 4.0, 0.25
# Otherwise a single step says little about the length of the next one.
_LENGTH_CHANGE = 0.1, 10.0
# A loss with adaptive solves jumps where a solve takes one step more or less. A model
# fitted to such a jump has a huge curvature: the steps before it become shorter and
# shorter, and none crosses it. So the loss may rise by this part, and the directions
# stay so long that their slopes make at least this part. Without both, the fit of a
# damped oscillator in float32 ends at 1e-4 and not at 2e-5.
_NOISE = 0.01
# Eigenvalues below this share of the largest one count as zero.
_RANK = 1e-6
# Running means are those of the last sixth of the steps, and of at most ten.
_RATE, _PART = 0.1, 5
# The loss before is a mean over so many first steps.
_FIRST = 10
# With an excess above this part of the fall, slopes count less. With whole slopes it is
# 0.03 on the circles and moons of docs/training.md, and several times as large on
# CIFAR-10 in batches of 64, where they fail.
_EXCESS = 0.03
# In the first steps there is no fall yet, and the excess is mostly noise.
_LEAST = 0.15


class Step(NamedTuple):
    """A combination of directions.

    - `update`: the combination, a tree like the parameters.
    - `coefficients`: those of the directions.
    - `predicted`: the change of the loss of the batch in the model.
    """

    update: PyTree[Array]
    coefficients: Float[Array, " k"]
    predicted: Float[Array, ""]


class Progress(NamedTuple):
    r"""How far the loss fell, and how far the parameters scatter around their mean.

    The direction comes from the gradient of a batch, and so does the slope along it.
    Both have the noise of this batch, and the step that is best for it is too long for
    all others. So the parameters $w$ scatter around their running mean $\bar w$. For a
    quadratic loss with its minimum at $\bar w$ this costs

    $$L(w) - L(\bar w) = \tfrac{1}{2} \langle \nabla L(w),\, w - \bar w \rangle,$$

    which the gradient of any later batch estimates without bias, for one inner product.
    While the loss falls steadily, $\bar w$ lags behind, and this is negative. A mean
    moves fastest with long steps, and a small excess does it no harm. A large excess
    does: the gradients at $w$ are not those at $\bar w$ then.

    - `average`: $\bar w$.
    - `excess`: the running mean of the excess.
    - `level`: the running mean of the loss of the batches.
    - `start`: the mean loss of the first ten batches.
    """

    average: PyTree[Array]
    excess: Float[Array, ""]
    level: Float[Array, ""]
    start: Float[Array, ""]


def inner(left: PyTree[Array], right: PyTree[Array]) -> Float[Array, ""]:
    """Returns the inner product of two trees, summed in float32 or wider."""
    as_better = lambda x: x.astype(at_least_float32(x.dtype))
    return dot(jax.tree.map(as_better, left), jax.tree.map(as_better, right))


def products(
    left: Sequence[PyTree[Array]], right: Sequence[PyTree[Array]]
) -> Float[Array, "k k"]:
    """Returns the matrix of the inner products of the trees of two lists."""
    return jnp.stack([jnp.stack([inner(x, y) for y in right]) for x in left])


def curvature_in(
    directions: Sequence[PyTree[Array]],
    slopes: Float[Array, " k"],
    objective: Callable[[PyTree], Array],
    value: Float[Array, ""],
    params: PyTree[Array],
) -> Float[Array, "k k"]:
    """Returns $Q$ from the values of `objective` at the ends of `directions`.

    The quadratic function with this $Q$ has the value and the slopes of the objective
    at `params`, and its values at the ends of all directions and of their sums in
    pairs. It is exact for a quadratic objective.
    """
    k = len(directions)
    first, second = jnp.triu_indices(k, 1)
    units = jnp.eye(k)
    # (k (k + 1) / 2, k): the coefficients of the points.
    points = jnp.concatenate([units, units[first] + units[second]])

    def at(point: Float[Array, " k"]) -> Array:
        return objective(jax.tree.map(jnp.add, params, combined(point, directions)))

    change = jax.vmap(at)(points) - value
    mixed = change[k:] - change[first] - change[second]
    matrix = jnp.zeros((k, k), change.dtype).at[first, second].set(mixed)
    # The rounding of the values counts as curvature: it makes steps short.
    diagonal = 2 * (change[:k] - slopes.astype(change.dtype)) + _rounding(value)
    return matrix + matrix.T + jnp.diag(diagonal)


def combined(
    coefficients: Float[Array, " k"], directions: Sequence[PyTree[Array]]
) -> PyTree[Array]:
    """Returns the sum of `directions` with `coefficients`."""

    def of_leaves(*leaves: Array) -> Array:
        total = jnp.zeros_like(leaves[0])
        for c, x in zip(coefficients, leaves, strict=True):
            total = total + c.astype(x.dtype) * x
        return total

    return jax.tree.map(of_leaves, *directions)


def best_step(
    directions: Sequence[PyTree[Array]],
    slopes: Float[Array, " k"],
    trust: Float[Array, ""],
    curvature: Float[Array, "k k"],
    damping: Float[Array, ""],
    momentum: Scalar | None,
) -> Step:
    r"""Returns the combination of `directions` that minimises the quadratic model.

    `slopes` is $b$, `curvature` is $Q$ and `damping` $\lambda$. The minimum is that of
    the model with the slopes times `trust`, see `Progress`. The predicted change is
    that with the slopes themselves.

    If `momentum` is a number, the last direction is the step before. It has none of the
    noise of this batch, and keeps its slope. Its coefficient is kept in
    `[0, momentum]`: without a bound a model of one batch takes any combination that
    fits it.
    """
    dtype = slopes.dtype
    overlaps = products(directions, directions)
    matrix = curvature.astype(dtype) + damping.astype(dtype) * overlaps
    # A direction of negative curvature is followed as far as one of positive curvature.
    matrix = _absolute(matrix)
    fresh = slopes.size if momentum is None else slopes.size - 1
    steady = slopes.at[:fresh].multiply(trust.astype(dtype))
    coefficients = -_solve(matrix, steady)
    if momentum is not None:
        last = jnp.clip(coefficients[-1], 0, jnp.asarray(momentum).astype(dtype))
        rest = -_solve(matrix[:-1, :-1], steady[:-1] + matrix[:-1, -1] * last)
        coefficients = jnp.append(rest, last)
    predicted = coefficients @ (slopes + matrix @ coefficients / 2)
    return Step(combined(coefficients, directions), coefficients, predicted)


def curvature_scale(
    scale: Float[Array, ""],
    curvature: Float[Array, "k k"],
    directions: Sequence[PyTree[Array]],
    value: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the curvature along the first direction, followed slowly.

    `scale` is the one before, or zero. It changes by a factor of two at most: where the
    loss jumps, the curvature of one batch is of another order. It stays where the
    curvature is negative, unless there was none before, or where the direction is so
    short that its curvature is lost in the rounding of the loss.
    """
    size = jnp.where(scale > 0, curvature[0, 0], jnp.abs(curvature[0, 0]))
    is_known = size > 10 * _rounding(value)
    squared = inner(directions[0], directions[0]).astype(scale.dtype)
    along = size.astype(scale.dtype)
    along = along / jnp.where(squared > 0, squared, jnp.nan)
    near = jnp.where(scale > 0, jnp.clip(along, scale / 2, 2 * scale), along)
    return jnp.where(is_known & jnp.isfinite(along), near, scale)


def first_damping(
    damping: Float[Array, ""], scale: Float[Array, ""], is_refreshed: Bool[Array, ""]
) -> Float[Array, ""]:
    """Returns the damping, or the first one if there was none before.

    Before the first refresh there is none: the direction has another length then.
    """
    is_first = is_refreshed & (damping == 0)
    return jnp.where(is_first, _FIRST_DAMPING * scale, damping)


def adapted_damping(
    damping: Float[Array, ""],
    scale: Float[Array, ""],
    ratio: Float[Array, ""],
    accepted: Bool[Array, ""],
) -> Float[Array, ""]:
    """Returns the damping of the next step; `scale` is that of the curvature.

    `ratio` and `accepted`: as for `damping_factor`.
    """
    factors = _SHRINK_FAST, _SHRINK, 1 / _SHRINK
    factor = damping_factor(ratio, accepted, factors)
    damping = damping * factor.astype(damping.dtype)
    least = jnp.finfo(damping.dtype).eps
    return jnp.clip(damping, least * scale, _GREATEST_DAMPING * scale)


def damping_factor(
    ratio: Float[Array, ""],
    accepted: Bool[Array, ""],
    factors: tuple[float, float, float],
) -> Float[Array, ""]:
    """Returns the factor of a damping, by the rule of Levenberg and Marquardt.

    `factors` are those where the loss fell by more than 5/4 or 3/4 of what the model
    predicted, and by less than 1/4. `ratio` is the change of the loss over its
    prediction, NaN if no decrease was predicted; then the damping stays.
    """
    # All comparisons with NaN are false.
    cases = [ratio > 1.25, ratio > 0.75, ratio < 0.25]
    factor = jnp.select(cases, list(factors), 1.0)
    return jnp.where(accepted, factor, _GROW_AFTER_FAILURE)


def ratio_of(
    actual: Array, predicted: Array, value: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the change of the loss over its prediction.

    It is NaN if no decrease was predicted, or one that is lost in the rounding of the
    loss.
    """
    return actual / jnp.where(predicted < -_rounding(value), predicted, jnp.nan)


def noise(value: Float[Array, ""]) -> Float[Array, ""]:
    """Returns how much the loss may jump."""
    return _NOISE * jnp.abs(value)


def _rounding(value: Float[Array, ""]) -> Float[Array, ""]:
    """Returns what rounding may change in differences of the loss."""
    return 4 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def length_growth(
    coefficients: Float[Array, " k"],
    slopes: Float[Array, " k"],
    value: Float[Array, ""],
    accepted: Bool[Array, ""],
) -> Float[Array, " k"]:
    """Returns the factors by which the directions of the next step are longer.

    They are the coefficients of this step, within bounds, and larger where the slope
    `slopes` along a direction is less than the noise of the loss.
    """
    least, most = _LENGTH_CHANGE
    # The mean of gradients need not descend for this batch: a coefficient is negative.
    growth = jnp.clip(jnp.abs(coefficients), least, most)
    growth = jnp.where(accepted, growth, _SHORTEN_AFTER_FAILURE)
    # Where this batch has no slope, it says nothing about the length.
    steepness = jnp.abs(slopes).astype(growth.dtype)
    growth = jnp.where(steepness > 0, growth, 1)
    steep = jnp.where(steepness > 0, steepness, jnp.inf)
    needed = noise(value).astype(growth.dtype) / steep
    # Not after a failure: on a whole set nothing else changes before the next step.
    too_short = (steepness > 0) & (needed > 1) & accepted
    return jnp.where(too_short, jnp.maximum(growth, jnp.minimum(needed, most)), growth)


def after_batch(
    progress: Progress,
    params: PyTree[Array],
    gradient: PyTree[Array],
    value: Float[Array, ""],
    count: Int[Array, ""],
) -> Progress:
    """Returns the progress with the gradient and the loss of one more batch.

    `count` is the number of batches before it. The average is not changed.
    """
    rate = _rate(count)
    excess = inner(gradient, jax.tree.map(jnp.subtract, params, progress.average)) / 2
    started = _toward(progress.start, value, 1 / (1 + count))
    return progress._replace(
        excess=_toward(progress.excess, excess, rate),
        level=_toward(progress.level, value, rate),
        start=jnp.where(count < _FIRST, started, progress.start),
    )


def after_step(
    progress: Progress, params: PyTree[Array], count: Int[Array, ""]
) -> Progress:
    """Returns the progress with the average moved to `params`, those after a step."""
    rate = _rate(count)
    move = lambda mean, x: _toward(mean, x, rate)
    return progress._replace(average=jax.tree.map(move, progress.average, params))


def _toward(mean: Array, x: Array, rate: Float[Array, ""]) -> Array:
    """Moves a running mean, in its dtype."""
    return mean + rate.astype(mean.dtype) * (x.astype(mean.dtype) - mean)


def _rate(count: Int[Array, ""]) -> Float[Array, ""]:
    return jnp.maximum(_RATE, _PART / (_PART + 1 + count))


def trust(progress: Progress) -> Float[Array, ""]:
    """Returns the factor of the slopes: 1, or less where the excess is too large."""
    excess = jnp.maximum(progress.excess, 0)
    fall = progress.start - progress.level + excess
    # Without an excess the ratio is not used.
    ratio = _EXCESS * fall / jnp.where(excess > 0, excess, 1)
    return jnp.where(excess > 0, jnp.clip(ratio, _LEAST, 1), 1)


def _scaled(matrix: Float[Array, "k k"]) -> tuple[Array, Array]:
    """Returns a symmetric matrix with a diagonal of ones or zeros, and the scales.

    Directions differ in length by orders of magnitude.
    """
    diagonal = jnp.abs(jnp.diagonal(matrix))
    scale = jnp.where(
        diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 0
    )
    scaled = matrix * jnp.outer(scale, scale)
    return (scaled + scaled.T) / 2, scale


def _absolute(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Returns the matrix with the absolute values of its (scaled) eigenvalues."""
    scaled, scale = _scaled(matrix)
    values, vectors = _finite_eigh(scaled)
    back = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return (vectors * jnp.abs(values)[None]) @ vectors.T * jnp.outer(back, back)


def _solve(
    matrix: Float[Array, "k k"], vector: Float[Array, " k"]
) -> Float[Array, " k"]:
    """Returns the solution of least norm for a positive semidefinite matrix.

    The matrix is singular if directions are parallel, or if one is zero.
    """
    scaled, scale = _scaled(matrix)
    values, vectors = _finite_eigh(scaled)
    keep = values > _RANK * jnp.max(values)
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    return scale * (vectors @ (inverse * (vectors.T @ (scale * vector))))


def _finite_eigh(matrix: Float[Array, "k k"]) -> tuple[Any, Any]:
    # LAPACK need not return for NaNs. A step of NaNs is not accepted.
    finite = jnp.all(jnp.isfinite(matrix))
    values, vectors = eigh(jnp.where(finite, matrix, 0))
    return jnp.where(finite, values, jnp.nan), vectors
