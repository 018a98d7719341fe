"""The data sets, read from the folder that `--data` or `NODEGRAD_DATA` names.

An archive that was published replaces the part of it, or the stand-in, if it is there.
"""

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.training_tasks import read_series

from . import archives


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
    """CIFAR-10, or a part: images `(count, 32, 32, 3)` of bytes and labels."""
    if path is not None and archives.CIFAR10.is_in(path):
        return archives.cifar10(path)
    origin = "500 training and 100 test images of every class, from a JPEG copy"
    return arrays(path, "cifar10_jpeg_subset.npz", origin)


def svhn(path: Path | None) -> dict[str, Any]:
    """Street View House Numbers, in the form of `cifar10`."""
    for archive in (archives.SVHN_TRAIN, archives.SVHN_TEST):
        find(path, archive.file, f"scripts/reproduce/run --download, {archive.url}")
    return archives.svhn(folder(path))


# Series of training and test data. The archive publishes no checksum, but these.
_ARABIC_SERIES = {"TRAIN": 6599, "TEST": 2199}


def spoken_digits(path: Path | None) -> tuple[list[Any], Any]:
    """Series `(frames, 13)` of spoken digits, and labels.

    They are those of SpokenArabicDigits where its two files are in the folder.
    """
    names = {part: f"SpokenArabicDigits_{part}.ts" for part in _ARABIC_SERIES}
    if path is not None and all((path / name).exists() for name in names.values()):
        return _arabic_digits({part: path / name for part, name in names.items()})
    origin = "the MFCC of the Free Spoken Digit Dataset as one NumPy archive"
    found = arrays(path, "free_spoken_digits_mfcc.npz", origin)
    series = np.split(found["X"], np.cumsum(found["lengths"])[:-1])
    return series, found["y"].astype(np.int32)


def _arabic_digits(paths: dict[str, Path]) -> tuple[list[Any], Any]:
    found: list[Any] = []
    for part, path in paths.items():
        series = read_series(path)
        shapes = {one.shape[1] for one, _ in series}
        if len(series) != _ARABIC_SERIES[part] or shapes != {13}:
            msg = (
                f"{path} is not the published file: {len(series)} series with "
                f"{sorted(shapes)} channels, expected {_ARABIC_SERIES[part]} with 13"
            )
            raise archives.DamagedArchiveError(msg)
        found += series
    labels = np.unique([label for _, label in found], return_inverse=True)[1]
    return [one for one, _ in found], labels.astype(np.int32)


def characters(path: Path | None) -> tuple[list[Any], Any]:
    """Pen trajectories `(samples, 3)`, and the numbers of their letters."""
    origin = "CharacterTrajectories of the UEA archive, joined into one NumPy archive"
    found = arrays(path, "character_trajectories_labelled.npz", origin)
    series = np.split(found["values"], np.cumsum(found["lengths"])[:-1])
    return series, np.unique(found["labels"], return_inverse=True)[1].astype(np.int32)


def vowel_frames(path: Path | None) -> Any:
    """The first 8 coefficients of all frames of JapaneseVowels: one row for each."""
    origin = "JapaneseVowels of the UEA archive, timeseriesclassification.com"
    names = "JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"
    paths = [find(path, name, origin) for name in names]
    series = [one[:, :8] for path in paths for one, _ in read_series(path)]
    frames = np.concatenate(series)
    return frames[np.isfinite(frames).all(axis=1)]


def miniboone(path: Path | None) -> Any:
    """The rows of MiniBooNE, 43 numbers each, as far as the file goes."""
    if path is not None and archives.DENSITIES.is_in(path):
        return archives.miniboone(path)
    origin = f"scripts/reproduce/run --download, {archives.DENSITIES.url}"
    # The header promises all rows, so NumPy refuses a part of the file.
    found = find(path, "miniboone_truncated.npy", origin)
    values = np.fromfile(found, np.float64, offset=80)
    return values[: len(values) // 43 * 43].reshape(-1, 43)
