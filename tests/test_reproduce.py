"""The experiments of the papers in `scripts/reproduce`: smoke runs, and the frame."""

import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat


SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("a source distribution has no scripts", allow_module_level=True)
sys.path.append(str(SCRIPTS))

from reproduce import (
    archives,
    data,
    MODULES,
    page,
    pictures,
    runner,
    training_sets,
)
from reproduce.experiment import Claim, Experiment, Report, Setting, spread, Table


def _reproduce(*arguments, folder=None):
    """`scripts/reproduce/run` without the creation of an environment."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    environment.pop("NODEGRAD_DATA", None)
    command = [sys.executable, "-W", "ignore", "-m", "reproduce", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_every_experiment_has_a_smoke_run_without_data(name, tmp_path):
    found = _reproduce(name, "--smoke", "--output", str(tmp_path))
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["size"] == "smoke" and content["claims"] and content["tables"]
    for table in content["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    assert (tmp_path / f"{name}.md").exists() and (tmp_path / "summary.md").exists()


@pytest.mark.slow
def test_without_names_the_experiments_are_listed(tmp_path):
    found = _reproduce("--output", str(tmp_path))
    assert found.returncode == 0, found.stderr[-3000:]
    assert all(name[:6] in found.stdout for name in MODULES)


# An experiment of three units, each of which writes its name into a log.


def _unit(key, log, hang):
    with open(log, "a") as file:
        file.write(f"{key}\n")
    if key == hang:
        time.sleep(600)
    return {"key": key, "square": [1, 4.0]}


def _report(results, setting):
    keys = [r["key"] for r in results.values()]
    table = Table("a table", ("key", "seeds"), [[key, setting.seeds] for key in keys])
    claims = (
        Claim("a claim", "1", "2", True),
        Claim("b", "1|2", "3", False, "because"),
    )
    figures = {"a figure": lambda axes: axes.plot([1, 2])}
    return Report((table,), claims, figures, ("a note.",))


def _experiment(log, hang=None, more=""):
    def tasks(setting):
        return {
            key: functools.partial(_unit, key + more, log, hang)
            for key in ("a", "b", "c")
        }

    return Experiment("three", "Three units", "A paper", tasks, _report)


def _run(folder, hang=None, more=""):
    log = str(folder / "log")
    return runner.run(_experiment(log, hang, more), Setting("smoke", 2), folder)


_KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {scripts!r}]
import test_reproduce
test_reproduce._run(Path({folder!r}), hang="b")
"""


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path, monkeypatch):
    paths = {"tests": Path(__file__).parent, "scripts": SCRIPTS, "folder": tmp_path}
    code = _KILLED.format(**{name: str(path) for name, path in paths.items()})
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
    log = tmp_path / "log"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text() == "a\nb\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (tmp_path / "three.json").exists()
    # The same settings, but this time "b" ends.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    content = _run(tmp_path, hang="b")
    assert content["tables"][0]["rows"] == [["a", 2], ["b", 2], ["c", 2]]
    assert log.read_text() == "a\nb\nb\nc\n"


def test_results_are_kept_while_the_settings_are_the_same(tmp_path):
    log = tmp_path / "log"
    _run(tmp_path)
    _run(tmp_path)
    assert log.read_text() == "a\nb\nc\n"
    _run(tmp_path, more="2")
    assert log.read_text() == "a\nb\nc\na2\nb2\nc2\n"


def test_what_is_written(tmp_path):
    content = _run(tmp_path)
    text = (tmp_path / "three.md").read_text()
    assert "| a claim | 1 | 2 | holds |" in text
    assert "| b | 1\\|2 | 3 | fails: because |" in text
    assert "- a note." in text and "2 seeds" in text
    assert content["machine"]["versions"]["jax"] and content["machine"]["cores"]
    assert set(content["seconds"]) == {"a", "b", "c"}
    assert (tmp_path / "three.png").stat().st_size > 0


