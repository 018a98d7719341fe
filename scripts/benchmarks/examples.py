"""Ten examples of Diffrax's documentation, with one argument of the solve changed.

Each is written anew, and smaller, the way its authors would write it. A training step
is `value_and_grad` of the loss with respect to all arrays of the parameters; what
differs from row to row is the adjoint, or `nodegrad.odesolve` for
`diffrax.diffeqsolve` (not with `--quick`). All of them leave `max_steps` at its default
of 4096.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.stats.norm as normal
import optax

from .comparison import budgets, MEASURED, measured
from .measure import Clock, compile_in_turns, Program, time_in_turns
from .problems import robertson_field
from .report import Budget, Column, Report, significant
from .solves import ACA, ACA_IN_DIFFRAX, DIFFRAX, Method


DTYPE = "float64"
_METHODS = DIFFRAX, ACA_IN_DIFFRAX, ACA
_LIMITS = {"time": 0.9, "memory": 1.0, "build": 0.65}
_MEDIAN_TIME = 0.5
_COLUMNS = (
    Column("section", "example"),
    *MEASURED,
    Column("loss", "loss", significant(4)),
)

#: Either door with its adjoint: `diffeqsolve` but for that one argument.
Solve = Callable[..., Any]


@dataclass(frozen=True)
class Example:
    """Something to train: `loss(params, data, solve)`, which calls `solve` once."""

    params: Any
    data: Any
    loss: Callable[[Any, Any, Solve], jax.Array]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a choice of examples."""
    parser.add_argument(
        "--only", nargs="+", choices=tuple(EXAMPLES), help="leave out all but these"
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures every example, prints one table, and enters the budgets."""
    seconds = 0.3 if arguments.quick else 3.0
    repeats = 1 if arguments.quick else 3
    # Most of the time goes into builds.
    methods = _METHODS[:2] if arguments.quick else _METHODS
    report.note(
        "A training step: value_and_grad of the loss, AOT compiled. Each build starts "
        "from empty caches, as that of a script does. The adjoint is the only "
        "difference between the first two rows of an example."
    )
    records: list[dict[str, Any]] = []
    for name in arguments.only or EXAMPLES:
        found = _measure(clock, name, methods, seconds, repeats)
        report.budgets.extend(budgets(found[1], name, DIFFRAX.name, _LIMITS))
        records.extend(found)
    report.table("Diffrax's documentation examples", _COLUMNS, records)
    for index, method in enumerate(methods[1:], start=1):
        ratios = [r["time_ratio"] for r in records[index :: len(methods)]]
        what, case = f"median time of {method.name}", f"{len(ratios)} examples"
        ratio = statistics.median(ratios)
        budget = Budget(what, case, DIFFRAX.name, ratio, _MEDIAN_TIME)
        report.budgets.append(budget)


def _measure(
    clock: Clock, name: str, methods: Sequence[Method], seconds: float, repeats: int
) -> list[dict[str, Any]]:
    """Compiles, times and compares the methods. Returns a record for each of them."""
    args, programs, times = compile_and_time(clock, name, methods, seconds, repeats)
    results = {method: program.run(*args) for method, program in programs.items()}
    gradients = {method: gradient for method, (_, gradient) in results.items()}
    return [
        {
            "section": name,
            **record,
            "loss": _finite(
                results[record["method"]][0], f"{name}, {record['method']}"
            ),
        }
        for record in measured(programs, times, gradients)
    ]


def compile_and_time(
    clock: Clock, name: str, methods: Sequence[Method], seconds: float, repeats: int
) -> tuple[tuple[Any, Any], dict[str, Program], dict[str, float]]:
    """Parameters and data of an example, and programs and seconds of each method."""
    example = EXAMPLES[name]()
    params, static = eqx.partition(example.params, eqx.is_inexact_array)
    args = params, example.data
    makers = {m.name: partial(_training_step, example, static, m) for m in methods}
    programs = compile_in_turns(clock, makers, args, repeats)
    runs = {method: partial(p.run, *args) for method, p in programs.items()}
    return args, programs, time_in_turns(clock, runs, seconds=seconds * len(runs))


def _training_step(example: Example, static: Any, method: Method) -> Callable[..., Any]:
    """`(params, data) -> (loss, gradient)`, of which no trace is in a cache."""
    jax.clear_caches()
    solve = partial(method.solve, adjoint=method.make_adjoint(4096))

    def value(params, data):
        return example.loss(eqx.combine(params, static), data, solve)

    return jax.value_and_grad(value)


def _finite(loss: jax.Array, where: str) -> float:
    """The loss, which no failed solve may have made infinite."""
    if not math.isfinite(loss):
        msg = f"{where}: the loss is {loss}"
        raise FloatingPointError(msg)
    return float(loss)


# The examples. First, what more than one of them learns from.


def spirals(ts: jax.Array, key: jax.Array, samples: int) -> jax.Array:
    """Curves in the plane that wind inwards: samples, times, coordinates."""
    angle_key, radius_key = jr.split(key)
    angles = 2 * jnp.pi * jr.uniform(angle_key, (samples, 1)) - 2 * ts
    radii = jr.uniform(radius_key, (samples, 1), minval=0.5) * jnp.exp(-0.3 * ts)
    return radii[..., None] * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _mean_square(tree: jax.Array) -> jax.Array:
    return jnp.mean(tree**2)


class NetworkField(eqx.Module):
    """A network of the state, as a vector field."""

    network: eqx.nn.MLP

    def __call__(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        """Of the state alone."""
        del t, args
        return self.network(y)


def neural_ode() -> Example:
    """Fits a network to spirals, 32 at a time."""
    key, data_key = jr.split(jr.key(0))
    network = eqx.nn.MLP(2, 2, 64, 2, activation=jax.nn.softplus, key=key)
    ts = jnp.linspace(0.0, 5.0, 50)

    def loss(field, data, solve):
        ts, curves = data

        def predict(start):
            return solve(
                diffrax.ODETerm(field),
                diffrax.Tsit5(),
                ts[0],
                ts[-1],
                ts[1] - ts[0],
                start,
                saveat=diffrax.SaveAt(ts=ts),
                stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            ).ys

        return _mean_square(jax.vmap(predict)(curves[:, 0]) - curves)

    return Example(NetworkField(network), (ts, spirals(ts, data_key, 32)), loss)


class LatentODE(eqx.Module):
    """A recurrent encoder, a differential equation of its code, and a decoder."""

    encoder: eqx.nn.GRUCell
    to_code: eqx.nn.Linear
    from_code: eqx.nn.MLP
    field: NetworkField
    decoder: eqx.nn.Linear
    hidden: int = eqx.field(static=True)

    def __init__(self, hidden: int, code: int, width: int, key: jax.Array):
        keys = jr.split(key, 5)
        self.encoder = eqx.nn.GRUCell(3, hidden, key=keys[0])
        self.to_code = eqx.nn.Linear(hidden, 2 * code, key=keys[1])
        self.from_code = eqx.nn.MLP(code, hidden, width, 2, key=keys[2])
        network = eqx.nn.MLP(
            hidden, hidden, width, 2, jax.nn.softplus, jnp.tanh, key=keys[3]
        )
        self.field = NetworkField(network)
        self.decoder = eqx.nn.Linear(hidden, 2, key=keys[4])
        self.hidden = hidden

    def encode(self, ts: jax.Array, ys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean of the code and its log standard deviation, last point first."""
        points = jnp.concatenate([ts[:, None], ys], axis=1)
        read = lambda state, point: (self.encoder(point, state), None)
        state, _ = jax.lax.scan(read, jnp.zeros(self.hidden), points, reverse=True)
        mean, log_std = jnp.split(self.to_code(state), 2)
        return mean, log_std

    def decode(self, ts: jax.Array, code: jax.Array, solve: Solve) -> jax.Array:
        """The curve that the code stands for."""
        states = solve(
            diffrax.ODETerm(self.field),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            0.4,
            self.from_code(code),
            saveat=diffrax.SaveAt(ts=ts),
        ).ys
        return jax.vmap(self.decoder)(states)


def latent_ode() -> Example:
    """Fits an autoencoder to spirals seen at irregular times."""
    model_key, time_key, data_key, key = jr.split(jr.key(1), 4)
    samples = 16
    ts = 3 * jnp.sort(jr.uniform(time_key, (samples, 20)), axis=1)
    curves = spirals(ts, data_key, samples)

    def loss(model, data, solve):
        def of_sample(ts, ys, key):
            mean, log_std = model.encode(ts, ys)
            code = mean + jnp.exp(log_std) * jr.normal(key, mean.shape)
            misfit = _mean_square(model.decode(ts, code, solve) - ys)
            spread = mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1
            return misfit + 0.5e-2 * jnp.sum(spread)

        return jnp.mean(jax.vmap(of_sample)(*data))

    model = LatentODE(16, 8, 16, model_key)
    return Example(model, (ts, curves, jr.split(key, samples)), loss)


class NeuralCDE(eqx.Module):
    """A classifier of paths: the response to a path, and the odds it ends with."""

    start: eqx.nn.MLP
    network: eqx.nn.MLP
    readout: eqx.nn.Linear
    hidden: int = eqx.field(static=True)

    def __init__(self, channels: int, hidden: int, width: int, key: jax.Array):
        keys = jr.split(key, 3)
        self.start = eqx.nn.MLP(channels, hidden, width, 1, key=keys[0])
        size = hidden * channels
        self.network = eqx.nn.MLP(
            hidden, size, width, 1, jax.nn.softplus, jnp.tanh, key=keys[1]
        )
        self.readout = eqx.nn.Linear(hidden, "scalar", key=keys[2])
        self.hidden = hidden

    def vector_field(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        """The response to each channel."""
        del t, args
        return self.network(y).reshape(self.hidden, -1)

    def solution(self, ts: jax.Array, coefficients: Any, solve: Solve) -> Any:
        """The response to the path that has these coefficients."""
        control = diffrax.CubicInterpolation(ts, coefficients)
        # Steps across the kinks of the control are rejected, or not, by rounding.
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-3, atol=1e-6), step_ts=ts
        )
        return solve(
            diffrax.ControlTerm(self.vector_field, control).to_ode(),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            None,
            self.start(control.evaluate(ts[0])),
            stepsize_controller=controller,
        )

    def logit(self, ts: jax.Array, coefficients: Any, solve: Solve) -> jax.Array:
        """The log odds that the path turns to the left."""
        return self.readout(self.solution(ts, coefficients, solve).ys[-1])


