import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the folder `benchmarks` as its commands do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module
