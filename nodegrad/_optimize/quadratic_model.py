r"""The length of a step from a quadratic model of the loss: no learning rate.

A step is a combination $\delta = \sum_i c_i d_i$ of few directions: a preconditioned
mean of gradients, and the step before. With the gradient $g$ and the curvature $C$ of
the batch, the coefficients minimise

$$m(c) = b^\top c + \tfrac{1}{2} c^\top (Q + \lambda N)\, c, \quad
  b_i = \langle d_i, g \rangle, \quad Q_{ij} = d_i^\top C\, d_j, \quad
  N_{ij} = \langle d_i, d_j \rangle.$$

The slope of the mean of gradients counts as far as it is not noise of the batch, see
`Agreement`.

$Q$ comes from values of the loss at the ends of the directions, and $\lambda$ from how
well the model predicted the loss. Martens and Grosse (2015, sections 6 and 7;
arXiv:1503.05671) take the Gauss-Newton matrix for $C$. The loss has some advantages:
$Q$ costs three evaluations, and is right for steps as long as the last one. On the
tasks in `docs/training.md` the steps were as good or better.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._internal.norms import dot
from .._internal.tree import add, at_least_float32
from .preconditioner import eigh, Scalar


# Martens and Grosse (section 6.5) take 0.95 for both. The first one brings a damping
# that dominates the curvature to its size in a few steps. (Then the loss falls by up to
# twice what the model predicts.) With 0.5 and 0.85 the median loss of the discs of
# docs/training.md is 0.045 after 200 steps, and not 0.024.
_SHRINK_FAST, _SHRINK = 0.7, 0.95
# A step that raises the loss is not taken, and the next one is much shorter.
_GROW_AFTER_FAILURE, _SHORTEN_AFTER_FAILURE = 4.0, 0.25
# Otherwise a single step says little about the length of the next one.
_LENGTH_CHANGE = 0.1, 10.0
# A loss with adaptive solves jumps where a solve takes one step more or less. A model
# fitted to such a jump has a huge curvature: the steps before it become shorter and
# shorter, and none crosses it. So the loss may rise by this part, and the directions
# stay so long that their slopes make at least this part. Without both, in float32 with
# tolerances of 1e-4, the fit of a damped oscillator ends at 1e-4 and not at 2e-5.
NOISE = 0.01
# Eigenvalues below this share of the largest one count as zero.
_RANK = 1e-6
# The share of slopes that is trusted is a running mean over about ten steps, and of
# all steps at the beginning.
_RATE = 0.1
# A single ratio says little: the noise of a batch may be larger than the slope.
_RATIOS = -1.0, 2.0
# With 0.05 the circles of docs/training.md need 76 steps and not 69 to Adam's loss.
# With 0.35 CIFAR-10 in batches of 64 is classified less well, 41 % and not 45 %.
_LEAST = 0.25


class Step(NamedTuple):
    """A combination of directions.

    - `update`: the combination, a tree like the parameters.
    - `coefficients`: those of the directions.
    - `predicted`: the change of the loss of the batch in the model.
    """

    update: PyTree[Array]
    coefficients: Float[Array, " k"]
    predicted: Float[Array, ""]


class Agreement(NamedTuple):
    r"""How much of its slopes the next batch confirms. All leaves are arrays.

    A direction $d$ comes from the gradient $g$ of a batch. So the slope $b$ along it is
    steeper than that of the whole loss: both have the noise of this batch. The length
    that is best for this batch is too long for all others. The next batch, with the
    gradient $g'$, does not know this noise. With the change $q$ of the slope over the
    step, in the model of the first batch,

    $$r = \frac{\langle d, g' \rangle - q}{b}$$

    estimates the share of $b$ that is not noise, for one inner product. If all batches
    are the same and the loss is quadratic, it is one. With the slopes times $r$ the
    expected loss falls most in this step, but less in many: momentum averages noise as
    well. So a slope keeps at least a quarter.

    - `direction`: the directions of the last step, a tree like the parameters; each of
      the `parts` has its own leaves.
    - `slopes`: the slopes of the last batch along its parts, before the step.
    - `changes`: by how much the step changed them, in the model of that batch.
    - `share`: the running mean of $r$.
    """

    direction: PyTree[Array]
    slopes: Float[Array, " parts"]
    changes: Float[Array, " parts"]
    share: Float[Array, " parts"]


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
    rounding = 4 * jnp.finfo(change.dtype).eps * jnp.abs(value)
    diagonal = 2 * (change[:k] - slopes.astype(change.dtype)) + rounding
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
    trust: Float[Array, " parts"],
    curvature: Float[Array, "k k"],
    damping: Float[Array, ""],
    momentum: Scalar | None,
) -> Step:
    r"""Returns the combination of `directions` that minimises the quadratic model.

    `slopes` is $b$, `curvature` is $Q$ and `damping` $\lambda$. The minimum is that of
    the model with the first slopes times `trust`, see `Agreement`. (The step before has
    none of the noise of this batch.) The predicted change is that with the slopes
    themselves. If `momentum` is a number, the last direction is
    the step before, and its coefficient is kept in `[0, momentum]`: without a bound a
    model of one mini-batch takes any combination that fits this batch.
    """
    dtype = slopes.dtype
    overlaps = products(directions, directions)
    matrix = curvature.astype(dtype) + damping.astype(dtype) * overlaps
    # A direction of negative curvature is followed as far as one of positive curvature.
    matrix = _absolute(matrix)
    steady = slopes.at[: trust.size].multiply(trust.astype(dtype))
    coefficients = -_solve(matrix, steady)
    if momentum is not None:
        last = jnp.clip(coefficients[-1], 0, jnp.asarray(momentum).astype(dtype))
        rest = -_solve(matrix[:-1, :-1], steady[:-1] + matrix[:-1, -1] * last)
        coefficients = jnp.append(rest, last)
    predicted = coefficients @ (slopes + matrix @ coefficients / 2)

    update = combined(coefficients, directions)
    return Step(update, coefficients, predicted)


def adapted_damping(
    damping: Float[Array, ""],
    least: Float[Array, ""],
    ratio: Float[Array, ""],
    accepted: Bool[Array, ""],
) -> Float[Array, ""]:
    """Returns the damping of the next step, at least `least`.

    It falls where the loss fell by more than 3/4 of what the model predicted, faster
    where by more than 5/4, and grows where it fell by less than 1/4. `ratio` is the
    change of the loss over its prediction, NaN if no decrease was predicted; then the
    damping stays.
    """
    # All comparisons with NaN are false.
    factor = jnp.select(
        [ratio > 1.25, ratio > 0.75, ratio < 0.25],
        [_SHRINK_FAST, _SHRINK, 1 / _SHRINK],
        1.0,
    )
    factor = jnp.where(accepted, factor, _GROW_AFTER_FAILURE)
    return jnp.maximum(damping * factor.astype(damping.dtype), least)


def length_growth(
    coefficients: Float[Array, " k"],
    slopes: Float[Array, " k"],
    noise: Float[Array, ""],
    accepted: Bool[Array, ""],
) -> Float[Array, " k"]:
    """Returns the factors by which the directions of the next step are longer.

    They are the coefficients of this step, within bounds, and larger where the slope
    `slopes` along a direction is less than the `noise` of the loss.
    """
    least, most = _LENGTH_CHANGE
    # The mean of gradients need not descend for this batch: then its coefficient is
    # negative, and as long.
    growth = jnp.clip(jnp.abs(coefficients), least, most)
    growth = jnp.where(accepted, growth, _SHORTEN_AFTER_FAILURE)
    steepness = jnp.abs(slopes).astype(growth.dtype)
    needed = noise.astype(growth.dtype) / jnp.where(steepness > 0, steepness, jnp.inf)
    too_short = (steepness > 0) & (needed > 1)
    return jnp.where(too_short, jnp.maximum(growth, jnp.minimum(needed, most)), growth)


def updated_share(
    state: Agreement, slopes: Float[Array, " parts"], count: Int[Array, ""]
) -> Float[Array, " parts"]:
    """Returns the running mean of the share after one more batch.

    `slopes` are those of the new batch along the parts of `state.direction`, after the
    step, and `count` is the number of steps so far.
    """
    # A mean of gradients need not descend; then there is no slope to confirm. The loss
    # may be NaN at the end of a direction; then there is no model of it.
    confirmed = slopes.astype(state.changes.dtype) - state.changes
    known = (state.slopes < 0) & jnp.isfinite(confirmed)
    ratio = confirmed / jnp.where(known, state.slopes, 1)
    ratio = jnp.where(known, jnp.clip(ratio, *_RATIOS), state.share)
    rate = jnp.maximum(_RATE, 1 / (1 + count)).astype(ratio.dtype)
    return state.share + rate * (ratio - state.share)


def trusted(share: Float[Array, " parts"]) -> Float[Array, " parts"]:
    """Returns the factors of the slopes."""
    return jnp.clip(share, _LEAST, 1)


def after_step(
    directions: Sequence[PyTree[Array]],
    slopes: Float[Array, " k"],
    changes: Float[Array, " k"],
    share: Float[Array, " parts"],
    accepted: Bool[Array, ""],
) -> Agreement:
    """Returns the next state. A step that was not taken changed no slope.

    `slopes` and `changes` may have more entries than there are `directions`: the first
    ones are theirs.
    """
    dtype, parts = share.dtype, len(directions)
    return Agreement(
        direction=reduce(add, directions),
        slopes=slopes[:parts].astype(dtype),
        changes=jnp.where(accepted, changes[:parts], 0).astype(dtype),
        share=share,
    )


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
