"""Second derivatives through a solve: time, compile time, memory, accuracy.

Gradients, products, Hessians and low-rank blocks by nodegrad against `jax.hessian`
through Diffrax's `DirectAdjoint` (forward mode over reverse mode, and reverse over
reverse) and its `BacksolveAdjoint` nested in itself, where that runs. In float64.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr

import nodegrad

from .measure import Clock, compile_program, Program, relative_error, time_in_turns
from .report import Budget, Column, fixed, Report, scientific, significant


DTYPE = "float64"


@dataclass(frozen=True)
class Problem:
    """`y' = vector_field(t, y, args)` over `[0, t1]`, and the loss of its end.

    With a `tolerance` the steps are adaptive, otherwise there are `steps` of them.
    """

    name: str
    vector_field: Callable[[Any, Any, Any], Any]
    y0: jax.Array
    args: jax.Array
    t1: float
    steps: int | None = None
    tolerance: float | None = None
    max_steps: int = 4096
    solver: diffrax.AbstractSolver = diffrax.Tsit5()

    @property
    def dt0(self) -> float | None:
        """The size of all steps, if it is known."""
        return None if self.steps is None else self.t1 / self.steps

    @property
    def controller(self) -> diffrax.AbstractStepSizeController:
        """How steps are chosen."""
        if self.tolerance is None:
            return diffrax.ConstantStepSize()
        return diffrax.PIDController(self.tolerance, self.tolerance)

    def solve(self, solve: Callable[..., Any], adjoint: Any, args: Any) -> jax.Array:
        """The final state."""
        return solve(
            diffrax.ODETerm(self.vector_field),
            self.solver,
            0.0,
            self.t1,
            self.dt0,
            self.y0,
            args,
            stepsize_controller=self.controller,
            adjoint=adjoint,
            max_steps=self.max_steps,
        ).ys[-1]

    def blocks(self, args: jax.Array, **kwargs: Any) -> nodegrad.HessianBlocks:
        """All derivatives by `nodegrad.hessian_blocks`."""
        return nodegrad.hessian_blocks(
            self.vector_field,
            self.solver,
            0.0,
            self.t1,
            self.dt0,
            self.y0,
            args,
            terminal_cost=loss,
            stepsize_controller=self.controller,
            max_steps=self.max_steps,
            **kwargs,
        )


def loss(y: jax.Array) -> jax.Array:
    """Of the final state."""
    return jnp.mean(y**2)


def perceptron(parameters: int, steps: int) -> Problem:
    """Two states, and a network with one hidden layer: five parameters a neuron."""
    width = parameters // 5

    def vector_field(t, y, args):
        del t
        first, bias, second = jnp.split(args, [2 * width, 3 * width])
        hidden = jnp.tanh(first.reshape(width, 2) @ y + bias)
        return second.reshape(2, width) @ hidden / width

    args = jr.normal(jr.key(0), (5 * width,))
    name = f"{5 * width} parameters, {steps} steps"
    y0 = jnp.array([0.6, -0.4])
    return Problem(name, vector_field, y0, args, 1.0, steps=steps, max_steps=steps)


def van_der_pol() -> Problem:
    """`y'' = mu (1 - y^2) y' - y`, with three parameters."""

    def vector_field(t, y, args):
        del t
        mu, damping, stiffness = args
        slope = mu * (1 - damping * y[0] ** 2) * y[1] - stiffness * y[0]
        return jnp.stack([y[1], slope])

    y0, args = jnp.array([2.0, 0.0]), jnp.array([5.0, 1.0, 1.0])
    name = "van der Pol, mu = 5, T = 2, max_steps = 4096"
    return Problem(name, vector_field, y0, args, 2.0, tolerance=1e-6)


# The ways to differentiate; each makes a function of `(args, v)`.

_ACA = nodegrad.ACAAdjoint()
_DIRECT = diffrax.DirectAdjoint()
_HESSIAN = "jax.hessian, ACA"
_DIRECT_FORWARD = "DirectAdjoint, jacfwd(grad)"
_DIRECT_REVERSE = "DirectAdjoint, jacrev(grad)"


def _outputs(problem: Problem, adjoint: Any) -> Callable[..., jax.Array]:
    ours = isinstance(adjoint, nodegrad.ACAAdjoint | nodegrad.ReversibleAdjoint)
    solve = nodegrad.odesolve if ours else diffrax.diffeqsolve
    return lambda args: problem.solve(solve, adjoint, args)


def _makers(problem: Problem) -> dict[str, Callable[[], Callable[..., Any]]]:
    of = lambda adjoint: lambda args: loss(_outputs(problem, adjoint)(args))
    ours, outputs = of(_ACA), _outputs(problem, _ACA)
    column = lambda y: jax.grad(loss)(y)[None]

    def low_rank(args):
        return nodegrad.low_rank_blocks(
            problem.vector_field,
            problem.solver,
            0.0,
            problem.t1,
            problem.dt0,
            problem.y0,
            args,
            columns=column,
            stepsize_controller=problem.controller,
            max_steps=problem.max_steps,
        ).p

    direct, backsolve = of(_DIRECT), of(diffrax.BacksolveAdjoint())
    reverse = lambda fn: lambda args: jax.jacrev(jax.grad(fn))(args)
    forward = lambda fn: lambda args: jax.jacfwd(jax.grad(fn))(args)
    ignoring = lambda fn: lambda args, v: (fn(args), v)[0]
    return {
        "gradient, ACA": lambda: ignoring(jax.grad(ours)),
        "hvp, ACA": lambda: lambda args, v: nodegrad.hvp(ours, args, v),
        "ggn_vp, ACA": lambda: lambda args, v: nodegrad.ggn_vp(outputs, loss, args, v),
        "low_rank_blocks, R = 1": lambda: ignoring(low_rank),
        _HESSIAN: lambda: ignoring(forward(ours)),
        "hessian_blocks, exact": lambda: ignoring(
            lambda args: problem.blocks(args, exact=True).hess_argsargs
        ),
        "hessian_blocks, Gauss-Newton": lambda: ignoring(
            lambda args: problem.blocks(args).hess_argsargs
        ),
        "DirectAdjoint, hvp": lambda: (
            lambda args, v: jax.jvp(jax.grad(direct), (args,), (v,))[1]
        ),
        _DIRECT_FORWARD: lambda: ignoring(forward(direct)),
        _DIRECT_REVERSE: lambda: ignoring(reverse(direct)),
        "BacksolveAdjoint, jacrev(grad)": lambda: ignoring(reverse(backsolve)),
    }


@dataclass
class Row:
    """One method on one problem. What is unknown is `None`."""

    section: str
    method: str
    seconds: float
    build_seconds: float
    temp_bytes: int
    error: float | None

    @property
    def total_seconds(self) -> float:
        """From the Python function to the first result."""
        return self.build_seconds + self.seconds

    def record(self, peer: "Row") -> dict[str, Any]:
        """The row with its ratios to `peer`."""
        return {
            **asdict(self),
            "time_ratio": self.seconds / peer.seconds,
            "total_seconds": self.total_seconds,
            "memory_ratio": self.temp_bytes / max(peer.temp_bytes, 1),
        }


_COLUMNS = (
    Column("method", "method"),
    Column("seconds", "time (ms)", significant(3, 1e3)),
    Column("time_ratio", "in gradients", fixed(2)),
    Column("build_seconds", "build (s)", fixed(2)),
    Column("total_seconds", "build + run (s)", fixed(2)),
    Column("temp_bytes", "temp (kB)", significant(3, 1e-3)),
    Column("memory_ratio", "in gradients", fixed(2)),
    Column("error", "rel. error", scientific),
)


@dataclass(frozen=True)
class Settings:
    """What holds for all cases; `row_seconds` is for how long to time a method."""

    clock: Clock
    report: Report
    row_seconds: float


def _measure(
    settings: Settings, problem: Problem, leave_out: Sequence[str] = ()
) -> dict[str, Row]:
    """A table of all methods on one problem."""
    direction = jr.normal(jr.key(1), problem.args.shape, problem.args.dtype)
    programs: dict[str, Program] = {}
    for name, make in _makers(problem).items():
        if name in leave_out:
            continue
        try:
            programs[name] = compile_program(
                settings.clock, make(), problem.args, direction
            )
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0][:90]
            settings.report.note(f"{problem.name}: {name} does not run: {reason}")
    runs = {
        name: partial(program.run, problem.args, direction)
        for name, program in programs.items()
    }
    seconds = time_in_turns(
        settings.clock, runs, seconds=settings.row_seconds * len(runs)
    )
    errors = _errors(runs, direction)
    rows = {
        name: Row(
            problem.name,
            name,
            seconds[name],
            program.build_seconds,
            program.temp_bytes,
            errors.get(name),
        )
        for name, program in programs.items()
    }
    peer = rows["gradient, ACA"]
    records = [row.record(peer) for row in rows.values()]
    settings.report.table(problem.name, _COLUMNS, records)
    return rows


def _errors(runs: Mapping[str, Callable[[], Any]], v: jax.Array) -> dict[str, float]:
    """Of everything that is, or should be, the Hessian or its product with `v`.

    Relative to `DirectAdjoint` where that ran, else to `jax.hessian` through nodegrad.
    """
    reference = runs.get(_DIRECT_FORWARD, runs[_HESSIAN])()
    exact = {name: reference for name in runs if "jac" in name or "exact" in name}
    exact[_HESSIAN] = reference
    exact |= {name: reference @ v for name in runs if "hvp" in name}
    return {name: relative_error(runs[name](), truth) for name, truth in exact.items()}


def measure_parameters(settings: Settings, quick: bool) -> None:
    """Against the number of parameters, and of steps."""
    for parameters in (100,) if quick else (10, 100, 1000):
        for steps in (50,) if quick else (50, 200, 1000):
            problem = perceptron(parameters, steps)
            slow = parameters * steps > 10_000
            leave_out = ["BacksolveAdjoint, jacrev(grad)"] if quick else []
            if slow:
                # These take minutes, and the memory of every state of every tangent.
                leave_out += [_DIRECT_FORWARD, _DIRECT_REVERSE]
                leave_out += ["BacksolveAdjoint, jacrev(grad)"]
            rows = _measure(settings, problem, leave_out)
            for name, limit, aim in (("hvp", 3.5, 2.5), ("ggn_vp", None, None)):
                ratio = rows[f"{name}, ACA"].seconds / rows["gradient, ACA"].seconds
                settings.report.budgets.append(
                    Budget(
                        f"time of {name}", problem.name, "gradient", ratio, limit, aim
                    )
                )


def measure_van_der_pol(settings: Settings) -> None:
    """From a Python function to a Hessian, adaptively."""
    problem = van_der_pol()
    rows = _measure(settings, problem, ["BacksolveAdjoint, jacrev(grad)"])
    limits = {
        (_HESSIAN, _DIRECT_FORWARD): (0.4, 0.25),
        ("hessian_blocks, exact", _DIRECT_FORWARD): (0.35, 0.2),
        (_HESSIAN, _DIRECT_REVERSE): (1 / 20, None),
        ("hessian_blocks, exact", _DIRECT_REVERSE): (1 / 20, None),
    }
    for (name, peer), (limit, aim) in limits.items():
        ratio = rows[name].total_seconds / rows[peer].total_seconds
        settings.report.budgets.append(
            Budget(f"build + run of {name}", problem.name, peer, ratio, limit, aim)
        )


def measure_depth(settings: Settings, quick: bool) -> None:
    """Memory of the blocks against the number of steps, for a reversible solver."""
    problem = replace(
        perceptron(100, 100), solver=nodegrad.Reversible(diffrax.Tsit5()), name="depth"
    )
    sizes, records = {}, []
    reversible = nodegrad.ReversibleAdjoint()
    for steps in (100, 10_000) if quick else (100, 1000, 10_000):
        deep = replace(problem, steps=steps, max_steps=steps)
        for adjoint in (reversible,) if quick else (reversible, _ACA):
            blocks = partial(deep.blocks, exact=True, adjoint=adjoint)
            program = compile_program(settings.clock, blocks, problem.args)
            name = type(adjoint).__name__
            sizes[name, steps] = program.temp_bytes
            records.append(
                {
                    "method": f"hessian_blocks, {name}",
                    "steps": steps,
                    "temp_bytes": program.temp_bytes,
                }
            )
    columns = [c for c in _COLUMNS if c.key in records[0]]
    columns.insert(1, Column("steps", "steps"))
    title = "memory of the second-order backward pass"
    settings.report.table(title, columns, records)
    name = "ReversibleAdjoint"
    ratio = sizes[name, 10_000] / sizes[name, 100]
    settings.report.budgets.append(
        Budget(f"memory, {name}", "10000 steps", "100 steps", ratio, 1.05)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark can be told: nothing."""
    del parser


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Runs the benchmark."""
    settings = Settings(clock, report, row_seconds=0.3 if arguments.quick else 2.0)
    measure_van_der_pol(settings)
    measure_depth(settings, arguments.quick)
    measure_parameters(settings, arguments.quick)
