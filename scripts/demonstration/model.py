"""The classifier: a convolution, a neural ODE from t = 0 to 1, a linear layer."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import nodegrad


Images = Float[Array, "batch 1 8 8"]
Features = Float[Array, "batch height width channels"]

CHANNELS = 16
TOLERANCE = 1e-2
MAX_STEPS = 64


class Solve(eqx.Module):
    """How the ODE is solved: by default as in training.

    - `driver`: `nodegrad.odesolve` or `diffrax.diffeqsolve`.
    - `dt0`: the size of fixed steps; `None` stands for steps adapted to `tolerance`.
    """

    driver: Callable[..., Any] = nodegrad.odesolve
    adjoint: diffrax.AbstractAdjoint = nodegrad.ACAAdjoint()
    solver: diffrax.AbstractSolver = diffrax.Heun()
    tolerance: Any = TOLERANCE
    dt0: float | None = None
    max_steps: int = MAX_STEPS

    def __call__(self, field: Callable[..., Any], y0: Features) -> tuple[Features, Any]:
        """The state at t = 1, and the statistics of the solve.

        The whole batch is one state, as in the ACA paper: all digits take the same
        steps. `odesolve(..., batched=True)` would give each digit its own steps.
        """
        controller = diffrax.ConstantStepSize()
        if self.dt0 is None:
            controller = diffrax.PIDController(self.tolerance, self.tolerance)
        sol = self.driver(
            diffrax.ODETerm(field),
            self.solver,
            0.0,
            1.0,
            self.dt0,
            y0,
            stepsize_controller=controller,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
        )
        return sol.ys[-1], sol.stats


def _neighbourhoods(x: Features) -> Features:
    """The channels of the 3 x 3 pixels around every pixel."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    shifted = [x[:, i : i + height, j : j + width] for i, j in shifts]
    return jnp.concatenate(shifted, axis=-1)


class VectorField(eqx.Module):
    """Two convolutions; the time is one more input channel of the first.

    Each is an `eqx.nn.Linear` on neighbourhoods of pixels. Inside a loop on a CPU, the
    convolution of XLA (`eqx.nn.Conv2d`) takes several times longer. Batch normalisation
    must not be used here: the vector field would then differ between batches.
    """

    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.inner = eqx.nn.Linear(9 * (CHANNELS + 1), CHANNELS, key=key1)
        self.outer = eqx.nn.Linear(9 * CHANNELS, CHANNELS, key=key2)

    def __call__(self, t: Any, y: Features, args: None) -> Features:
        """The time derivative of the features."""
        del args
        time = jnp.broadcast_to(jnp.asarray(t, y.dtype), (*y.shape[:-1], 1))
        hidden = self._convolve(self.inner, jnp.concatenate([y, time], axis=-1))
        return self._convolve(self.outer, jnp.tanh(hidden))

    def _convolve(self, layer: eqx.nn.Linear, x: Features) -> Features:
        inputs = _neighbourhoods(x).reshape(-1, layer.weight.shape[1])
        return jax.vmap(layer)(inputs).reshape(*x.shape[:-1], -1)


class Classifier(eqx.Module):
    """A convolution, the ODE, a linear layer."""

    stem: eqx.nn.Conv2d
    field: VectorField
    head: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.stem = eqx.nn.Conv2d(1, CHANNELS, 4, stride=2, padding=1, key=key1)
        self.field = VectorField(key=key2)
        self.head = eqx.nn.Linear(4 * 4 * CHANNELS, 10, key=key3)

    def __call__(
        self, images: Images, solve: Solve
    ) -> tuple[Float[Array, "b 10"], Any]:
        """The logits, and the statistics of the solve."""
        y0 = jnp.moveaxis(jax.vmap(self.stem)(images), 1, -1)
        y1, stats = solve(self.field, y0)
        # GELU is smooth. The gradient jumps at a kink: the gradients of two solves that
        # disagree on the sign at a single ReLU can differ by some percent.
        return jax.vmap(self.head)(jax.nn.gelu(y1).reshape(len(y1), -1)), stats
