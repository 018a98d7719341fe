"""Derivatives of the trained model, and solvers that it was not trained with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from benchmarks.comparison import measured
from benchmarks.measure import Clock, compile_in_turns, relative_error, time_in_turns
from benchmarks.training_tasks import cross_entropy

import nodegrad

from .model import Classifier, Solve
from .training import evaluate


# With a tolerance of 1e-4, Heun's method takes more than `MAX_STEPS` steps.
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)

Records = list[dict[str, Any]]

_DIFFRAX = Solve(diffrax.diffeqsolve, diffrax.RecursiveCheckpointAdjoint())
_METHODS = {
    "Diffrax, default": _DIFFRAX,
    "ACA, odesolve": Solve(),
    "ACA, diffeqsolve": Solve(diffrax.diffeqsolve),
    "Diffrax, backsolve": Solve(diffrax.diffeqsolve, diffrax.BacksolveAdjoint()),
}
_REVERSIBLE = replace(
    _DIFFRAX, solver=nodegrad.Reversible(diffrax.Bosh3()), tolerance=1e-4, max_steps=256
)
_DIRECT = Solve(diffrax.diffeqsolve, diffrax.DirectAdjoint())

# With the error rates in percent that the ACA paper gives for NODE18 on CIFAR10.
_SOLVERS = {
    "Heun-Euler": (Solve(), 4.85),
    "Bosh3 (RK23)": (Solve(solver=diffrax.Bosh3()), 4.92),
    "Dopri5 (RK45)": (Solve(solver=diffrax.Dopri5()), 5.29),
    "Euler": (Solve(solver=diffrax.Euler(), dt0=0.2), 5.52),
    "Midpoint (RK2)": (Solve(solver=diffrax.Midpoint(), dt0=0.2), 5.27),
    "RK4": (Solve(solver=nodegrad.RK4(), dt0=0.2), 5.24),
}


@dataclass(frozen=True)
class Subject:
    """The trained model, and the digits on which its loss is differentiated."""

    model: Classifier
    images: Any
    labels: Any

    @property
    def params(self) -> Classifier:
        """The parameters of the model."""
        return eqx.filter(self.model, eqx.is_inexact_array)

    def losses(self, model: Classifier, solve: Solve) -> Any:
        """The loss of every digit."""
        logits, _ = model(self.images, solve)
        return cross_entropy(logits, self.images, self.labels)

    def loss(self, params: Classifier, solve: Solve) -> Any:
        """The mean loss as a function of the parameters."""
        return jnp.mean(self.losses(eqx.combine(params, self.model), solve))

    def exact_gradient(self) -> Classifier:
        """The gradient of the continuous problem.

        In double precision at a tolerance of 1e-9, by Diffrax alone.
        """
        solve = replace(
            _DIFFRAX, solver=diffrax.Tsit5(), tolerance=1e-9, max_steps=4096
        )
        with jax.enable_x64(True):
            params = jax.tree.map(lambda x: x.astype(jnp.float64), self.params)
            double = replace(self, images=self.images.astype(jnp.float64))
            return jax.jit(jax.grad(partial(double.loss, solve=solve)))(params)


def _measure(
    clock: Clock,
    makers: Mapping[str, Callable[[], Callable[..., Any]]],
    arguments: Sequence[tuple[Any, ...]],
    seconds: float,
) -> list[tuple[Records, dict[str, Any]]]:
    """Records of all programs, and their results, for each tuple of arguments."""
    # Training has traced parts of some programs. Tracing is part of the build time.
    jax.clear_caches()
    programs = compile_in_turns(clock, makers, arguments[0], 1)
    out = []
    for args in arguments:
        runs = {name: partial(p.run, *args) for name, p in programs.items()}
        times = time_in_turns(clock, runs, seconds=seconds)
        results = {name: run() for name, run in runs.items()}
        out.append((measured(programs, times, results), results))
    return out


def _gradient(subject: Subject, solve: Solve) -> Callable[..., Any]:
    return lambda params, tolerance: jax.grad(subject.loss)(
        params, replace(solve, tolerance=tolerance)
    )


def compare_gradients(
    clock: Clock, subject: Subject, seconds: float
) -> dict[float, Records]:
    """For each of `TOLERANCES`, a record of every adjoint with its error."""
    exact = subject.exact_gradient()
    makers = {name: partial(_gradient, subject, s) for name, s in _METHODS.items()}
    arguments = [(subject.params, tolerance) for tolerance in TOLERANCES]
    found = _measure(clock, makers, arguments, seconds)
    for records, results in found:
        for record in records:
            record["error"] = relative_error(results[record["method"]], exact)
    return dict(zip(TOLERANCES, [records for records, _ in found], strict=True))


def compare_reversible(clock: Clock, subject: Subject, seconds: float) -> Records:
    """The gradient of a reversible solve: states stored, and states reconstructed."""
    solves = {
        "Diffrax's default adjoint": _REVERSIBLE,
        "ReversibleAdjoint": replace(_REVERSIBLE, adjoint=nodegrad.ReversibleAdjoint()),
    }
    makers = {name: partial(_gradient, subject, s) for name, s in solves.items()}
    arguments = subject.params, _REVERSIBLE.tolerance
    [(records, _)] = _measure(clock, makers, [arguments], seconds)
    return records


def compare_hvp(clock: Clock, subject: Subject, seconds: float) -> Records:
    """The Hessian times the gradient, by JAX through Diffrax and by `nodegrad.hvp`."""
    direct = jax.grad(partial(subject.loss, solve=_DIRECT))
    loss = partial(subject.loss, solve=Solve())
    makers = {
        "jax.jvp of jax.grad with DirectAdjoint()": lambda: (
            lambda p, v: jax.jvp(direct, (p,), (v,))[1]
        ),
        "hvp": lambda: lambda p, v: nodegrad.hvp(loss, p, v),
    }
    arguments = subject.params, jax.jit(jax.grad(loss))(subject.params)
    [(records, _)] = _measure(clock, makers, [arguments], seconds)
    return records


def check_curvature(subject: Subject) -> tuple[list[str], float]:
    """The layers that have Kronecker factors, and the error of one of these factors.

    The gradient of the cross-entropy in the logits is the softmax minus the label. The
    output factor of the last layer is the sum of its outer products.
    """
    losses = partial(subject.losses, solve=Solve())
    curvature = eqx.filter_jit(nodegrad.value_grad_and_curvature(losses))
    factors = curvature(subject.model)[2]
    logits, _ = eqx.filter_jit(subject.model)(subject.images, _DIFFRAX)
    residual = jax.nn.softmax(logits) - jax.nn.one_hot(subject.labels, 10)
    factor = factors[".head"].output_factor
    return list(factors), relative_error(factor, residual.T @ residual)


def swap_solvers(model: Classifier, test: tuple[Any, Any]) -> Records:
    """A record of the test error with every solver."""
    records: Records = []
    for name, (solve, published) in _SOLVERS.items():
        adaptive = f"tolerance {solve.tolerance}"
        accuracy, stats = evaluate(model, *test, solve)
        record = {
            "solver": name,
            "steps": adaptive if solve.dt0 is None else f"fixed, {solve.dt0}",
            "evaluations": int(stats["num_vector_field_evaluations"]),
            "error": 100 * (1 - float(accuracy)),
            "published": published,
        }
        records.append(record)
    return records
