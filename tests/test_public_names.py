"""No public name of a package hides one of its modules."""

import importlib
import pkgutil

import pytest

import goose_jax
import pallas_kernels

PACKAGES = [
    name
    for root in (goose_jax, pallas_kernels)
    for name in (
        root.__name__,
        *(
            module.name
            for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")
            if module.ispkg
        ),
    )
]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_public_name_is_that_of_a_module(name):
    """Else `import package.module as x` gives the function of that name, or fails."""
    package = importlib.import_module(name)
    exported = set(getattr(package, "__all__", ()))
    assert exported <= vars(package).keys()
    for module in pkgutil.iter_modules(package.__path__):
        assert module.name not in exported
        if module.name in vars(package):  # an import of the module sets it, and nothing else may
            assert vars(package)[module.name].__name__ == f"{name}.{module.name}"
