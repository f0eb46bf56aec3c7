"""Checks the shapes and types of arrays inside `pallas_kernels` while tests run."""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

UNCHECKED = ("api", "call", "mosaic_gpu")
"""Public functions, and the arguments they were given, are left out: their own checks come first
and name the argument. Kernels are left out because their functions also take references."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets beartype check a function, but not the making of a dataclass.

    JAX makes pytrees anew with whatever leaves a transformation has.
    """
    return function if function.__name__ == "__init__" else beartype.beartype(function)


def install() -> None:
    """Checks calls of the operators' implementations; must come before their import."""
    spec = importlib.util.find_spec("pallas_kernels")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = map(pathlib.Path, spec.submodule_search_locations)
    files = [path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py")]
    modules = [
        ".".join(file.parts)
        for file in files
        if "operators" in file.parts and file.name != "__init__"
        if not set(UNCHECKED).intersection(file.parts)
    ]
    jaxtyping.install_import_hook([*modules, "pallas_kernels.packing"], "tests.type_checks.check")
