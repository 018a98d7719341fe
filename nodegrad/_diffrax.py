"""Names of Diffrax that are not public, and nothing else.

Checked on Diffrax 0.7.2. Each is here because nothing public does its work:

- `assert_term_compatible`: whether terms fit a solver, with Diffrax's own messages.
- `is_sde`, `is_unsafe_sde`: whether a term is driven by a Brownian motion, and by one
  that gives the same values only for the very same times.
- `running_adjoints`: reads the adjoint of a running `diffeqsolve` off the call stack,
  where nothing public says which it is. (What was traced before and is cached by
  `jax.jit` is on no stack.)
- `use_stepsize_tol`: the placeholder in an implicit solver's root finder that stands
  for the tolerances of the step size controller.
- `WrapTerm`: a term in the time that runs forwards, for solves with `t1 < t0`.
- `solver_loop`: Diffrax's solver loop, which takes the `while` loop to run as an
  argument. With it comes the layout of the loop's state (see `_record.py`).
"""

import sys
from collections.abc import Iterator
from typing import Any

from diffrax import AbstractAdjoint
from diffrax._heuristics import is_sde as is_sde, is_unsafe_sde as is_unsafe_sde
from diffrax._integrate import (
    _assert_term_compatible as assert_term_compatible,
    loop as solver_loop,
)
from diffrax._root_finder import use_stepsize_tol as use_stepsize_tol
from diffrax._term import WrapTerm as WrapTerm


__all__ = [
    "WrapTerm",
    "assert_term_compatible",
    "is_sde",
    "is_unsafe_sde",
    "running_adjoints",
    "solver_loop",
    "use_stepsize_tol",
]


def running_adjoints() -> Iterator[tuple[Any, bool]]:
    """Of every `diffrax.diffeqsolve` that is being traced right now, the adjoint.

    And whether that is running its loop by now, innermost solve first.
    """
    frame, is_looping = sys._getframe(), False
    while frame is not None:
        name = frame.f_code.co_name
        if name == "loop":
            is_adjoint = isinstance(frame.f_locals.get("self"), AbstractAdjoint)
            is_looping = is_looping or is_adjoint
        is_solve = name == "diffeqsolve"
        if is_solve and frame.f_globals.get("__name__") == "diffrax._integrate":
            yield frame.f_locals.get("adjoint"), is_looping
            is_looping = False
        frame = frame.f_back