def test_the_page_leaves_smoke_runs_out(tmp_path):
    content = _run(tmp_path)
    other = {**content, "size": "default"}
    docs = tmp_path / "docs"
    page.write([content], tmp_path, docs)
    assert "a claim" not in (docs / "reproduction.md").read_text()
    page.write([other], tmp_path, docs)
    text = (docs / "reproduction.md").read_text()
    assert "| three | a claim | 1 | 2 | holds |" in text
    assert "(images/reproduction/three.png)" in text
    copied = json.loads((docs / "reproduction" / "three.json").read_text())
    assert copied == json.loads(json.dumps(other))


def test_spread():
    assert spread([1.23456, 3, 2], 2) == "2 (1.2 to 3)"
    assert spread([1.23456]) == "1.23"


# Data.


def test_missing_data_are_named(tmp_path):
    with pytest.raises(data.MissingDataError, match="mnist.npz is missing.*MNIST"):
        data.mnist(tmp_path)
    with pytest.raises(data.MissingDataError, match="NODEGRAD_DATA"):
        data.folder(None)


def test_archives_of_series_are_split(tmp_path):
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    lengths = np.array([2, 3], np.int32)
    spoken = {"X": x, "y": np.array([7, 1]), "lengths": lengths}
    np.savez(tmp_path / "free_spoken_digits_mfcc.npz", **spoken)
    letters = {"values": x, "labels": np.array(["b", "a"]), "lengths": lengths}
    np.savez(tmp_path / "character_trajectories_labelled.npz", **letters)
    for loader, labels in ((data.spoken_digits, [7, 1]), (data.characters, [1, 0])):
        series, found = loader(tmp_path)
        assert [len(s) for s in series] == [2, 3] and found.tolist() == labels
        np.testing.assert_array_equal(np.concatenate(series), x)


def test_spoken_arabic_digits_replace_their_stand_in(tmp_path, monkeypatch):
    # Two and three frames of 13 channels, in the format of the archive.
    series = [[f"{c}.5,{c + 1}" for c in range(13)], ["1,2,3"] * 13]
    lines = [":".join([*one, label]) for one, label in zip(series, "83", strict=True)]
    text = "\n".join(
        ["# a comment", "@problemName SpokenArabicDigits", "@data", *lines]
    )
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"SpokenArabicDigits_{part}.ts").write_text(text)
    with pytest.raises(archives.DamagedArchiveError, match="2 series.*expected 6599"):
        data.spoken_digits(tmp_path)
    monkeypatch.setattr(data, "_ARABIC_SERIES", {"TRAIN": 2, "TEST": 2})
    found, labels = data.spoken_digits(tmp_path)
    assert [one.shape for one in found] == [(2, 13), (3, 13)] * 2
    np.testing.assert_array_equal(found[0][1], np.arange(1, 14))
    assert labels.tolist() == [1, 0, 1, 0]


def test_frames_of_vowels(tmp_path):
    series = [":".join(f"{c}.5,{c + 1},{c + 2}" for c in range(12)) + ":3"] * 2
    text = "\n".join(["# a comment", "@problemName x", "@data", *series])
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"JapaneseVowels_{part}.ts").write_text(text)
    frames = data.vowel_frames(tmp_path)
    assert frames.shape == (12, 8)
    np.testing.assert_array_equal(frames[1], np.arange(1, 9))


def test_a_file_of_rows_that_was_cut(tmp_path):
    rows = np.random.default_rng(0).normal(size=(6, 43))
    whole = tmp_path / "whole.npy"
    with whole.open("wb") as file:
        np.lib.format.write_array(file, rows, version=(1, 0))
    header = len(whole.read_bytes()) - rows.nbytes
    # The archive's file has a header of 80 bytes, this one a longer one.
    content = whole.read_bytes()[header - 80 :][: 80 + 8 * 43 * 3 + 20]
    (tmp_path / "miniboone_truncated.npy").write_bytes(content)
    np.testing.assert_array_equal(data.miniboone(tmp_path), rows[:3])


def _with_sums(monkeypatch, folder):
    """Lets the small files of a test pass for the published ones."""
    for name in ("CIFAR10", "SVHN_TRAIN", "SVHN_TEST", "DENSITIES"):
        archive = getattr(archives, name)
        if archive.is_in(folder):
            md5 = hashlib.md5((folder / archive.file).read_bytes()).hexdigest()
            monkeypatch.setattr(archives, name, replace(archive, md5=md5))


