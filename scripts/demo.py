"""Trains a Neural ODE to read handwritten digits, and looks at its gradients.

The set-up is that of the ACA paper (Zhuang et al., ICML 2020), scaled down from
CIFAR10 to the 1797 scanned digits of 8 x 8 pixels that come with scikit-learn:

1. Train with the adaptive Heun-Euler method at a tolerance of 1e-2, through
   `nodegrad.odesolve` and `nodegrad.ACAAdjoint`.
2. Compare the gradient of the trained model with those of Diffrax's adjoints: error,
   run time, compile time and memory.
3. Evaluate the trained model with other solvers, without training it again.

Every number printed is measured in the run that prints it, but for the column of
published ones. A figure goes to `results/demo.png`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nodegrad


Scalar = float | Array | np.ndarray
Images = Float[Array | np.ndarray, "batch 8 8"]
Labels = Int[Array | np.ndarray, " batch"]
Features = Float[Array, "batch height width channels"]
Stats = dict[str, Any]
# Solves the ODE block: from its vector field and the state at t = 0, the state at t = 1
# and the statistics of the solve.
Solve = Callable[["VectorField", Features], tuple[Features, Stats]]

BATCH_SIZE = 64
CHANNELS = 16
MAX_STEPS = 64
TOLERANCE = 1e-2
# Of the gradients that are compared; below the last, `MAX_STEPS` steps do not suffice.
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)

console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)


# Data.


@dataclass(frozen=True)
class Digits:
    """The digits, grey values in [0, 1], split four to one."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load_data(seed: int) -> Digits:
    """The digits, with every class split in the same proportion."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8)
    # In NumPy, whose slices compile nothing.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def distort(images: Images, key: PRNGKeyArray) -> Images:
    """Shears, scales, rotates and shifts every image a little, at random.

    There are only 1437 digits to train on; without this the model learns them by heart.
    """
    axis = jnp.arange(8.0) - 3.5
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)

    def distort_one(image, key):
        key1, key2 = jr.split(key)
        matrix = jnp.eye(2) + 0.1 * jr.normal(key1, (2, 2))
        points = matrix @ grid + 0.3 * jr.normal(key2, (2, 1)) + 3.5
        values = jax.scipy.ndimage.map_coordinates(image, list(points), order=1)
        return values.reshape(8, 8)

    return jax.vmap(distort_one)(images, jr.split(key, len(images)))


# Model.


class Convolution(eqx.Module):
    """A convolution, padded by one pixel, as a single matrix product.

    Inside of a loop XLA's own convolution takes several times longer on a CPU.
    """

    weight: Float[Array, "inputs channels"]
    bias: Float[Array, " channels"]
    size: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, size: int, stride: int, *, key: PRNGKeyArray):
        inputs = size * size * in_channels
        self.weight = jr.normal(key, (inputs, CHANNELS)) / inputs**0.5
        self.bias = jnp.zeros(CHANNELS)
        self.size = size
        self.stride = stride

    def __call__(self, x: Features) -> Features:
        """The channels of the next layer."""
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        last = x.shape[1] - self.size + 1
        offsets = range(self.size)
        neighbours = [
            x[:, i : last + i : self.stride, j : last + j : self.stride]
            for i in offsets
            for j in offsets
        ]
        return jnp.concatenate(neighbours, axis=-1) @ self.weight + self.bias


class VectorField(eqx.Module):
    """Two convolutions; the time is one more channel of the first.

    Nothing in it may depend on the rest of the batch (no batch normalisation), or it
    would be another vector field for every batch.
    """

    inner: Convolution
    outer: Convolution

    def __init__(self, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.inner = Convolution(CHANNELS + 1, size=3, stride=1, key=key1)
        self.outer = Convolution(CHANNELS, size=3, stride=1, key=key2)

    def __call__(self, t: Scalar, y: Features, args: None) -> Features:
        """The time derivative of the channels."""
        del args
        t_channel = jnp.broadcast_to(t, (*y.shape[:-1], 1))
        return self.outer(jnp.tanh(self.inner(jnp.concatenate([y, t_channel], -1))))


class Classifier(eqx.Module):
    """A convolution, an ODE from t = 0 to 1, a linear layer."""

    stem: Convolution
    field: VectorField
    head: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.stem = Convolution(1, size=4, stride=2, key=key1)
        self.field = VectorField(key=key2)
        self.head = eqx.nn.Linear(4 * 4 * CHANNELS, 10, key=key3)

    def __call__(
        self, images: Images, solve: Solve
    ) -> tuple[Float[Array, "batch 10"], Stats]:
        """The logits, and the statistics of the solve."""
        features, stats = solve(self.field, self.stem(jnp.expand_dims(images, -1)))
        # Smooth, because a gradient jumps at a kink: a single ReLU that is off and
        # should be on can leave an error of some percent, at whatever tolerance.
        features = jax.nn.gelu(features).reshape(len(images), -1)
        return jax.vmap(self.head)(features), stats


def controlled(tolerance: Scalar) -> diffrax.PIDController:
    """Steps as large as the tolerance allows."""
    return diffrax.PIDController(rtol=tolerance, atol=tolerance)


HEUN_EULER = diffrax.Heun()
CONTROLLED = controlled(TOLERANCE)


def make_solve(driver: Callable, adjoint: diffrax.AbstractAdjoint) -> Callable:
    """A way to solve the ODE block, by default with the solver of training.

    The batch is part of the state, as in the paper: all digits take the same steps.
    `odesolve(..., batched=True)` would let each take its own; but digits are about
    equally hard (8 to 10 steps each), and then one step size for all is the faster.
    """

    def solve(
        field: VectorField,
        y0: Features,
        solver: diffrax.AbstractSolver = HEUN_EULER,
        controller: diffrax.AbstractStepSizeController = CONTROLLED,
        dt0: float | None = None,
        max_steps: int = MAX_STEPS,
    ) -> tuple[Features, Stats]:
        sol = driver(
            diffrax.ODETerm(field),
            solver,
            0.0,
            1.0,
            dt0,
            y0,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        return sol.ys[-1], sol.stats

    return solve


solve_with_aca = make_solve(nodegrad.odesolve, nodegrad.ACAAdjoint())
solve_with_diffrax = make_solve(
    diffrax.diffeqsolve, diffrax.RecursiveCheckpointAdjoint()
)


def cross_entropy(
    model: Classifier, images: Images, labels: Labels, solve: Solve
) -> tuple[Float[Array, ""], Stats]:
    """The mean loss, and the statistics of the solve."""
    logits, stats = model(images, solve)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), stats


# Training.


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to; the means over its batches."""

    loss: float
    accuracy: float
    accepted: float
    rejected: float
    evaluations: float
    seconds: float


