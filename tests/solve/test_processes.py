"""Data parallelism on two processes with four devices each, against one device.

The processes are joined over the loopback interface, as hosts are over a network.
`on_devices.py` is the program that they run.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from .on_devices import BATCH, PAGE, TIMES


# Under `jax.jit` XLA decides what devices send, so that is what CI runs.
_CASES = ["make_steps", "gradient:vmap:aca:jit"]
_OTHERS = ["guide", "curvature"] + [
    f"gradient:{how}:{adjoint}:{parallel}"
    for how in ("vmap", "batched", "diffeqsolve")
    for adjoint in ("aca", "reversible")
    for parallel in ("jit", "shard_map")
    if (how, adjoint, parallel) != ("vmap", "aca", "jit")
]


def _start(folder, port, num_processes, process, cases):
    devices = 8 // num_processes if num_processes > 1 else 1
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags = os.environ.get("XLA_FLAGS", "") + " " + flags
    command = [sys.executable, "-m", "tests.solve.on_devices", str(folder), str(port)]
    return subprocess.Popen(
        [*command, str(num_processes), str(process), *cases],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=PAGE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(folder, cases):
    """What one device found, and what each of the two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [(1, 0), (2, 0), (2, 1)]
    programs = [_start(folder, port, *rank, cases) for rank in ranks]
    try:
        for program in programs:
            out, _ = program.communicate(timeout=1800)
            assert program.returncode == 0, out[-3000:]
    finally:
        # If one process fails, the other one waits for it.
        for program in programs:
            program.kill()
            program.communicate()
    return [json.loads((folder / f"{n}_{i}.json").read_text()) for n, i in ranks]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("few"), _CASES)


@pytest.fixture(scope="module")
def all_others(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("all"), _OTHERS)


@pytest.fixture
def found(request, case):
    if case == "guide" and not PAGE.exists():
        pytest.skip("the documentation is not here")
    return request.getfixturevalue("few" if case in _CASES else "all_others")


def _cases(keep=lambda case: True):
    """All cases that `keep` holds for; CI runs a few."""
    mark = lambda case: pytest.mark.slow if case in _CASES else pytest.mark.exhaustive
    cases = [*_CASES, *_OTHERS]
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=mark(c)) for c in cases if keep(c)]
    )


def _programs(found, case):
    """What was compiled, on one device and on eight."""
    one, eight, _ = found
    names = set(one[case]) - {"arrays"}
    assert names
    return [(one[case][name], eight[case][name]) for name in names]


@_cases()
def test_two_processes_compute_what_one_device_computes(found, case):
    one, first, second = found
    assert (one["devices"], first["devices"], second["devices"]) == (1, 8, 8)
    assert first[case]["arrays"] == second[case]["arrays"]
    # Six updates of the guide: eigenvectors of close eigenvalues magnify rounding.
    tolerance = 1e-9 if case == "guide" else 1e-12
    pairs = zip(one[case]["arrays"], first[case]["arrays"], strict=True)
    for expected, got in pairs:
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@_cases()
def test_a_device_holds_no_array_of_the_whole_batch(found, case):
    for one, eight in _programs(found, case):
        assert not eight["whole_batch"]
        assert eight["memory"] < one["memory"] / 7
        if case != "guide":
            assert one["whole_batch"]


@_cases(lambda case: case.startswith(("gradient", "curvature")))
def test_a_device_does_an_eighth_of_the_work(found, case):
    for one, eight in _programs(found, case):
        assert eight["flops"] < one["flops"] / 8 / 0.9


# The arrays of the network of `on_devices.py` and of the one of the guide.
_PARAMETERS = {"f64[12,4]", "f64[12]", "f64[4,12]", "f64[4]"}
# Under `jax.jit` the sums for the two ends of a step are reduced together.
_FACTORS = {f"f64[{ends}{n},{n}]" for ends in ("", "2,") for n in (4, 5, 12, 13)}
_GUIDE = {"f64[16,2]", "f64[16]", "f64[2,16]", "f64[2]"}
_GUIDE_FACTORS = {f"f64[{n},{n}]" for n in (2, 3, 16, 17)}


def _size(shape):
    return np.prod([int(n) for n in shape[:-1].partition("[")[2].split(",") if n])


@_cases()
def test_devices_send_gradients_and_factors_only(found, case):
    """No trajectory is sent, and by `jax.shard_map` every sum is sent once."""
    is_mapped = case in ("guide", "curvature") or case.endswith("shard_map")
    for _, eight in _programs(found, case):
        sent = eight["sent"]
        large = {name for name in sent if _size(name.split()[1]) > TIMES}
        allowed = _PARAMETERS | _FACTORS | _GUIDE | _GUIDE_FACTORS
        assert large <= {f"all-reduce {shape}" for shape in allowed}
        if is_mapped:
            # Two of the five arrays in the guide are scalars: loss and weight.
            assert all(name.startswith("all-reduce") for name in sent)
            assert set(sent.values()) <= {1, 2}
            assert all(n == 1 for name, n in sent.items() if name in large)
        assert BATCH not in {_size(name.split()[1]) for name in sent}
