"""Settings of every test."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

# Interpreted kernels have a thread for each warpgroup, which wait for each other: XLA must have at
# least as many, also where cores are few. It reads this when its CPU client starts.
os.environ.setdefault("NPROC", "8")

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import type_checks

type_checks.install()

# Tests of meshes divide arrays over some of these; all others run on the first one.
jax.config.update("jax_num_cpu_devices", 8)

# Shapes that only agree by broadcasting, and products in reduced precision, are errors here.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


MEMORY_MAPS = pathlib.Path("/proc/self/maps")
"""The file with a line for each memory map of the process, on Linux."""
MOST_MEMORY_MAPS = 20_000
"""How many a module of tests may leave. Linux lets a process have 65,530."""


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Forgets compiled programs if they have many memory maps: up to three each, on a CPU.

    When a process has no maps left, XLA ends it with a segmentation fault.
    """
    yield
    if MEMORY_MAPS.exists() and len(MEMORY_MAPS.read_bytes().splitlines()) > MOST_MEMORY_MAPS:
        jax.clear_caches()


@contextlib.contextmanager
def few_optimisations() -> Iterator[None]:
    """Compiles quickly on a CPU, also in the processes that a test starts."""
    option = "jax_disable_most_optimizations"
    on_cpu = jax.default_backend() == "cpu"
    before = jax.config.read(option)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(option.upper(), str(int(on_cpu)))
        jax.config.update(option, on_cpu)
        yield
        jax.config.update(option, before)


@pytest.fixture
def only_own_checks() -> Iterator[None]:
    """Turns checks of types off, for tests of what the code itself says of wrong arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def quick_to_compile() -> Iterator[None]:
    """For programs that take longer to compile than to run, as interpreted kernels do."""
    with few_optimisations():
        yield


@pytest.fixture(scope="module")
def module_quick_to_compile() -> Iterator[None]:
    """The same for all tests of a module, and what they share."""
    with few_optimisations():
        yield


@pytest.fixture(scope="module")
def module_compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of compiled programs of a module whose tests, or their processes, share some."""
    path = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield path
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
