"""Checks the types of arrays inside `pallas_kernels` and `goose_jax.nn` while tests run."""

import importlib.util
import pathlib
from collections.abc import Callable, Iterator
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
    """Checks operators' implementations and the model; must come before their import."""
    modules = [
        name
        for name in (*modules_of("pallas_kernels"), *modules_of("goose_jax"))
        if name.startswith(("pallas_kernels.operators.", "goose_jax.nn."))
        if not set(UNCHECKED).intersection(name.split("."))
    ]
    jaxtyping.install_import_hook([*modules, "pallas_kernels.packing"], "tests.type_checks.check")


def modules_of(package: str) -> Iterator[str]:
    """Yields the full names of a package's modules, without importing them."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = map(pathlib.Path, spec.submodule_search_locations)
    for path in folder.rglob("*.py"):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(folder.parent).with_suffix("").parts)
