"""`check_gradient`, which examines the gradient of a user's own loss."""

# Annotations stay strings, so `help(check_gradient)` shows them as they are written.
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._internal.tree import check_counts, is_traced
from .._solve.odesolve import odesolve
from .checks import (
    check_adjoint,
    check_differences,
    check_reconstruction,
    check_smoothness,
    check_solve,
    differences,
    References,
    verdict_of,
)
from .costs import ADJOINTS, costs, recommended
from .report import advice, GradientCheck
from .varied_solve import as_written, Call, Loss, observed, Program


def check_gradient(
    loss: Callable[..., Array],
    params: PyTree,
    *args: Any,
    solve: Callable[..., diffrax.Solution] = diffrax.diffeqsolve,
    tolerance: float = 1e-2,
    adjoints: Sequence[diffrax.AbstractAdjoint] = ADJOINTS,
    num_directions: int = 4,
    repeats: int = 5,
    memory_limit: float = 4e9,
) -> GradientCheck:
    r"""Checks the gradient of a loss with solves in it, and what it costs.

    Let $g$ be the gradient of the loss $L$ with respect to the parameters $p$, which
    are `params`. The function answers four questions, the first three by relative
    errors, which pass up to `tolerance`:

    - *Is $g$ the gradient of the computed solution?* It is compared with the gradient
      of another adjoint: `diffrax.RecursiveCheckpointAdjoint`, or
      `nodegrad.ACAAdjoint` where the loss uses an adjoint of Diffrax that keeps
      checkpoints. The accepted steps are the same, unless error estimates are near
      rounding.
    - *Is it the derivative of the loss?* $g \cdot v$ is compared with
      $(L(p + h v) - L(p - h v)) / 2h$ for random directions $v$ and eight step sizes
      $h$. The solves at all points take the step sizes that the controller chooses at
      $p$, so that the two agree to rounding. Differences of solves whose steps adapt
      are reported too.
    - *Is the solve accurate enough?* The gradient is compared with those for `rtol` and
      `atol` divided by 10 and 100, or a constant step size divided by 2 and 4.
    - *Which adjoint should the loss use?* Value and gradient are compiled and timed
      with every one of `adjoints`.

    **Example:**

    ```python
    import diffrax
    import jax.numpy as jnp
    import nodegrad


    def loss(rate, y0, solve=diffrax.diffeqsolve):
        decay = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        sol = solve(decay, diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, rate)
        return jnp.sum(sol.ys**2)


    check = nodegrad.check_gradient(loss, jnp.array(0.7), jnp.ones(2), adjoints=())
    print(check.verdict)  # right
    print(check.checks["adjoint"].error < 1e-5)  # True
    ```

    **Arguments:**

    - `loss`: `loss(params, *args, solve=...)` returns a real number. It calls `solve`
      in the place of `diffrax.diffeqsolve` or `nodegrad.odesolve`, with the same
      arguments, any number of times, also under `jax.vmap`. With the default
      `solve=diffrax.diffeqsolve` the same function serves for training.
    - `params`: a pytree, whose floating point arrays are differentiated.
    - `args`: passed to the loss, not differentiated.
    - `solve`: which of the two functions the loss calls.
    - `tolerance`: the relative error of a gradient that does not matter to you. The
      error of an array is relative to its largest entry, each entry multiplied by the
      size of its parameter. An array that matters a hundred times less than another
      one is held to a hundredth of that one's gradient.
    - `adjoints`: the adjoints to compare in time and memory; `()` for none.
    - `num_directions`: how many random directions to take differences in. Each moves
      a part of the arrays of `params`; together they move all.
    - `repeats`: how often to time each adjoint; 0 for not at all.
    - `memory_limit`: programs that need more bytes are not run.

    **Returns:** an object that `print` shows as tables, with the fields

    - `verdict`: `"right"`, or the first of these that applies: `"reconstruction_lost"`
      (of `nodegrad.ReversibleAdjoint`), `"solve_failed"`, `"not_finite"`,
      `"adjoint_differs"`, `"differences_disagree"` (a derivative rule in your functions
      is wrong), `"not_smooth"`, `"solve_too_loose"`, `"undecided"`. `ok` is whether it
      is `"right"`.
    - `checks`: by name (`"adjoint"`, `"finite_differences"`, `"solve"`, `"smoothness"`,
      `"reconstruction"`), each with `verdict`, `error`, `uncertainty`, `words` and the
      numbers behind them, `details`. `"reconstruction"` has the reconstruction error
      and the coupling distance of a reversible solver.
    - `adjoints`: a row for each, with `name`, `error`, `seconds` (median of interleaved
      runs, without compilation), `temp_bytes` (of the compiled program) and `note`.
    - `recommended`: the name of the fastest adjoint that is exact, or the leanest of
      those that take at most 10 % more time. `advice`: what to do, in words.
    - `value`, `gradient`: those of the loss as it is written.

    `to_dict()` returns all but the gradient as plain numbers and texts.

    **Raises:** `TypeError` if the loss has no argument `solve`. `ValueError` if it
    never calls it, if it does not return a real number, or if `params` has no floating
    point array. What the loss itself raises at trace time passes through. Failures at
    run time are results.

    **Cost:** compiles four programs, and one for each adjoint in `adjoints` that the
    loss does not use. Runs about five gradients, 34 solves for each direction (68 with
    adaptive steps, 17 at once under `jax.vmap`), and `repeats` gradients for each
    adjoint.

    **When not to use it:** inside `jax.jit`, and in every training step. It checks one
    point: kinks and jumps elsewhere are not seen. For stochastic equations the accuracy
    of the solve is only reported, because it is that of one path.
    """
    _check_arguments(loss, solve, tolerance, num_directions)
    function = Loss(loss, solve, params, args)
    calls, dtype = _traced(function)
    yours = Program(function, lambda: as_written([]))
    seen = _observe(function)
    failed = any(row["failed"] for row in seen)
    value, gradient = _run(yours)
    # Warnings about a solve were given above, once.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        references = References(function, calls, throw=not failed)
        exact = gradient if references.exact is None else references.exact
        checks = {
            "adjoint": check_adjoint(function, gradient, references, tolerance),
            "solve": check_solve(function, calls, references, tolerance),
        }
        found, note = differences(
            function, calls, exact, dtype, tolerance, num_directions
        )
        checks["finite_differences"] = check_differences(found, note, tolerance)
        checks["smoothness"] = check_smoothness(found, checks["solve"], tolerance)
        mine = [call.adjoint for call in calls]
        rows = costs(function, yours, mine, adjoints, exact, repeats, memory_limit)
    checks["reconstruction"] = check_reconstruction(seen, tolerance)
    best = recommended(rows, tolerance)
    verdict = verdict_of(checks, gradient, calls, failed)
    steps = [row["num_accepted_steps"] for row in seen]
    return GradientCheck(
        verdict=verdict,
        advice=advice(verdict, checks, rows, best, tolerance),
        tolerance=tolerance,
        value=value,
        num_parameters=sum(x.size for x in jax.tree.leaves(function.params)),
        num_solves=len(seen),
        accepted_steps=(min(steps), max(steps)) if steps else None,
        checks=checks,
        adjoints=rows,
        recommended=None if best is None else best.name,
        gradient=gradient,
    )


