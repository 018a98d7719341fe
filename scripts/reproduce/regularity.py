"""What the learned dynamics cost, and how regular they are, by the optimiser."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

import nodegrad

from . import training_sets
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
from .optimisers import trainer


METHODS = {
    "adam": {"learning_rate": 1e-2, "weight_decay": 0.0},
    "snopt": {"weight_decay": 0.0},
}
_SAMPLES = 100


@lru_cache
def _measure(iterations: int) -> Any:
    """Evaluations of a solve, and the integral of the squares of field and Jacobian."""
    task = training_sets.make("digits", iterations, None)

    def one(model: Any, image: Any) -> Any:
        def field(t: Any, state: Any, args: Any) -> Any:
            del args
            velocity = lambda y: model.field(t, y, None)
            out = velocity(state[0])
            jacobian = jax.jacfwd(velocity)(state[0])
            return out, jnp.sum(jacobian**2) + jnp.sum(out**2)

        start = jax.nn.relu(model.conv(image)).reshape(-1), jnp.float32(0)
        sol = nodegrad.odesolve(
            field,
            diffrax.Tsit5(),
            jnp.float32(0),
            jnp.float32(1),
            jnp.float32(0.05),
            start,
            max_steps=32,
        )
        assert sol.ys is not None
        return sol.ys[1][0]

    @eqx.filter_jit
    def measure(model: Any) -> Any:
        images = jnp.asarray(task.test[0][:_SAMPLES])
        stats = task.steps(model, task.test)
        evaluations = jnp.mean(stats["num_vector_field_evaluations"])
        squares = jax.vmap(one, in_axes=(None, 0))(model, images)
        return evaluations, jnp.mean(squares)

    return measure


def _train(method: str, iterations: int, seed: int) -> Result:
    made = trainer("digits", method, iterations, None)
    model, found = made.fit(METHODS[method], seed)
    evaluations, squares = map(float, _measure(iterations)(model))
    return {**found, "evaluations": evaluations, "squares": squares}


def _tasks(setting: Setting) -> dict[str, Any]:
    iterations = setting.pick(2, 200, 2000)
    return {
        f"{method}-seed{seed}": partial(_train, method, iterations, seed)
        for method in METHODS
        for seed in range(setting.seeds)
    }


def _report(results: Mapping[str, Result], setting: Setting) -> Report:
    runs = {method: across_seeds(results, method) for method in METHODS}
    of = lambda method, key: [run[key] for run in runs[method]]
    median = lambda method, key: float(np.median(of(method, key)))
    published = {"adam": ("32.0", "323.9"), "snopt": ("26.0", "199.1")}
    rows = [
        [
            method,
            published[method][0],
            spread(of(method, "evaluations")),
            published[method][1],
            spread(of(method, "squares")),
            spread([100 * x for x in of(method, "metric")]),
        ]
        for method in METHODS
    ]
    columns = (
        "method",
        "paper: evaluations",
        "evaluations",
        "paper: regularity",
        "regularity",
        "test accuracy (%)",
    )
    claims = tuple(
        Claim(
            f"SNOpt's dynamics {what} than Adam's",
            f"{published['snopt'][index]} against {published['adam'][index]}",
            f"{median('snopt', key):.3g} against {median('adam', key):.3g}",
            median("snopt", key) < median("adam", key),
            "the cause was not investigated; other data than the paper's",
        )
        for index, (key, what) in enumerate(
            (("evaluations", "take fewer evaluations"), ("squares", "are more regular"))
        )
    )
    notes = (
        f"The 8 x 8 digits of scikit-learn, {setting.pick(2, 200, 2000)} iterations of "
        "128 (the paper does not name its data set). Adam at 0.01, `snopt()` without a "
        "learning rate.",
        "Evaluations of a forward solve of a test image, Tsit5 at 1e-3. Regularity: "
        f"the integral of ||dF/dy||^2 + ||F||^2 over [0, 1] for {_SAMPLES} of them.",
    )
    table = Table("The learned dynamics", columns, rows)
    figures = {"evaluations": partial(_draw, runs)}
    return Report((table,), claims, figures, notes)


def _draw(runs: Mapping[str, list[Result]], axes: Axes) -> None:
    for method, found in runs.items():
        points = [(r["squares"], r["evaluations"]) for r in found]
        axes.plot(*np.asarray(points).T, "o", label=method)
    axes.set(xlabel="regularity", ylabel="evaluations of a solve")
    axes.legend(fontsize=7)


EXPERIMENT = Experiment(
    name="regularity",
    title="Cost and regularity of the learned dynamics",
    source="SNOpt, evaluations and regularity",
    tasks=_tasks,
    report=_report,
    x64=False,
)
