"""The data sets, read from the folder that `--data` or `NODEGRAD_DATA` names."""

from pathlib import Path
from typing import Any

import numpy as np


class MissingDataError(Exception):
    """A file of a data set is not there."""


def find(folder: Path | None, name: str, origin: str) -> Path:
    """The path of a file; `origin` says where it comes from."""
    path = None if folder is None else folder / name
    if path is None or not path.exists():
        where = "no folder is given" if folder is None else f"it is not in {folder}"
        msg = f"{name} is missing ({where}; use --data or NODEGRAD_DATA): {origin}"
        raise MissingDataError(msg)
    return path


def arrays(folder: Path | None, name: str, origin: str) -> dict[str, Any]:
    """The arrays of a NumPy archive."""
    with np.load(find(folder, name, origin), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def folder(path: Path | None) -> Path:
    """The folder of the data sets, which has to be there."""
    if path is None or not path.is_dir():
        msg = f"no folder of data sets: {path} (use --data or NODEGRAD_DATA)"
        raise MissingDataError(msg)
    return path


def mnist(path: Path | None) -> dict[str, Any]:
    """Images `(count, 28, 28)` of bytes and labels, `train_images` and so on."""
    origin = "the four files of MNIST as one NumPy archive, from yann.lecun.com"
    return arrays(path, "mnist.npz", origin)


def cifar10(path: Path | None) -> dict[str, Any]:
    """A part of CIFAR-10: images `(count, 32, 32, 3)` of bytes and labels."""
    origin = "500 training and 100 test images of every class, from a JPEG copy"
    return arrays(path, "cifar10_jpeg_subset.npz", origin)
