import os
from pathlib import Path

import jax
import pytest


# The tests mostly compile, and half of that time would go into a new way of putting
# elementwise operations together, which can be turned off in this version.
if jax.__version_info__ < (0, 11):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {flags}"

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
