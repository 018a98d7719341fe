"""Fits of measured data by models in the PEtab format, against Fides and L-BFGS-B.

Log-likelihoods at nominal parameters, gradients, fits from many starts, standard
errors; five mechanistic models, and two with networks in them. The data are not in this
repository: `--data` or `NODEGRAD_DATA` names a folder with a folder `petab` in it.
"""

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from .measure import Clock
from .report import Report


DTYPE = "float64"
MECHANISTIC = (
    "Boehm_JProteomeRes2014",
    "Crauste_CellSystems2017",
    "Elowitz_Nature2000",
    "Sneyd_PNAS2002",
    "Fujita_SciSignal2010",
)
HYBRID = "Dandekar_Patterns2020", "Ko_NeurIPS2023"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder of the data, problems, and how many starts."""
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("NODEGRAD_DATA"),
        help="the folder of the data sets (the variable NODEGRAD_DATA)",
    )
    parser.add_argument("--starts", type=int, default=10, help="fits of each method")
    parser.add_argument("--seed", type=int, default=0, help="of the starts")
    parser.add_argument(
        "--problems",
        nargs="+",
        choices=(*MECHANISTIC, *HYBRID),
        default=(*MECHANISTIC, *HYBRID),
        help="some of the problems",
    )


def run(arguments: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Measures everything."""
    if arguments.data is None or not (Path(arguments.data) / "petab").is_dir():
        msg = (
            f"no folder petab of PEtab problems in {arguments.data} "
            "(use --data or NODEGRAD_DATA)"
        )
        raise SystemExit(msg)
    try:
        study: Any = importlib.import_module("fits.study")
        hybrid: Any = importlib.import_module("fits.hybrid")
    except ImportError as error:
        msg = f"{error}: pip install 'nodegrad[fits]'"
        raise SystemExit(msg) from error
    folder = Path(arguments.data) / "petab"
    starts = 3 if arguments.quick else arguments.starts
    options = study.Options(folder, starts, arguments.seed, arguments.quick)
    chosen = [name for name in MECHANISTIC if name in arguments.problems]
    study.fit_mechanistic(options, chosen, clock, report)
    chosen = [name for name in HYBRID if name in arguments.problems]
    hybrid.fit_hybrid(options, chosen, clock, report)
