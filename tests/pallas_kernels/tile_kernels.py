"""Kernels of one tile, for tests of the parts that kernels are built from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.registers import TILE_LAYOUT, store
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import tiles_smem

on_each_device = pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(
            True,
            marks=pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs"),
            id="interpreted",
        ),
        pytest.param(False, marks=pytest.mark.gpu, id="compiled"),
    ],
)


def apply(function, x, count: int, interpret: bool) -> list[np.ndarray]:
    """Applies a function that makes `count` tiles of bfloat16 of a tile."""

    def body(x_gmem, *rest):
        *results_gmem, tile = rest
        x = plgpu.load(x_gmem, layout=TILE_LAYOUT, optimized=False)
        for result, gmem in zip(function(x), results_gmem, strict=True):
            store((tile, result))
            plgpu.copy_smem_to_gmem(tile, gmem)
            plgpu.wait_smem_to_gmem(0)

    kernel = Target(interpret=interpret).kernel(
        body,
        name="registers",
        out_type=(jax.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16),) * count,
        grid={"block": 1},
        scratch_types=[tiles_smem()],
    )
    return [np.asarray(x, np.float64) for x in kernel(x)]
