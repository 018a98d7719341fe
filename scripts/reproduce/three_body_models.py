"""The three-body problem of ACA's published code, and the models fitted to it."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import nodegrad

from .methods import naive_path


MASSES = np.array([1.1, 1.1, 0.9])
# Both follow from the published units: lengths, velocities, masses, and the time.
_GRAVITY, _VELOCITY = 0.2004844, 7.2393239
_POSITIONS = np.array([0, 0.2, 0, 0.5, 0, 0.5, 0, 0, 0.5])
_VELOCITIES = np.array([0, 0.1, 0, 0, 0, 0.1, 0.1, 0, 0])


def _differences(r: Any) -> Any:
    """From body i to body j, of shape `(3, 3, 3)`, and what divides them: 1 for i."""
    difference = r[None] - r[:, None]
    square = jnp.sum(difference**2, axis=-1)
    distance = jnp.sqrt(jnp.where(jnp.eye(3) > 0, jnp.ones_like(square), square))
    return difference, distance[..., None]


def physics(t: Any, y: Any, masses: Any) -> Any:
    """Newton's law; the state has 9 positions and 9 velocities."""
    del t
    difference, distance = _differences(y[:9].reshape(3, 3))
    force = jnp.sum(masses[None, :, None] * difference / distance**3, axis=1)
    return jnp.concatenate([_VELOCITY * y[9:], _GRAVITY * force.reshape(-1)])


def features(r: Any) -> Any:
    """45 numbers: positions, differences, and these over powers of the distance."""
    difference, distance = _differences(r.reshape(3, 3))
    pairs = np.array([0, 0, 1]), np.array([1, 2, 2])
    difference, distance = difference[pairs], distance[pairs]
    powers = [difference / distance**power for power in range(4)]
    return jnp.concatenate([r, *(x.reshape(-1) for x in powers)])


def forces(t: Any, y: Any, layer: Any) -> Any:
    """A linear layer of the features in place of Newton's law."""
    del t
    weight, bias = layer
    return jnp.concatenate([_VELOCITY * y[9:], weight @ features(y[:9]) + bias])


def _random_masses(seed: int) -> Any:
    return jr.uniform(jr.key(seed), (3,), minval=0.9, maxval=1.1)


def _random_layer(seed: int) -> Any:
    # Forces as weak as this leave the bodies nearly on straight lines.
    weight = 0.01 * jr.normal(jr.key(seed), (9, 45))
    return weight, jnp.zeros(9, weight.dtype)


# How to start, the vector field, the tolerance, Adam's learning rate and its decay.
KINDS = {
    "ode": (_random_masses, physics, 1e-7, 0.1, 0.95),
    "node": (_random_layer, forces, 1e-5, 0.01, 0.997),
    "short": (_random_layer, forces, 1e-5, 0.01, 0.99),
}


def solve(
    field: Any, method: str, ts: Any, args: Any, tol: float, max_steps: int = 4096
) -> Any:
    """The states at `ts`, differentiable by one of `METHODS`."""
    y0 = jnp.asarray(np.concatenate([_POSITIONS, _VELOCITIES]), ts.dtype)
    if method == "naive":
        # Three masses are few enough for derivatives forwards.
        return naive_path(field, ts, y0, args, tol, None if field is physics else 32)
    adjoints = {
        "ACA": nodegrad.ACAAdjoint(),
        "adjoint": diffrax.BacksolveAdjoint(),
    }
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        ts[0],
        ts[-1],
        None,
        y0,
        args,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(tol, tol),
        adjoint=adjoints[method],
        max_steps=max_steps,
        throw=False,
    )
    assert sol.ys is not None
    # The rows after a failure are infinite, and so is the loss then.
    return sol.ys


@jax.jit
def positions(ts: Any) -> Any:
    """The true positions at increasing times, the first of which is 0."""
    y0 = jnp.asarray(np.concatenate([_POSITIONS, _VELOCITIES]), ts.dtype)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(physics),
        diffrax.Dopri8(),
        ts[0],
        ts[-1],
        None,
        y0,
        jnp.asarray(MASSES, ts.dtype),
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(1e-12, 1e-12),
        max_steps=4096,
    )
    assert sol.ys is not None
    return sol.ys[:, :9]


def training_data(points: int) -> Any:
    """Times in [0, 1], and the positions."""
    ts = jnp.linspace(0.0, 1.0, points)
    return ts, positions(ts)


def test_times() -> Any:
    """2000 times in [0, 2], between those of the training data."""
    ts = np.linspace(0, 2, 2000)
    ts[1:] = ts[1:] + ts[1] / 2
    return jnp.asarray(ts)


class Recurrent(eqx.Module):
    """An LSTM that predicts the next positions, from positions or from features."""

    cell: eqx.nn.LSTMCell
    read_out: eqx.nn.Linear
    with_features: bool = eqx.field(static=True)

    def __init__(self, key: Any, with_features: bool):
        for_cell, for_read_out = jr.split(key)
        inputs = 45 if with_features else 9
        self.cell = eqx.nn.LSTMCell(inputs, 32, key=for_cell)
        self.read_out = eqx.nn.Linear(32, 9, key=for_read_out)
        self.with_features = with_features

    def _next(self, state: Any, r: Any) -> Any:
        state = self.cell(features(r) if self.with_features else r, state)
        return state, self.read_out(state[0])

    def _start(self, like: Any) -> Any:
        return (jnp.zeros(32, like.dtype),) * 2

    def forced(self, path: Any) -> Any:
        """Predictions of all positions but the first, from the true ones before."""
        step = lambda state, r: self._next(state, r)
        return jax.lax.scan(step, self._start(path), path[:-1])[1]

    def free(self, first: Any, count: int) -> Any:
        """So many positions: the `first` ones, and a continuation from them."""
        warm_up = lambda state, r: self._next(state, r)
        state, predicted = jax.lax.scan(warm_up, self._start(first), first)

        def step(carry: Any, _: Any) -> Any:
            state, r = self._next(*carry)
            return (state, r), carry[1]

        start = state, predicted[-1]
        rest = jax.lax.scan(step, start, None, length=count - len(first))[1]
        return jnp.concatenate([first, rest])