def neural_cde() -> Example:
    """Tells spirals that turn to the left from those that turn to the right."""
    model_key, data_key = jr.split(jr.key(2))
    samples = 16
    ts = jnp.linspace(0.0, 3.0, 25)
    curves = spirals(ts, data_key, samples)
    is_left = jnp.arange(samples) % 2
    curves = curves.at[::2, :, 1].multiply(-1)
    times = jnp.broadcast_to(ts[:, None], (samples, len(ts), 1))
    paths = jnp.concatenate([times, curves], axis=-1)
    interpolate = partial(diffrax.backward_hermite_coefficients, ts)
    coefficients = jax.jit(jax.vmap(interpolate))(paths)

    def loss(model, data, solve):
        ts, coefficients, is_left = data
        logits = jax.vmap(lambda c: model.logit(ts, c, solve))(coefficients)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, is_left))

    return Example(NeuralCDE(3, 8, 32, model_key), (ts, coefficients, is_left), loss)


class _ConcatSquash(eqx.Module):
    """A linear layer that time scales and shifts."""

    linear: eqx.nn.Linear
    gate: eqx.nn.Linear
    shift: eqx.nn.Linear

    def __init__(self, size: int, out_size: int, key: jax.Array):
        keys = jr.split(key, 3)
        self.linear = eqx.nn.Linear(size, out_size, key=keys[0])
        self.gate = eqx.nn.Linear("scalar", out_size, key=keys[1])
        self.shift = eqx.nn.Linear("scalar", out_size, use_bias=False, key=keys[2])

    def __call__(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return self.linear(y) * jax.nn.sigmoid(self.gate(t)) + self.shift(t)


class _Flow(eqx.Module):
    """The vector field of a flow, and what it does to the logarithm of a density."""

    layers: list[_ConcatSquash]

    def __init__(self, sizes: Sequence[int], key: jax.Array):
        keys = jr.split(key, len(sizes) - 1)
        pairs = zip(sizes[:-1], sizes[1:], keys, strict=True)
        self.layers = [_ConcatSquash(*sizes__key) for sizes__key in pairs]

    def velocity(self, t: jax.Array, y: jax.Array) -> jax.Array:
        """Of one point."""
        *hidden, last = self.layers
        for layer in hidden:
            y = jnp.tanh(layer(t, y))
        return last(t, y)

    def vector_field(
        self, t: jax.Array, state: tuple[jax.Array, jax.Array], args: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The velocity and its divergence, exactly."""
        del args
        y, _ = state
        velocity, pullback = jax.vjp(partial(self.velocity, t), y)
        (jacobian,) = jax.vmap(pullback)(jnp.eye(y.size))
        return velocity, jnp.trace(jacobian)


def continuous_normalising_flow() -> Example:
    """Fits the density of points on a noisy ring, by going back to a normal one."""
    model_key, angle_key, noise_key = jr.split(jr.key(3), 3)
    samples, t0, t1, size = 64, 0.0, 0.5, 0.05
    angles = 2 * jnp.pi * jr.uniform(angle_key, (samples,))
    points = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    points += 0.1 * jr.normal(noise_key, points.shape)

    def loss(flow, points, solve):
        def log_density(point):
            term = diffrax.ODETerm(flow.vector_field)
            state = point, jnp.zeros(())
            sol = solve(term, diffrax.Tsit5(), t1, t0, -size, state)
            (start,), (change,) = sol.ys
            return jnp.sum(normal.logpdf(start)) + change

        return -jnp.mean(jax.vmap(log_density)(points))

    return Example(_Flow((2, 32, 32, 2), model_key), points, loss)


def coupled_oscillators() -> Example:
    """Fits the springs of a chain of ten oscillators to their motion."""
    count = 10
    ts = jnp.linspace(0.0, 10.0, 50)
    start = jr.normal(jr.key(4), (count,))
    # With springs of stiffness 1 between walls: a sum of its modes.
    stiffness = 2 * jnp.eye(count) - jnp.eye(count, k=1) - jnp.eye(count, k=-1)
    squares, modes = jnp.linalg.eigh(stiffness)
    motion = jnp.cos(ts[:, None] * jnp.sqrt(squares)) * (start @ modes) @ modes.T

    def vector_field(t, state, params):
        del t
        springs, damping = params
        positions, velocities = state
        forces = springs * jnp.diff(jnp.pad(positions, 1))
        return velocities, jnp.diff(forces) - damping * velocities

    def loss(params, data, solve):
        ts, motion = data
        positions, _ = solve(
            diffrax.ODETerm(vector_field),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            0.1,
            (motion[0], jnp.zeros_like(motion[0])),
            params,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        ).ys
        return _mean_square(positions - motion)

    params = jnp.linspace(0.8, 1.1, count + 1), jnp.full((count,), 0.05)
    return Example(params, (ts, motion), loss)


def forcing() -> Example:
    """Fits an oscillator and the force on it, which is given at 50 times."""
    ts = jnp.linspace(0.0, 10.0, 50)
    displacements = jnp.sin(ts) * jnp.exp(-0.1 * ts)
    params = jnp.array([1.2, 0.1]), 0.3 * jnp.cos(ts)

    def loss(params, data, solve):
        ts, displacements = data
        constants, values = params
        force = diffrax.LinearInterpolation(ts, values)

        def vector_field(t, y, args):
            constants, force = args
            stiffness, damping = constants
            slope = force.evaluate(t) - stiffness * y[0] - damping * y[1]
            return jnp.stack([y[1], slope])

        ys = solve(
            diffrax.ODETerm(vector_field),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            ts[1] - ts[0],
            jnp.array([0.0, 1.0]),
            (constants, force),
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        ).ys
        return _mean_square(ys[:, 0] - displacements)

    return Example(params, (ts, displacements), loss)


class _KalmanFilter(eqx.Module):
    """The estimate of a linear system's state, and its covariance (Kalman, Bucy)."""

    process_root: jax.Array
    measurement_root: jax.Array

    def __call__(
        self, t: Any, state: tuple[jax.Array, jax.Array], args: Any
    ) -> tuple[jax.Array, jax.Array]:
        transition, observation, measured = args
        estimate, covariance = state
        process_noise = self.process_root @ self.process_root.T
        measurement_noise = self.measurement_root @ self.measurement_root.T
        gain = covariance @ observation.T @ jnp.linalg.inv(measurement_noise)
        surprise = measured.evaluate(t) - observation @ estimate
        growth = transition @ covariance
        change = growth + growth.T + process_noise
        change -= gain @ measurement_noise @ gain.T
        return transition @ estimate + gain @ surprise, change


def kalman_filter() -> Example:
    """Fits the noises that a filter assumes, for an oscillator seen through noise."""
    ts = jnp.linspace(0.0, 5.0, 250)
    decay = jnp.exp(-0.3 * ts)
    truth = jnp.stack([decay * jnp.cos(ts), -decay * jnp.sin(ts)], axis=1)
    observation = jnp.array([[0.0, 1.0]])
    measured = truth @ observation.T + 0.3 * jr.normal(jr.key(5), (len(ts), 1))
    transition = jnp.array([[0.0, 1.0], [-1.0, -1.4]])

    def loss(model, data, solve):
        ts, truth, measured, transition, observation = data
        estimates, _ = solve(
            diffrax.ODETerm(model),
            diffrax.Dopri5(),
            ts[0],
            ts[-1],
            0.02,
            (jnp.zeros(2), 10.0 * jnp.eye(2)),
            (transition, observation, diffrax.LinearInterpolation(ts, measured)),
            saveat=diffrax.SaveAt(ts=ts),
        ).ys
        return _mean_square(estimates - truth)

    model = _KalmanFilter(0.1 * jnp.eye(2), jnp.eye(1))
    return Example(model, (ts, truth, measured, transition, observation), loss)


def nonlinear_heat_equation() -> Example:
    """Finds the temperatures that a profile comes from, on a rod of 40 points."""
    xs = jnp.linspace(-1.0, 1.0, 40)
    spacing = xs[1] - xs[0]

    def vector_field(t, y, args):
        del t, args
        curvature = jnp.diff(jnp.pad(y, 1, mode="edge"), 2) / spacing**2
        return (1 - y) * curvature

    def loss(start, profile, solve):
        final = solve(
            diffrax.ODETerm(vector_field),
            diffrax.Kvaerno3(),
            0.0,
            1.0,
            1e-3,
            start,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        ).ys[-1]
        return _mean_square(final - profile)

    return Example(0.5 - 0.4 * xs**2, 0.3 + 0.1 * xs, loss)


def robertson() -> Example:
    """Fits the three rate constants of a stiff reaction to what it is known to do."""
    ts = jnp.array([0.4, 4.0, 40.0])
    left = jnp.array([0.98517, 0.90552, 0.71583])
    start = jnp.array([1.0, 0.0, 0.0])

    def loss(log_rates, data, solve):
        ts, left = data
        ys = solve(
            diffrax.ODETerm(robertson_field),
            diffrax.Kvaerno5(),
            0.0,
            ts[-1],
            2e-4,
            start,
            jnp.exp(log_rates),
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
        ).ys
        return _mean_square(ys[:, 0] - left)

    log_rates = jnp.log(jnp.array([0.05, 2e7, 1.2e4]))
    return Example(log_rates, (ts, left), loss)


class _NeuralSDE(eqx.Module):
    """A path of a neural stochastic differential equation, from a random start."""

    start: eqx.nn.MLP
    drift: eqx.nn.MLP
    diffusion: eqx.nn.MLP
    readout: eqx.nn.Linear
    noises: int = eqx.field(static=True)

    def __init__(self, hidden: int, noises: int, width: int, key: jax.Array):
        keys = jr.split(key, 4)
        network = lambda size, key: eqx.nn.MLP(
            hidden + 1, size, width, 1, jax.nn.silu, jnp.tanh, key=key
        )
        self.start = eqx.nn.MLP(noises, hidden, width, 1, key=keys[0])
        self.drift = network(hidden, keys[1])
        self.diffusion = network(hidden * noises, keys[2])
        self.readout = eqx.nn.Linear(hidden, 1, key=keys[3])
        self.noises = noises

    def drift_at(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        """The deterministic part."""
        del args
        return self.drift(_with_time(t, y))

    def diffusion_at(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        """The response to each noise."""
        del args
        return self.diffusion(_with_time(t, y)).reshape(-1, self.noises)

    def path(self, ts: jax.Array, key: jax.Array, solve: Solve) -> jax.Array:
        """Its values at `ts`."""
        start_key, path_key = jr.split(key)
        t0, t1, size = ts[0], ts[-1], 0.1
        brownian = diffrax.VirtualBrownianTree(
            t0, t1, size / 2, (self.noises,), path_key
        )
        sol = solve(
            diffrax.MultiTerm(
                diffrax.ODETerm(self.drift_at),
                diffrax.ControlTerm(self.diffusion_at, brownian),
            ),
            diffrax.Heun(),
            t0,
            t1,
            size,
            self.start(jr.normal(start_key, (self.noises,))),
            saveat=diffrax.SaveAt(ts=ts),
        )
        return jax.vmap(self.readout)(sol.ys)[:, 0]


def _with_time(t: Any, y: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.asarray(t, y.dtype)[None], y])


def neural_sde() -> Example:
    """Fits the moments of 32 random paths to those of an Ornstein-Uhlenbeck process."""
    model_key, key = jr.split(jr.key(6))
    ts = jnp.linspace(0.0, 4.0, 32)
    means, deviations = jnp.exp(-ts), 0.5 * jnp.sqrt(1 - jnp.exp(-2 * ts))

    def loss(model, data, solve):
        ts, means, deviations, keys = data
        paths = jax.vmap(lambda ts, key: model.path(ts, key, solve))(ts, keys)
        misfit = _mean_square(jnp.mean(paths, axis=0) - means)
        return misfit + _mean_square(jnp.std(paths, axis=0) - deviations)

    # Every path has its own times, as those of irregular data would.
    data = jnp.tile(ts, (32, 1)), means, deviations, jr.split(key, 32)
    return Example(_NeuralSDE(8, 3, 16, model_key), data, loss)


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "neural ODE": neural_ode,
    "latent ODE": latent_ode,
    "neural CDE": neural_cde,
    "continuous normalising flow": continuous_normalising_flow,
    "coupled oscillators": coupled_oscillators,
    "forcing": forcing,
    "Kalman filter": kalman_filter,
    "nonlinear heat equation": nonlinear_heat_equation,
    "Robertson": robertson,
    "neural SDE": neural_sde,
}
