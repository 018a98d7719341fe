"""Imports the names of other libraries that are not public; no other file does.

Checked on JAX 0.10.0, 0.10.2 and 0.12.0, Equinox 0.13.8, Diffrax 0.7.2, Lineax 0.1.1.
There is no public name that does the same as any of these.
`tests/test_private_names.py` says which of them have changed.

JAX:

- `ad`, `batching`, `mlir`, `Primitive`, `ShapedArray`: defining a primitive, with its
  rules for forward mode, transposition, `vmap` and lowering.
- `checks_vma`, `varying_axes`, `with_varying_axes`, `NamedAxisEffect`: whether
  `jax.shard_map` checks over which axes of the mesh arrays vary (and a context manager
  to change it), these axes in the type of an array, and what collectives leave in a
  traced function.
- `eval_jaxpr`, `jaxprs_in_params`, `Jaxpr`, `Literal`, `Tracer`:
  converting closures, and searching a traced function.

- `callback_logger`: prints the traceback of an error inside of a callback, also where
  the error is caught; silenced where a failure is a result.

Equinox:

- `while_loop`: a loop whose buffers are written in place, also under `jax.vmap`.
- `Buffer`, `select_if_vmap`: such a buffer, and how a write to it leaves solves of a
  batch alone whose loop has ended. `put_row` is that write.
- `nondifferentiable`, `nondifferentiable_backward`: the identity, which raises with a
  given message if it is differentiated at all, or in reverse mode.
- `prevbefore`: the floating point number before another one, as Diffrax computes it.
- `unvmap_any`: whether a boolean is true for any element of all `vmap`s around it.
- `ω`: arithmetic on pytrees.

Lineax:

- `default_floating_dtype`: the type of a Python `float`.

Diffrax:

- `assert_term_compatible`: whether terms fit a solver, with Diffrax's own messages.
- `is_sde`, `is_unsafe_sde`: whether a term is driven by a Brownian motion, and by one
  that gives the same values only for the very same times.
- `running_adjoints`: reads the adjoint of a running `diffeqsolve` off the call stack,
  for an error message; no number depends on it. (A function that `jax.jit` traced
  before and has in its cache does not run again, so it raises nothing.)
- `use_stepsize_tol`: the placeholder in an implicit solver's root finder that stands
  for the tolerances of the step size controller.
- `WrapTerm`: a term as a function of reversed time, for solves with `t1 < t0`.
- `solver_loop`: Diffrax's solver loop, which takes the `while` loop to run as an
  argument. With it comes the layout of the loop's state (see `recorded_loop.py`).

Layouts that other files read, without a name that is private: the state of
`diffrax.ConstantStepSize` (`plan.py`, `step_times.py`), and the fields of an item of
`diffrax.RESULTS` (`results.py`).
"""

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from diffrax._heuristics import is_sde as is_sde, is_unsafe_sde as is_unsafe_sde
from diffrax._integrate import (
    _assert_term_compatible as assert_term_compatible,
    loop as solver_loop,
)
from diffrax._root_finder import use_stepsize_tol as use_stepsize_tol
from diffrax._term import WrapTerm as WrapTerm
from equinox.internal import (
    nondifferentiable as nondifferentiable,
    nondifferentiable_backward as nondifferentiable_backward,
    prevbefore as prevbefore,
    unvmap_any as unvmap_any,
    while_loop as while_loop,
    ω as ω,
)
from equinox.internal._loop.common import (
    _Buffer as Buffer,
    _select_if_vmap as select_if_vmap,
)
from jax._src.config import _check_vma as checks_vma
from jax._src.core import NamedAxisEffect as NamedAxisEffect
from jax.core import (
    eval_jaxpr as eval_jaxpr,
    ShapedArray as ShapedArray,
    Tracer as Tracer,
)
from jax.extend.core import (
    Jaxpr as Jaxpr,
    jaxprs_in_params as jaxprs_in_params,
    Literal as Literal,
    Primitive as Primitive,
)
from jax.interpreters import ad as ad, batching as batching, mlir as mlir
from jax.sharding import NamedSharding, PartitionSpec
from lineax.internal import default_floating_dtype as default_floating_dtype


__all__ = [
    "Jaxpr",
    "Literal",
    "NamedAxisEffect",
    "Primitive",
    "ShapedArray",
    "Tracer",
    "WrapTerm",
    "ad",
    "assert_term_compatible",
    "batching",
    "callback_logger",
    "checks_vma",
    "default_floating_dtype",
    "eval_jaxpr",
    "is_sde",
    "is_unsafe_sde",
    "jaxprs_in_params",
    "mlir",
    "nondifferentiable",
    "nondifferentiable_backward",
    "prevbefore",
    "put_row",
    "row_of",
    "running_adjoints",
    "solver_loop",
    "unvmap_any",
    "use_stepsize_tol",
    "varying_axes",
    "while_loop",
    "with_varying_axes",
    "ω",
]

callback_logger = logging.getLogger("jax._src.callback")


def varying_axes(aval: ShapedArray) -> frozenset[str]:
    """Returns the axes of the mesh that an array of this type varies over."""
    return aval.manual_axis_type.varying


def with_varying_axes(aval: ShapedArray, axes: tuple[str, ...]) -> ShapedArray:
    """Returns the type of an array that varies over `axes`, and over no others."""
    sharding = aval.sharding
    if axes and sharding.mesh.empty:
        # Results of primitives that do not know of meshes.
        mesh, spec = jax.sharding.get_abstract_mesh(), [None] * len(aval.shape)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
    manual = aval.manual_axis_type.update(varying=frozenset(axes))
    return aval.update(sharding=sharding, manual_axis_type=manual)


def row_of(buffer: Any, row: Any) -> Any:
    """Reads row `row`, which is not negative, of an array or of a buffer of a loop."""
    while isinstance(buffer, Buffer):
        buffer = buffer._array
    return jax.lax.dynamic_index_in_dim(
        buffer, row, keepdims=False, allow_negative_indices=False
    )


def put_row(
    buffer: Any, row: Any, x: Any, pred: Any, set_row: Callable[[Any, Any, Any], Any]
) -> Any:
    """Writes `x` to a row of an array, or of a buffer of a loop, where `pred` holds.

    `set_row(array, row, x)` is the write to an array. That of Equinox,
    `buffer.at[row].set(x)`, checks that the row exists, which takes XLA two kernels.
    """

    def write(
        running: Any, array: Any, x: Any, row: Any, *, makes_false_steps: bool, **_: Any
    ) -> Any:
        if pred is not True:
            x = jax.numpy.where(pred, x, row_of(array, row))
        if running is not True:
            x = select_if_vmap(running, x, row_of(array, row), makes_false_steps)
        return set_row(array, row, x)

    x = jax.numpy.asarray(x, buffer.dtype)
    if isinstance(buffer, Buffer):
        return buffer._op(True, row, x, write, {}, buffer._makes_false_steps)
    return write(True, buffer, x, row, makes_false_steps=False)


def running_adjoints() -> Iterator[Any]:
    """Yields the adjoint of every `diffrax.diffeqsolve` on the call stack."""
    # Diffrax has no public record of the running solve. These names of a function and
    # of its module are those of Diffrax 0.7.2.
    frame = sys._getframe()
    while frame is not None:
        is_solve = frame.f_code.co_name == "diffeqsolve"
        if is_solve and frame.f_globals.get("__name__") == "diffrax._integrate":
            yield frame.f_locals.get("adjoint")
        frame = frame.f_back
