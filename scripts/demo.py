"""Trains a neural ODE on handwritten digits, and examines its derivatives.

The experiment of the ACA paper (Zhuang et al., ICML 2020), with the 1797 scanned digits
of scikit-learn in place of CIFAR10:

1. Train through `nodegrad.odesolve` with the adaptive Heun-Euler method at a tolerance
   of 1e-2.
2. Compare the gradient of the trained model between adjoints: error, run time, compile
   time and memory.
3. Evaluate the trained model with other solvers, without further training.
4. Compare a gradient through a reversible solver, a Hessian-vector product and the
   curvature of a layer with independent results.

Every number printed is measured in the run, except the column of published errors.
"""

import argparse
import time
from pathlib import Path

import jax
from benchmarks.measure import describe_machine, make_clock
from benchmarks.report import Report
from demonstration import comparison, data, report as output
from demonstration.model import TOLERANCE
from demonstration.training import train


def main() -> None:
    """Trains, compares, evaluates, and saves the figure."""
    options = _parse_arguments()
    start = time.perf_counter()
    epochs, batches, seconds, size = options.epochs, data.BATCHES, 2.0, data.BATCH_SIZE
    clock = make_clock("wall")
    report = Report("nodegrad demo", describe_machine(clock, "float32"))
    if options.quick:
        epochs, batches, seconds, size = min(epochs, 2), 5, 0.1, 8
        jax.config.update("jax_disable_most_optimizations", True)
        report.note("Quick: a few batches of training, compiled without optimisation.")

    digits = data.load(options.seed)
    model, history = train(digits, epochs, batches, options.seed)

    images, labels = digits.test
    subject = comparison.Subject(model, images[:size], labels[:size])
    gradients = comparison.compare_gradients(clock, subject, seconds)
    output.print_gradients(report, gradients[TOLERANCE], TOLERANCE)
    swaps = comparison.swap_solvers(model, digits.test)
    output.print_swaps(report, swaps)
    output.draw(options.output, history, gradients, swaps)

    reversible = comparison.compare_reversible(clock, subject, seconds)
    print("Reversible(Bosh3()) with ReversibleAdjoint():", output.describe(reversible))
    second_order = comparison.compare_hvp(clock, subject, seconds)
    print("hvp with ACAAdjoint():", output.describe(second_order))
    layers, error = comparison.check_curvature(subject)
    print(
        f"Kronecker factors of {', '.join(layers)}: relative difference {error:.0e} "
        "from the closed form of the output factor of .head"
    )
    print(
        f"Test accuracy {history[-1].accuracy:.2%} after {epochs} epochs; "
        f"{time.perf_counter() - start:.0f} s in all. Figure: {options.output}"
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("results/demo.png"), help="the figure"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few batches of training; checks that everything runs",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
