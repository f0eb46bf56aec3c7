"""Settings of every test."""

import os
from collections.abc import Iterator

# Interpreted kernels have a thread for each warpgroup, which wait for each other: XLA must have at
# least as many, also where cores are few. It reads this when its CPU client starts.
os.environ.setdefault("NPROC", "8")

import jax
import pytest

# Shapes that only agree by broadcasting, and products in reduced precision, are errors here.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def quick_to_compile() -> Iterator[None]:
    """For programs that take longer to compile than to run, as interpreted kernels do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