def _check_arguments(
    loss: Any, solve: Any, tolerance: Any, num_directions: Any
) -> None:
    """Raises an error for arguments that make no sense, before anything is traced."""
    if solve is not diffrax.diffeqsolve and solve is not odesolve:
        msg = (
            "`check_gradient(solve=...)` takes `diffrax.diffeqsolve` or "
            f"`nodegrad.odesolve`, whichever the loss calls; got {solve!r}."
        )
        raise ValueError(msg)
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        msg = (
            "`check_gradient(tolerance=...)` is the relative error of a gradient that "
            f"does not matter to you, between 0 and 1; got {tolerance!r}."
        )
        raise ValueError(msg)
    check_counts(num_directions=num_directions)
    parameters = inspect.signature(loss).parameters.values()
    takes = lambda p: (
        p.kind is p.VAR_KEYWORD
        or (p.name == "solve" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    )
    if not any(map(takes, parameters)):
        msg = (
            "The loss must have an argument `solve`, and call it in the place of "
            "`diffrax.diffeqsolve`: `def loss(params, solve=diffrax.diffeqsolve)`. "
            f"Got the arguments {[p.name for p in parameters]}."
        )
        raise TypeError(msg)


def _traced(loss: Loss) -> tuple[list[Call], Any]:
    """Returns what is known about the solves of the loss, and the dtype of the loss."""
    if any(map(is_traced, jax.tree.leaves((loss.params, loss.others)))):
        msg = (
            "`check_gradient` compiles and runs programs, so it must be called outside "
            "of `jax.jit` and of other transformations."
        )
        raise TypeError(msg)
    if not jax.tree.leaves(loss.params):
        msg = (
            "`check_gradient` differentiates the floating point arrays in `params`, "
            "and there is none."
        )
        raise ValueError(msg)
    calls: list[Call] = []
    value = jax.eval_shape(
        lambda params, others: loss(params, others, as_written(calls)),
        loss.params,
        loss.others,
    )
    if not calls:
        msg = (
            "The loss never called its argument `solve`, so nothing about its solve "
            "can be checked. Call it in the place of `diffrax.diffeqsolve` or "
            "`nodegrad.odesolve`, with the same arguments."
        )
        raise ValueError(msg)
    is_scalar = isinstance(value, jax.ShapeDtypeStruct) and value.shape == ()
    if not is_scalar or not jnp.issubdtype(value.dtype, jnp.floating):
        msg = f"The loss must return one real number; got {value}."
        raise ValueError(msg)
    return calls, value.dtype


def _observe(loss: Loss) -> list[dict[str, Any]]:
    """Returns statistics of every solve of the loss; of every sample under `vmap`."""
    seen: list[dict[str, Any]] = []
    run = eqx.filter_jit(lambda params, others: loss(params, others, observed(seen)))
    jax.block_until_ready(run(loss.params, loss.others))
    # The statistics come by a callback, which may be late.
    jax.effects_barrier()
    return seen


def _run(program: Program) -> tuple[float, PyTree | None]:
    """Returns value and gradient; NaN and `None` if a solve raises."""
    try:
        value, gradient = program()
    # `EquinoxRuntimeError` and `JaxRuntimeError` are such errors.
    except RuntimeError:
        return float("nan"), None
    return float(value), gradient
