"""A convolution as vector field: an image taken forwards in time and back again."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from benchmarks.measure import relative_error
from benchmarks.training_tasks import split_digits
from matplotlib.axes import Axes

from . import data
from .experiment import (
    across_seeds,
    Claim,
    Experiment,
    Report,
    Result,
    Setting,
    spread,
    Table,
)


# The activation, the standard deviation of the kernel, and the end time.
CASES = (
    ("tanh", 1.0, 5.0),
    ("tanh", 0.5, 5.0),
    ("linear", 0.5, 5.0),
    ("relu", 1.0, 5.0),
    ("tanh", 0.5, 1.0),
)
_ACTIVATIONS = {"tanh": jnp.tanh, "linear": lambda x: x, "relu": jax.nn.relu}


def _both_ways(image: Any, kernel: Any, activation: str, t1: float, tol: Any) -> Any:
    """The final state, and what the solve backwards makes of it."""

    def field(t: Any, z: Any, args: Any) -> Any:
        del t, args
        # The same as a convolution with the kernel flipped, padded with zeros.
        z = jnp.pad(z, 1)
        rows, columns = image.shape
        shifted = [
            kernel[i, j] * z[i : i + rows, j : j + columns]
            for i in range(3)
            for j in range(3)
        ]
        return _ACTIVATIONS[activation](sum(shifted))

    def solve(y0: Any, t0: float, t1: float) -> Any:
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            t0,
            t1,
            None,
            y0,
            stepsize_controller=diffrax.PIDController(*tol),
            max_steps=4096,
            throw=False,
        )
        assert sol.ys is not None
        return sol.ys[0]

    end = solve(image, 0.0, t1)
    return end, solve(end, t1, 0.0)


def _reconstruct(
    activation: str, deviation: float, t1: float, folder: Path | None, seed: int
) -> Result:
    if folder is None:
        # Each point is made 16 points.
        image = np.kron(split_digits()[0][seed, 0], np.ones((4, 4)))
    else:
        image = data.mnist(folder)["test_images"][seed] / 255
    kernel = deviation * jr.normal(jr.key(seed), (3, 3))
    image = jnp.asarray(image, kernel.dtype)
    run = jax.jit(partial(_both_ways, activation=activation, t1=t1, tol=(1e-3, 1e-6)))
    end, back = run(image, kernel)
    images = {"image": image, "end": end, "back": back}
    shown = {name: np.asarray(x).tolist() for name, x in images.items()}
    return {"error": relative_error(back, image), **shown}


def _tasks(setting: Setting) -> dict[str, Any]:
    # A smoke run needs no data.
    folder = None if setting.size == "smoke" else data.folder(setting.data)
    return {
        f"{_name(case)}-seed{seed}": partial(_reconstruct, *case, folder, seed)
        for case in (CASES[:1] if setting.size == "smoke" else CASES)
        for seed in range(setting.seeds)
    }


def _name(case: tuple[str, float, float]) -> str:
    return f"{case[0]}-{case[1]:g}-{case[2]:g}"


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    cases = CASES[:1] if setting.size == "smoke" else CASES
    errors = {
        case: [r["error"] for r in across_seeds(results, _name(case))] for case in cases
    }
    rows = [[*case, spread(values)] for case, values in errors.items()]
    columns = "g", "sigma", "T", "relative error of the image"
    table = Table("z' = g(K * z), from 0 to T and back", columns, rows)
    claims = tuple(_claim(case, errors[case]) for case in cases[:2])
    notes = (
        "One MNIST image (in a smoke run a smaller digit, enlarged) and a random "
        "kernel K of 3 x 3 numbers, normal with standard deviation sigma, for each "
        "seed; the slides' image and kernel are unknown.",
        "Dopri5 with the default tolerances of MATLAB's ode45, 1e-3 and 1e-6. ACA "
        "stores the states, so there is nothing to reconstruct.",
    )
    shown = results[f"{_name(cases[0])}-seed0"]
    titles = {"image": "image", "end": "solution at T = 5", "back": "solved back"}
    figures = {title: partial(_draw, shown[name]) for name, title in titles.items()}
    return Report((table,), claims, figures, notes)


def _claim(case: tuple[str, float, float], errors: list[float]) -> Claim:
    activation, deviation, t1 = case
    return Claim(
        "the solve backwards does not give the image again "
        f"({activation}, sigma {deviation:g}, T = {t1:g})",
        "a figure: another image",
        f"relative error {spread(errors)}",
        float(np.median(errors)) > 0.1,
        "with kernels this small the solve backwards mostly succeeds",
    )


def _draw(image: Any, axes: Axes) -> None:
    axes.imshow(np.asarray(image), cmap="gray")
    axes.set_axis_off()


EXPERIMENT = Experiment(
    name="image",
    title="A convolution ODE: an image reconstructed in reverse time",
    source="ACA, the reconstruction of an image",
    tasks=_tasks,
    report=_report,
)
