"""Evaluates and linearises every call that a step makes to its parts, once."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._internal.tree import inexact_spec, zeros_like
from .state_source import RecordedSteps
from .step_times import StepTimes


# Calls with this key are made by an inverse only, and never by a step.
UNDO = "undo"


class LinearizedCalls:
    """Evaluates the parts of one step, and stores the value and pullback of each call.

    An instance is the `evaluate` of one step of all solves of a batch. An inverse step
    and a step may share it; the step then finds the calls that the inverse made. It
    works as a tape because of three invariants:

    1. Part and key identify a call, and a step makes each call at most once.
    2. Two calls with the same part and key have the same arguments, up to rounding. So
       the value and the pullback of the first one are valid for both.
    3. The arguments of a call depend only on `args` and on the results of the calls
       that the step makes before it.
    """

    def __init__(self, steps: RecordedSteps, times: StepTimes):
        """`times` are those of the step; `steps` provides the parts."""
        self.steps = steps
        self.times = times.start, times.end, times.previous_start
        self.made: dict[tuple[str, str], _Call] = {}

    def __call__(self, part: str, key: str, *args: PyTree) -> PyTree[Array]:
        """Returns the value of a call, and linearises it if it is the first one.

        Calls with the key `"undo"` are evaluated without a pullback.
        """
        if key == UNDO:
            return self.steps.evaluate(part, key, *args)
        if (part, key) not in self.made:
            spec = inexact_spec(args)
            if not self.steps.wrt_times:
                # A part need not be differentiable in time: the control of a Brownian
                # motion is not. An argument is a time if it is one of these objects,
                # which steps pass on unchanged.
                is_time = lambda x: any(x is t for t in self.times)
                spec = tuple(
                    False if is_time(x) else s for x, s in zip(args, spec, strict=True)
                )
            value, pull = self.steps.pullback(part, args, spec)
            self.made[part, key] = _Call(spec, value, pull)
        return self.made[part, key].value

    def linearize(
        self, step: Callable[..., PyTree], args: tuple[PyTree, ...]
    ) -> tuple[PyTree, Callable]:
        """Returns `step(evaluate, *args)` and its pullback.

        `args` are `(start, end, y, replay_state)`. The pullback takes cotangents of the
        results to `(cotangents of the constants by part, cotangents of args)`. A second
        argument of it has totals to which it adds the former.

        The cached calls already have pullbacks. Only the arithmetic between them is
        differentiated here, as a function from call results to call arguments.
        """
        order: list[tuple[str, str]] = []

        def ordered(part: str, key: str, *part_args: PyTree) -> PyTree[Array]:
            order.append((part, key))
            return self(part, key, *part_args)

        # Makes the calls that are still missing, and records the order of all.
        step(ordered, *args)
        spec = self.steps.step_spec(args)
        wanted, fixed = eqx.partition(args, spec)

        # From `args` and the results of the calls to the results of the step and the
        # arguments of the calls.
        def arithmetic(
            wanted: PyTree[Array], values: dict[tuple[str, str], PyTree[Array]]
        ) -> tuple[PyTree[Array], dict[tuple[str, str], PyTree[Array]]]:
            call_args = {}

            def recall(part: str, key: str, *part_args: PyTree) -> PyTree[Array]:
                call = self.made[part, key]
                call_args[part, key] = eqx.filter(part_args, call.spec)
                return values[part, key]

            out = step(recall, *eqx.combine(wanted, fixed))
            return eqx.filter(out, eqx.is_inexact_array), call_args

        values = {name: call.value for name, call in self.made.items()}
        (outputs, call_args), pull_arithmetic = jax.vjp(arithmetic, wanted, values)

        def pull(
            cts: PyTree[Array], totals: dict[str, PyTree[Array]] | None = None
        ) -> tuple[dict[str, PyTree[Array]], PyTree[Array]]:
            # Invariant: `ct_args` holds the cotangents of the arguments of all later
            # calls. By invariant 3 the result of this call reaches `cts` through those
            # arguments and the results of the step only, so the zeros that stand for
            # earlier calls do not change `ct_values[part, key]`. The rest of the
            # pullback is not used, and the compiler removes it.
            ct_args, ct_consts = zeros_like(call_args), dict(totals or {})
            for part, key in reversed(order):
                _, ct_values = pull_arithmetic((cts, ct_args))
                # A part that was called with several keys has one set of constants.
                ct_consts[part], ct_args[part, key] = self.made[part, key].pull(
                    ct_values[part, key], ct_consts.get(part)
                )
            ct_wanted, _ = pull_arithmetic((cts, ct_args))
            return ct_consts, ct_wanted

        return outputs, pull


class _Call(NamedTuple):
    """A call: its value, and its pullback to the constants and to its arguments.

    `spec` says which arguments are differentiated.
    """

    spec: PyTree[bool]
    value: PyTree[Array]
    pull: Callable
