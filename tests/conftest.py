import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped():
    """Thousands of compiled programs would use up the memory maps of a process."""
    yield
    jax.clear_caches()
