"""Benchmarks of nodegrad against its peers: `python scripts/benchmark.py gradients`.

Every claim of speed or memory made for nodegrad is a row that this prints. All ratios
are taken within one run; see `benchmarks/measure.py` for how.
"""

import argparse
from pathlib import Path

import jax
from benchmarks import (
    ensembles,
    examples,
    fits,
    gradients,
    modes,
    reversible,
    reversible_examples,
    robustness,
    second_order,
    stiff,
    training,
)
from benchmarks.measure import describe_machine, make_clock
from benchmarks.report import Report


_SUBCOMMANDS = {
    "ensembles": ensembles,
    "examples": examples,
    "fits": fits,
    "gradients": gradients,
    "modes": modes,
    "reversible": reversible,
    "reversible-examples": reversible_examples,
    "robustness": robustness,
    "second-order": second_order,
    "stiff": stiff,
    "training": training,
}


def main() -> None:
    """Runs the subcommand that the command line names."""
    arguments = _make_parser().parse_args()
    # Before anything asks JAX for a device.
    clock = make_clock(arguments.clock)
    module = _SUBCOMMANDS[arguments.subcommand]
    jax.config.update("jax_enable_x64", module.DTYPE == "float64")
    header = describe_machine(clock, module.DTYPE)
    report = Report(f"nodegrad benchmark: {arguments.subcommand}", header)
    module.run(arguments, clock, report)
    default = Path("results") / f"benchmark_{arguments.subcommand}.json"
    report.finish(arguments.output or default)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(dest="subcommand", required=True)
    for name, module in _SUBCOMMANDS.items():
        summary = (module.__doc__ or name).splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        _add_shared_arguments(subparser, name)
        module.add_arguments(subparser)
    return parser


def _add_shared_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and repeats: two minutes"
    )
    parser.add_argument(
        "--clock",
        choices=("process", "wall"),
        default="process",
        help="process: CPU time on one core, unmoved by other processes (default); "
        "wall: all cores, and accelerators",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"where to write the numbers as JSON (results/benchmark_{name}.json)",
    )


if __name__ == "__main__":
    main()
