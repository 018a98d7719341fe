"""The calls of the parts of a step, each evaluated and linearised once."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._internal.tree import add, inexact_spec, zeros_like
from .state_source import RecordedSteps
from .step_times import StepTimes


class LinearizedCalls:
    """Evaluates the parts of one step, and keeps the pullback of every call.

    Three invariants make this a tape: a call is known by its part and key; whatever
    makes a call makes it with the same arguments (up to rounding); and the arguments of
    a call depend only on results of calls before it, in the order in which the step
    makes them.
    """

    def __init__(self, steps: RecordedSteps, times: StepTimes):
        self.steps = steps
        self.times = times.start, times.end, times.previous_start
        self.made: dict[tuple[str, str], _Call] = {}

    def __call__(self, part: str, key: str, *args: PyTree) -> PyTree[Array]:
        if (part, key) not in self.made:
            spec = inexact_spec(args)
            if not self.steps.wrt_times:
                # Not everything can be differentiated with respect to time.
                is_time = lambda x: any(x is t for t in self.times)
                spec = tuple(
                    False if is_time(x) else s for x, s in zip(args, spec, strict=True)
                )
            value, pull = self.steps.pullback(part, args, spec)
            self.made[part, key] = _Call(spec, value, pull)
        return self.made[part, key].value

    def linearize(self, step: Callable, args: PyTree) -> tuple[PyTree, Callable]:
        """`step(evaluate, *args)` and its pullback to the constants and to `args`.

        The calls already have pullbacks. Only the arithmetic between them is
        differentiated here, as a function from call results to call arguments.
        """
        order = []

        def ordered(*call):
            order.append(call[:2])
            return self(*call)

        step(ordered, *args)
        spec = self.steps.step_spec(args)
        wanted, fixed = eqx.partition(args, spec)

        def arithmetic(wanted, values):
            call_args = {}

            def recall(part, key, *part_args):
                call = self.made[part, key]
                call_args[part, key] = eqx.filter(part_args, call.spec)
                return values[part, key]

            out = step(recall, *eqx.combine(wanted, fixed))
            return eqx.filter(out, eqx.is_inexact_array), call_args

        values = {name: call.value for name, call in self.made.items()}
        (outputs, call_args), pull_arithmetic = jax.vjp(arithmetic, wanted, values)

        def pull(cts):
            ct_args, ct_consts = zeros_like(call_args), {}
            for part, key in reversed(order):
                _, ct_values = pull_arithmetic((cts, ct_args))
                ct_part, ct_args[part, key] = self.made[part, key].pull(
                    ct_values[part, key]
                )
                ct_consts[part] = (
                    add(ct_consts[part], ct_part) if part in ct_consts else ct_part
                )
            ct_wanted, _ = pull_arithmetic((cts, ct_args))
            return ct_consts, ct_wanted

        return outputs, pull


class _Call(NamedTuple):
    """The value of a call, and its pullback to the constants and to `spec`."""

    spec: PyTree[bool]
    value: PyTree[Array]
    pull: Callable
