"""Problems with known answers, and oracles that share no code with the package."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import nodegrad


def van_der_pol(t, y, mu):
    """`y'' = mu (1 - y^2) y' - y` as a first-order system."""
    del t
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def forced_pair(t, y, args):
    """A non-autonomous field on a dictionary, for anything that moves with time."""
    return {
        "u": args["a"] * y["v"] * jnp.cos(t),
        "v": -args["b"] * y["u"] + 0.1 * jnp.sin(y["v"]) * t,
    }


PAIR_Y0 = {"u": jnp.array([1.0, 0.5]), "v": jnp.array([0.2, -0.3])}
PAIR_ARGS = {"a": jnp.array(1.3), "b": jnp.array(0.7)}


class Field(eqx.Module):
    """A two-layer perceptron as a vector field."""

    first: jax.Array
    second: jax.Array

    def __init__(self, size, width, key, dtype=jnp.float64):
        key1, key2 = jr.split(key)
        self.first = jr.normal(key1, (width, size), dtype) / jnp.sqrt(
            1.0 * size
        ).astype(dtype)
        self.second = jr.normal(key2, (size, width), dtype) / jnp.sqrt(
            1.0 * width
        ).astype(dtype)

    def __call__(self, t, y, args):
        del t, args
        return self.second @ jnp.tanh(self.first @ y)


def explicit_step(tableau, vector_field, t0, t1, y0, args):
    """One explicit Runge-Kutta step, written down from the definition."""
    h = t1 - t0
    ks = [vector_field(t0, y0, args)]
    for a, c in zip(tableau.a_lower, tableau.c, strict=True):
        increment = [ai * h * k for ai, k in zip(a.tolist(), ks, strict=True)]
        ks.append(vector_field(t0 + c.item() * h, y0 + sum(increment), args))
    return y0 + sum(b * h * k for b, k in zip(tableau.b_sol.tolist(), ks, strict=True))


def unrolled(solver, vector_field, grid, y0, args):
    """The state at the end of a fixed grid, by a plain differentiable scan."""

    def step(y, interval):
        y = explicit_step(solver.tableau, vector_field, *interval, y, args)
        return y, None

    y1, _ = jax.lax.scan(step, y0, (grid[:-1], grid[1:]))
    return y1


def accepted_grid(vector_field, solver, t0, t1, y0, args, controller, dt0=None):
    """The accepted times of an adaptive solve, as a concrete array."""
    sol = nodegrad.odesolve(
        vector_field,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=diffrax.SaveAt(t0=True, steps=True),
        stepsize_controller=controller,
    )
    return sol.ts[: int(sol.stats["num_accepted_steps"]) + 1]


def relative_error(tree, reference):
    """The largest error of any leaf, relative to the largest entry of that leaf."""
    errors = [
        jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-8)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
        if x.size
    ]
    return max(map(float, errors))


def evaluations_per_stage() -> int:
    """How often the pullback of a step evaluates a cheap vector field for each stage.

    Twice where it is a loop over the stages, as everywhere but on GPUs.
    """
    return 1 if jax.default_backend() == "gpu" else 2