@eqx.filter_jit
def evaluate(
    model: Classifier, images: Images, labels: Labels, solve: Solve
) -> tuple[Float[Array, ""], Stats]:
    """The accuracy, and the statistics of the solve."""
    logits, stats = model(images, solve)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels), stats


def make_train_step(optim: optax.GradientTransformation) -> Callable:
    """One step of training on one batch."""

    @eqx.filter_jit
    def train_step(model, opt_state, images, labels, key):
        key, distort_key = jr.split(key)
        value_and_grad = eqx.filter_value_and_grad(cross_entropy, has_aux=True)
        images = distort(images, distort_key)
        (loss, stats), grads = value_and_grad(model, images, labels, solve_with_aca)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optim.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, key, (loss, stats)

    return train_step


def train(
    digits: Digits, epochs: int, limit: int | None, seed: int
) -> tuple[Classifier, list[Epoch]]:
    """The trained model, and how training went. Prints a line per epoch."""
    shuffle = np.random.default_rng(seed).permutation
    model_key, key = jr.split(jr.key(seed))
    model = eqx.filter_jit(Classifier)(key=model_key)
    size = len(digits.train_images)
    steps = epochs * (limit or size // BATCH_SIZE)
    schedule = optax.warmup_cosine_decay_schedule(5e-4, 5e-3, steps // 10, steps)
    optim = optax.adamw(schedule, weight_decay=1e-2)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    train_step = make_train_step(optim)
    history = []
    for _ in range(epochs):
        start = time.perf_counter()
        records = []
        whole = shuffle(size)[: size // BATCH_SIZE * BATCH_SIZE]
        for batch in whole.reshape(-1, BATCH_SIZE)[:limit]:
            model, opt_state, key, record = train_step(
                model,
                opt_state,
                digits.train_images[batch],
                digits.train_labels[batch],
                key,
            )
            records.append(record)
        history.append(summarise(model, digits, records, start))
        print_epoch(len(history), history[-1])
    return model, history


def summarise(
    model: Classifier, digits: Digits, records: list[tuple], start: float
) -> Epoch:
    """The means of the records of an epoch, and the accuracy after it."""
    accuracy, _ = evaluate(
        model, digits.test_images, digits.test_labels, solve_with_aca
    )
    mean_of = lambda name: float(np.mean([stats[name] for _, stats in records]))
    return Epoch(
        loss=float(np.mean([loss for loss, _ in records])),
        accuracy=float(accuracy),
        accepted=mean_of("num_accepted_steps"),
        rejected=mean_of("num_rejected_steps"),
        evaluations=mean_of("num_vector_field_evaluations"),
        seconds=time.perf_counter() - start,
    )


# Gradients.


DEFAULT = "Diffrax, default"


@dataclass(frozen=True)
class Gradient:
    """How one method computes the gradient; lists are by tolerance."""

    name: str
    compile_seconds: float
    memory: int
    seconds: list[float]
    values: list[np.ndarray]


METHODS = {
    "ACA, odesolve": solve_with_aca,
    "ACA, diffeqsolve": make_solve(diffrax.diffeqsolve, nodegrad.ACAAdjoint()),
    DEFAULT: solve_with_diffrax,
    "Diffrax, backsolve": make_solve(diffrax.diffeqsolve, diffrax.BacksolveAdjoint()),
}


def gradient_of(
    model: Classifier, images: Images, labels: Labels, solve: Solve
) -> Classifier:
    """The gradient of the loss by the parameters."""
    loss = lambda m: cross_entropy(m, images, labels, solve)[0]
    return eqx.filter_grad(loss)(model)


def flat(gradient: Classifier) -> np.ndarray:
    """All of a gradient in one vector."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


def exact_gradient(model: Classifier, images: Images, labels: Labels) -> np.ndarray:
    """The gradient of the continuous problem: tight tolerances in double precision.

    Computed by Diffrax alone, and so independent of nodegrad.
    """
    solve = jax.tree_util.Partial(
        solve_with_diffrax,
        solver=diffrax.Tsit5(),
        controller=controlled(1e-9),
        max_steps=4096,
    )
    with jax.enable_x64(True):
        as_double = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
        model, images = jax.tree.map(as_double, (model, images))
        return flat(eqx.filter_jit(gradient_of)(model, images, labels, solve))


def compile_gradient(
    method: Callable, model: Classifier, images: Images, labels: Labels
) -> tuple[Callable, float, int]:
    """The gradient as a function of the tolerance, its compile time and its memory."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def gradient(params, images, labels, tolerance):
        solve = jax.tree_util.Partial(method, controller=controlled(tolerance))
        return gradient_of(eqx.combine(params, static), images, labels, solve)

    # Training has traced some of this already, to the advantage of one method.
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(gradient).lower(params, images, labels, TOLERANCE).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None  # as on platforms that do not tell
    call = lambda tolerance: compiled(params, images, labels, tolerance)
    return call, seconds, memory.temp_size_in_bytes


def compare_gradients(
    model: Classifier, images: Images, labels: Labels, rounds: int
) -> list[Gradient]:
    """Every method at every tolerance, timed in turns."""
    compiled = [compile_gradient(m, model, images, labels) for m in METHODS.values()]
    calls = [call for call, _, _ in compiled]
    values = [[flat(call(tolerance)) for tolerance in TOLERANCES] for call in calls]
    seconds = [median_seconds(calls, tolerance, rounds) for tolerance in TOLERANCES]
    return [
        Gradient(name, compile_seconds, memory, list(times), value)
        for name, (_, compile_seconds, memory), times, value in zip(
            METHODS, compiled, zip(*seconds, strict=True), values, strict=True
        )
    ]


def median_seconds(calls: list[Callable], tolerance: float, rounds: int) -> list[float]:
    """The median time of each call. They take turns, so that all see the same load."""
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, record in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call(tolerance))
            record.append(time.perf_counter() - start)
    return [float(np.median(record)) for record in seconds]


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """Of a gradient, in the Euclidean norm."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


# Other solvers.


@dataclass(frozen=True)
class Swap:
    """A solver the model was not trained with, and the error rate with it."""

    name: str
    steps: str
    error_rate: float
    published: float
    evaluations: int


ADAPTIVE = {}
FIXED = {"controller": diffrax.ConstantStepSize(), "dt0": 0.2}
# With the error rates in percent that the ACA paper has for NODE18 on CIFAR10.
SOLVERS = (
    ("Heun-Euler", HEUN_EULER, ADAPTIVE, 4.85),
    ("Bosh3 (RK23)", diffrax.Bosh3(), ADAPTIVE, 4.92),
    ("Dopri5 (RK45)", diffrax.Dopri5(), ADAPTIVE, 5.29),
    ("Euler", diffrax.Euler(), FIXED, 5.52),
    ("Midpoint (RK2)", diffrax.Midpoint(), FIXED, 5.27),
    ("RK4", nodegrad.RK4(), FIXED, 5.24),
)


def swap_solvers(model: Classifier, digits: Digits) -> list[Swap]:
    """The trained model with each of the solvers."""
    swaps = []
    for name, solver, options, published in SOLVERS:
        solve = jax.tree_util.Partial(solve_with_aca, solver=solver, **options)
        accuracy, stats = evaluate(model, digits.test_images, digits.test_labels, solve)
        swap = Swap(
            name=name,
            steps=f"fixed, {options['dt0']}" if options else f"adaptive, {TOLERANCE}",
            error_rate=100 * (1 - float(accuracy)),
            published=published,
            evaluations=int(stats["num_vector_field_evaluations"]),
        )
        swaps.append(swap)
    return swaps


# Reports.


def print_epoch(number: int, epoch: Epoch):
    """One line of the table of epochs, and its head before the first."""
    if number == 1:
        console.print(
            "[bold]epoch     loss   test accuracy   steps taken   rejected   "
            "evaluations     time[/]"
        )
    console.print(
        f"{number:5}   {epoch.loss:6.4f}   [green]{epoch.accuracy:11.2%}[/]   "
        f"{epoch.accepted:11.1f}   {epoch.rejected:8.1f}   {epoch.evaluations:11.1f}   "
        f"{epoch.seconds:4.1f} s"
    )


def print_gradients(gradients: list[Gradient], exact: np.ndarray):
    """The table of gradients at the tolerance of training."""
    at = TOLERANCES.index(TOLERANCE)
    peer = next(g for g in gradients if g.name == DEFAULT)
    table = Table(
        "gradient by",
        "error",
        "from default",
        "run time",
        "compile time",
        "memory",
        box=SIMPLE_HEAD,
        title=f"Gradient of the trained model on {BATCH_SIZE} test digits, "
        f"Heun-Euler at {TOLERANCE:g}",
        caption="error: against the exact gradient of the continuous problem.\n"
        "from default: against Diffrax's default adjoint. "
        "In brackets: relative to it.",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for g in gradients:
        ratios = (
            g.seconds[at] / peer.seconds[at],
            g.compile_seconds / peer.compile_seconds,
            g.memory / peer.memory,
        )
        table.add_row(
            g.name,
            f"{relative_error(g.values[at], exact):.1e}",
            f"{relative_error(g.values[at], peer.values[at]):.1e}",
            f"{1e3 * g.seconds[at]:.1f} ms ({ratios[0]:.2f})",
            f"{g.compile_seconds:.1f} s ({ratios[1]:.2f})",
            f"{g.memory / 2**10:.0f} KiB ({ratios[2]:.2f})",
        )
    console.print(table)


def print_swaps(swaps: list[Swap]):
    """The table of solvers."""
    table = Table(
        "solver",
        "steps",
        "evaluations",
        "test error",
        "change",
        "published error",
        "change",
        box=SIMPLE_HEAD,
        title="The model trained with Heun-Euler, evaluated with other solvers",
        caption="published: the ACA paper, NODE18 on CIFAR10.\n"
        "Ours is that experiment scaled down: digits, and two convolutions.",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    trained = swaps[0]
    for s in swaps:
        table.add_row(
            s.name,
            s.steps,
            f"{s.evaluations}",
            f"{s.error_rate:.2f} %",
            f"{s.error_rate - trained.error_rate:+.2f}",
            f"{s.published:.2f} %",
            f"{s.published - trained.published:+.2f}",
        )
    console.print(table)


def draw(
    path: Path,
    history: list[Epoch],
    gradients: list[Gradient],
    exact: np.ndarray,
    swaps: list[Swap],
):
    """The figure: training, evaluations, gradients, solvers."""
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.grid": True,
        "lines.linewidth": 1.8,
        "axes.axisbelow": True,
        "grid.color": "0.92",
        "font.size": 9.5,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        axes = figure.subplots(2, 2)
        draw_training(axes[0, 0], history)
        draw_evaluations(axes[0, 1], history)
        draw_gradients(axes[1, 0], gradients, exact)
        draw_swaps(axes[1, 1], swaps)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#e07b39", "#3a9a6b", "0.45"


def draw_training(axes: Axes, history: list[Epoch]):
    """Training loss and test error, both on a logarithmic scale."""
    epochs = range(1, len(history) + 1)
    errors = [100 * (1 - e.accuracy) for e in history]
    axes.semilogy(epochs, errors, color=ORANGE, label="test error (%)")
    axes.semilogy(epochs, [e.loss for e in history], color=BLUE, label="training loss")
    title = f"Training: {history[-1].accuracy:.2%} of the test digits read right"
    axes.set(title=title, xlabel="epoch")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def draw_evaluations(axes: Axes, history: list[Epoch]):
    """How much work a forward pass was, on average over the batches of an epoch."""
    epochs = range(1, len(history) + 1)
    axes.plot(epochs, [e.evaluations for e in history], color=BLUE)
    axes.set(title="Vector field evaluations in a forward pass", xlabel="epoch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_gradients(axes: Axes, gradients: list[Gradient], exact: np.ndarray):
    """Run time against error."""
    colors = BLUE, GREEN, ORANGE, GREY
    for g, color, marker in zip(gradients, colors, "osD^", strict=True):
        errors = [relative_error(value, exact) for value in g.values]
        milliseconds = [1e3 * seconds for seconds in g.seconds]
        axes.loglog(errors, milliseconds, marker + "-", color=color, label=g.name)
    axes.set(
        title=f"Gradient: tolerances {TOLERANCES[0]:g} to {TOLERANCES[-1]:g}",
        xlabel="relative error against the exact gradient",
        ylabel="run time (ms)",
    )
    axes.invert_xaxis()
    for which in "major", "minor":
        axes.yaxis.set_tick_params(which=which, labelsize="small")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()


def draw_swaps(axes: Axes, swaps: list[Swap]):
    """Test error with every solver."""
    positions = range(len(swaps))
    colors = [BLUE] + [GREY] * (len(swaps) - 1)
    bars = axes.barh(positions, [s.error_rate for s in swaps], color=colors, height=0.6)
    axes.bar_label(bars, [f"{s.error_rate:.2f} %" for s in swaps], padding=4)
    axes.set_yticks(positions, [f"{s.name}\n{s.steps}" for s in swaps])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    axes.set(title="Other solvers, without training again", xlabel="test error (%)")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a Neural ODE on handwritten digits; check its gradients."
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("results/demo.png"), help="the figure"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few batches only: does everything run?"
    )
    return parser.parse_args()


def main():
    """Trains, compares gradients, swaps solvers, and draws all that."""
    options = parse_arguments()
    start = time.perf_counter()
    epochs, limit, rounds = options.epochs, None, 15
    if options.quick:
        epochs, limit, rounds = min(epochs, 2), 5, 3
        jax.config.update("jax_disable_most_optimizations", True)
        console.print("Quick: hardly trained, and compiled without optimisation.")
    digits = load_data(options.seed)
    console.rule("Training")
    console.print(
        f"{len(digits.train_labels)} digits to train on, {len(digits.test_labels)} to "
        f"test; JAX {jax.__version__} and Diffrax {diffrax.__version__} on "
        f"{jax.default_backend()}; seed {options.seed}\n"
    )
    model, history = train(digits, epochs, limit, options.seed)

    console.rule("Gradients")
    images, labels = digits.test_images[:BATCH_SIZE], digits.test_labels[:BATCH_SIZE]
    exact = exact_gradient(model, images, labels)
    gradients = compare_gradients(model, images, labels, rounds)
    print_gradients(gradients, exact)

    console.rule("Solvers")
    swaps = swap_solvers(model, digits)
    print_swaps(swaps)

    draw(options.output, history, gradients, exact, swaps)
    console.print(
        f"Test accuracy [bold green]{history[-1].accuracy:.2%}[/] after {epochs} "
        f"epochs; {time.perf_counter() - start:.0f} s in all. Figure: {options.output}"
    )


if __name__ == "__main__":
    main()
