import gc
from pathlib import Path

import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A trace makes millions of objects that live for a second. With Python's own thresholds
# (700 objects) its search for cycles took a sixth of the time of the tests.
gc.set_threshold(200_000, 20, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks most rows of long matrices, so that `scripts/test` and CI run a part.

    `@pytest.mark.rows(test=1, ci=3)` keeps one row for `scripts/test`, marks two slow
    and the others exhaustive. The rows that are kept lie evenly in the matrix.
    """
    matrices = {}
    for item in items:
        if item.get_closest_marker("rows") is not None:
            matrices.setdefault((item.path, item.originalname), []).append(item)
    for rows in matrices.values():
        kept = rows[0].get_closest_marker("rows").kwargs
        for_ci = _evenly(rows, kept["ci"])
        for_test = _evenly(for_ci, kept["test"])
        for row in rows:
            if row not in for_ci:
                row.add_marker(pytest.mark.exhaustive)
            elif row not in for_test:
                row.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    # What was imported and collected stays: it is not searched again.
    gc.collect()
    gc.freeze()


def _evenly(rows: list, num: int) -> list:
    return [rows[i * len(rows) // num] for i in range(num)]


# Linux gives a process 65530 memory maps, and a compiled program takes several.
_MANY_MAPS = 30_000


def _num_maps() -> int:
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


@pytest.fixture(autouse=True)
def _programs_are_dropped_before_memory_maps_run_out():
    yield
    if _num_maps() > _MANY_MAPS:
        jax.clear_caches()
