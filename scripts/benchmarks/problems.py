"""Initial value problems to take gradients of."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr


@dataclass(frozen=True)
class Problem:
    """`y' = vector_field(t, y, args)` over `[0, t1]`, and how its steps are chosen.

    With `pinned` the tolerance is so loose that the greatest step size allowed decides:
    the number of steps is known, and every method takes the same ones.
    """

    name: str
    vector_field: Callable[[Any, Any, Any], Any]
    y0: jax.Array
    args: Any
    t1: float
    tolerance: float = 0.1
    pinned: bool = True
    max_steps: int = 4096
    solver: diffrax.AbstractSolver = diffrax.Tsit5()

    def controller(self, kind: str, size: Any) -> diffrax.AbstractStepSizeController:
        """The step size controller: `"adaptive"` or `"constant"`."""
        if kind == "constant":
            return diffrax.ConstantStepSize()
        return diffrax.PIDController(
            rtol=self.tolerance,
            atol=self.tolerance,
            dtmax=size if self.pinned else None,
        )


def loss(ys: Any) -> jax.Array:
    """Of the final state, whatever its batch axes."""
    return jnp.mean(ys**2)


def lotka_volterra() -> Problem:
    """Two states: prey and predator."""

    def vector_field(t, y, args):
        del t
        births, hunted, fed, deaths = args
        prey, predator = y[0], y[1]
        return jnp.stack(
            [
                births * prey - hunted * prey * predator,
                fed * prey * predator - deaths * predator,
            ]
        )

    y0, args = jnp.array([1.0, 0.5]), jnp.array([1.5, 1.0, 1.0, 3.0])
    return Problem("Lotka-Volterra", vector_field, y0, args, t1=2.0)


def perceptron(size: int, width: int, batch: int) -> Problem:
    """A network with two hidden layers; the batch is part of the state."""
    key, *keys = jr.split(jr.key(0), 4)
    sizes = [(size, width), (width, width), (width, size)]
    args = [
        (jr.normal(k, shape) / jnp.sqrt(shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, sizes, strict=True)
    ]
    y0 = jr.normal(key, (batch, size))
    name = f"dim {size}, width {width}, batch {batch}"
    return Problem(name, _perceptron_field, y0, args, t1=1.0)


def _perceptron_field(t, y, args):
    del t
    *hidden, (weight, bias) = args
    for hidden_weight, hidden_bias in hidden:
        y = jnp.tanh(y @ hidden_weight + hidden_bias)
    return y @ weight + bias


def white_dwarf() -> Problem:
    """The equation of a white dwarf, in the units of Chandrasekhar."""

    def vector_field(t, y, c):
        slope = -((y[0] ** 2 - c) ** 1.5) - 2 * y[1] / (t + 0.5)
        return jnp.stack([y[1], slope])

    y0, c = jnp.array([1.0, 0.0]), jnp.array(1e-3)
    return Problem("white dwarf equation", vector_field, y0, c, t1=5.0)


def white_dwarf_network(batch: int) -> Problem:
    """A network for that equation, as before training: `(t, y)` to 10 units to 2.

    A single sample is a vector; more are a batch that is part of the state.
    """
    *keys, key = jr.split(jr.key(0), 3)
    sizes = [(3, 10), (10, 2)]
    args = [
        (jr.normal(k, shape) / jnp.sqrt(shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, sizes, strict=True)
    ]

    def vector_field(t, y, args):
        time = jnp.broadcast_to(t, (*y.shape[:-1], 1))
        return _perceptron_field(t, jnp.concatenate([time, y], axis=-1), args)

    y0 = jnp.array([1.0, 0.0])
    if batch > 1:
        y0 = y0 + 0.1 * jr.normal(key, (batch, 2))
    name = f"white dwarf network, batch {batch}"
    return Problem(name, vector_field, y0, args, t1=5.0)


def uneven_lanes(lanes: int) -> Problem:
    """Samples that take different numbers of steps, and reject some."""
    problem = perceptron(4, 64, lanes)
    return replace(
        problem,
        name=f"{lanes} adaptive lanes, dim 4, width 64, tolerance 1e-5",
        y0=problem.y0 * jnp.linspace(0.1, 3.0, lanes)[:, None],
        args=jax.tree.map(lambda x: 2 * x, problem.args),
        t1=2.0,
        tolerance=1e-5,
        pinned=False,
    )


def decay(size: int, max_steps: int) -> Problem:
    """As little work, and as few parameters, as a state of this size can have."""

    def vector_field(t, y, args):
        del t
        return -args * y

    name = f"decay, dim {size}"
    y0 = jnp.linspace(0.5, 1.5, size)
    return Problem(name, vector_field, y0, jnp.array(0.7), 1.0, max_steps=max_steps)


def robertson_field(t: Any, y: Any, rates: Any) -> jax.Array:
    """The three reactions of Robertson (1966), with their rate constants."""
    del t
    slow = rates[0] * y[0] - rates[2] * y[1] * y[2]
    fast = rates[1] * y[1] ** 2
    return jnp.stack([-slow, slow - fast, fast])