def _add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_binary_cifar(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 3, 32, 32), np.uint8)
    labels = (np.arange(12) % 10).astype(np.uint8)
    rows = np.concatenate([labels[:, None], images.reshape(12, -1)], axis=1)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for number in range(5):
            name = f"cifar-10-batches-bin/data_batch_{number + 1}.bin"
            _add(archive, name, rows[2 * number : 2 * number + 2].tobytes())
        _add(archive, "cifar-10-batches-bin/test_batch.bin", rows[10:].tobytes())
    with pytest.raises(archives.DamagedArchiveError, match="MD5"):
        data.cifar10(tmp_path)
    _with_sums(monkeypatch, tmp_path)
    found = data.cifar10(tmp_path)
    both = np.concatenate([found["train_images"], found["test_images"]])
    np.testing.assert_array_equal(both, images.transpose(0, 2, 3, 1))
    assert found["train_labels"].tolist() == list(range(10))
    assert found["test_labels"].tolist() == [0, 1]
    assert pictures.load("cifar10", tmp_path).train[0].shape == (10, 3, 32, 32)


def test_house_numbers(tmp_path, monkeypatch):
    with pytest.raises(data.MissingDataError, match="--download"):
        data.svhn(tmp_path)
    assert "digits" in training_sets.names(tmp_path)
    rng, images = np.random.default_rng(0), {}
    for part, count in (("train", 4), ("test", 3)):
        images[part] = rng.integers(0, 255, (32, 32, 3, count), np.uint8)
        y = np.array([10, 1, 2, 3], np.uint8)[:count, None]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images[part], "y": y})
    _with_sums(monkeypatch, tmp_path)
    found = data.svhn(tmp_path)
    for part in ("train", "test"):
        expected = images[part].transpose(3, 0, 1, 2)
        np.testing.assert_array_equal(found[f"{part}_images"], expected)
    assert found["train_labels"].tolist() == [0, 1, 2, 3]
    assert "svhn" in training_sets.names(tmp_path)
    assert "digits" not in training_sets.names(tmp_path)


def test_all_rows_of_miniboone(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(6, 43))
    content = io.BytesIO()
    np.save(content, rows)
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
        _add(archive, "data/miniboone/data.npy", content.getvalue())
    _with_sums(monkeypatch, tmp_path)
    np.testing.assert_array_equal(data.miniboone(tmp_path), rows)


def test_a_download_is_checked_and_says_what_is_wrong(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    folder.mkdir()
    source.write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    archive = archives.Archive("name", source.as_uri(), md5)
    archive.download(folder)
    assert (folder / "name").read_bytes() == b"content"
    # What is there is not fetched again.
    source.unlink()
    archive.download(folder)
    (folder / "name").write_bytes(b"something else")
    with pytest.raises(archives.DamagedArchiveError, match="MD5.*download it again"):
        archive.download(folder)
    with pytest.raises(archives.DownloadError, match="copy the file to"):
        replace(archive, file="other").download(folder)
    assert [path.name for path in folder.iterdir()] == ["name"]


def test_pictures_are_normalised(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("mnist", (8, 8)), ("cifar10_jpeg_subset", (8, 8, 3))):
        images = rng.integers(0, 255, (25, *shape), np.uint8)
        arrays = {"train_images": images[:20], "test_images": images[20:]}
        labels = {"train_labels": np.arange(20) % 10, "test_labels": np.arange(5)}
        np.savez(tmp_path / f"{name}.npz", **arrays, **labels)
    for name, channels in (("mnist", 1), ("cifar10", 3)):
        found = pictures.load(name, tmp_path)
        assert found.train[0].shape == (20, channels, 8, 8)
        assert found.test[0].shape == (5, channels, 8, 8)
        np.testing.assert_allclose(found.train[0].mean((0, 2, 3)), 0, atol=1e-5)
        np.testing.assert_allclose(found.train[0].std((0, 2, 3)), 1, atol=1e-5)
