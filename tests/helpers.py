"""What the tests of both packages share."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def relative_rms(x: Any, reference: Any) -> float:
    """`||x - reference|| / ||reference||`, computed in float64; the shapes must be equal."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    assert x.shape == reference.shape, (x.shape, reference.shape)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def count_kernels(program: str) -> int:
    """Returns how many kernels a lowered program calls; calls that are alike share a function."""
    names = re.findall(r"func\.func \w+ @(\w+)\(", program)
    bodies = dict(zip(names, program.split("func.func ")[1:], strict=True))

    @functools.cache
    def count(name: str) -> int:
        called = re.findall(r"\bcall @(\w+)\(", bodies[name])
        kernels = bodies[name].count("custom_call @mosaic_gpu")
        return kernels + sum(count(x) for x in called if x in bodies)

    return count("main")


@contextlib.contextmanager
def in_mesh_of(kind: str, multiprocessors: int) -> Iterator[None]:
    """Lets JAX trace for a GPU that this machine need not have, as users do to lower for it."""
    device = jax.sharding.AbstractDevice(kind, multiprocessors, "gpu")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(
            (1,), ("batch",), (jax.sharding.AxisType.Auto,), abstract_device=device
        )
    ):
        yield
