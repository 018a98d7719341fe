"""Trajectories of MuJoCo's hopper, or of a double pendulum that stands in for it."""

import importlib
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from . import data


LENGTH = 100


def load(folder: Path | None, count: int) -> tuple[str, Any]:
    """What it is, and `count` trajectories of 100 samples, normalised.

    The hopper is simulated if its model is in the folder and `mujoco` is installed.
    """
    try:
        mujoco = importlib.import_module("mujoco")
    except ImportError:
        mujoco = None
    if mujoco is None or folder is None or not (folder / "hopper").is_dir():
        name, series = "double pendulum", _double_pendulum(count)
    else:
        path = data.find(folder, "hopper/hopper.xml", "dm_control's suite")
        name, series = "hopper", _hopper(mujoco, path, count)
    mean, scale = series.mean((0, 1)), series.std((0, 1))
    return name, ((series - mean) / scale).astype(np.float32)


def _hopper(mujoco: Any, path: Path, count: int) -> Any:
    """As in the published code: random positions and velocities, no control."""
    rng, model = np.random.RandomState(123), mujoco.MjModel.from_xml_path(str(path))
    state, found = mujoco.MjData(model), []
    for _ in range(count):
        mujoco.mj_resetData(model, state)
        state.qpos[:2] = rng.uniform(0, 0.5, 2)
        state.qpos[2:] = rng.uniform(-2, 2, model.nq - 2)
        state.qvel[:] = rng.uniform(-5, 5, model.nv)
        rows = []
        for _ in range(200):
            mujoco.mj_step(model, state)
            rows.append(np.concatenate([state.qpos, state.qvel]))
        # A random window of consecutive samples.
        start = rng.randint(0, 200 - LENGTH + 1)
        found.append(rows[start : start + LENGTH])
    return np.asarray(found)


def _double_pendulum(count: int) -> Any:
    """Two equal rods with friction: sines and cosines of the angles, velocities."""

    def field(t: Any, y: Any, args: Any) -> Any:
        del t, args
        a, b, u, v = y
        sine, cosine = jnp.sin(a - b), jnp.cos(a - b)
        first = -(v**2) * sine - 2 * jnp.sin(a) - 0.1 * u
        second = u**2 * sine - jnp.sin(b) - 0.1 * v
        determinant = 2 - cosine**2
        return jnp.stack(
            [
                u,
                v,
                (first - cosine * second) / determinant,
                (2 * second - cosine * first) / determinant,
            ]
        )

    @jax.jit
    @jax.vmap
    def solve(y0: Any) -> Any:
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            5.0,
            0.025,
            y0,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 5.0, LENGTH)),
        ).ys
        assert ys is not None
        angles = ys[:, :2]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles), ys[:, 2:]], axis=1)

    y0 = jr.uniform(jr.PRNGKey(123), (count, 4), minval=-2.0, maxval=2.0)
    return np.asarray(solve(y0))
