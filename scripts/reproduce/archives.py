"""Public archives of the papers' data: downloads with a checksum, and readers.

`scripts/reproduce/run --download` puts them into the folder of the data sets. The
experiments then use them instead of what stands in for them. Nothing is unpickled: of
the archive for density estimation MiniBooNE is read, and Gas, a pickled table, is not.
"""

import hashlib
import io
import os
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat


@dataclass(frozen=True)
class Archive:
    """A file, the address it comes from, and the MD5 sum that its authors publish."""

    file: str
    url: str
    md5: str

    def is_in(self, folder: Path | None) -> bool:
        """Whether the folder has the file."""
        return folder is not None and (folder / self.file).is_file()

    def path(self, folder: Path) -> Path:
        """Where it is, after its content is checked."""
        path, found = folder / self.file, hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
        if found.hexdigest() != self.md5:
            msg = (
                f"{path} is not the published file: its MD5 sum is "
                f"{found.hexdigest()} and not {self.md5}. Delete it, and download it "
                f"again from {self.url}."
            )
            raise DamagedArchiveError(msg)
        return path

    def download(self, folder: Path) -> None:
        """Fetches the file unless the folder has it, and checks it."""
        if not self.is_in(folder):
            # A part of a file never has the name of the file.
            part = folder / f"{self.file}.part"
            try:
                urllib.request.urlretrieve(self.url, part)
            except OSError as error:
                msg = (
                    f"{self.file} could not be downloaded from {self.url} ({error}). "
                    f"Without a connection, copy the file to {folder}."
                )
                raise DownloadError(msg) from error
            os.replace(part, folder / self.file)
        self.path(folder)


class DamagedArchiveError(Exception):
    """A file is not the one that was published."""


class DownloadError(Exception):
    """A file could not be fetched."""


CIFAR10 = Archive(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
)
SVHN_TRAIN = Archive(
    "train_32x32.mat",
    "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
    "e26dedcc434d2e4c54c9b2d4a06d8373",
)
SVHN_TEST = Archive(
    "test_32x32.mat",
    "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
    "eb5a983be6a315427106f1b164d9cef3",
)
# Of Papamakarios, Pavlakou and Murray (2017): data sets for density estimation.
DENSITIES = Archive(
    "data.tar.gz",
    "https://zenodo.org/records/1161203/files/data.tar.gz",
    "9b9c9b0375315ad270eba4ce80c093ab",
)
ARCHIVES = CIFAR10, SVHN_TRAIN, SVHN_TEST, DENSITIES


def cifar10(folder: Path) -> dict[str, Any]:
    """Images `(count, 32, 32, 3)` of bytes and labels, `train_images` and so on."""
    train = [f"data_batch_{number}.bin" for number in range(1, 6)]
    found = {}
    with tarfile.open(CIFAR10.path(folder)) as archive:
        for part, names in (("train", train), ("test", ["test_batch.bin"])):
            members = [f"cifar-10-batches-bin/{name}" for name in names]
            content = b"".join(_member(archive, member) for member in members)
            # (count, 1 + 3 * 32 * 32): a label, then the colours one after the other.
            rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            images = rows[:, 1:].reshape(-1, 3, 32, 32)
            found[f"{part}_images"] = np.moveaxis(images, 1, -1)
            found[f"{part}_labels"] = rows[:, 0].astype(np.int32)
    return found


def svhn(folder: Path) -> dict[str, Any]:
    """House numbers, cut into digits, in the form of `cifar10`."""
    found = {}
    for part, archive in (("train", SVHN_TRAIN), ("test", SVHN_TEST)):
        arrays = loadmat(str(archive.path(folder)), variable_names=["X", "y"])
        found[f"{part}_images"] = np.moveaxis(arrays["X"], -1, 0)
        # A zero has the label 10.
        found[f"{part}_labels"] = arrays["y"][:, 0].astype(np.int32) % 10
    return found


def miniboone(folder: Path) -> Any:
    """All rows of MiniBooNE, 43 numbers each."""
    with tarfile.open(DENSITIES.path(folder)) as archive:
        content = _member(archive, "data/miniboone/data.npy")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file; nothing is extracted."""
    file = archive.extractfile(name)
    if file is None:
        msg = f"{name} in {archive.name} is not a file"
        raise DamagedArchiveError(msg)
    return file.read()
