"""What the kernels for Hopper GPUs do to tiles in registers, interpreted and on such a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TILE
from pallas_kernels.wkv7.mosaic_gpu.chunk import Plan
from pallas_kernels.wkv7.mosaic_gpu.diagonal import invert_diagonal
from pallas_kernels.wkv7.mosaic_gpu.registers import (
    halves_of,
    keep_triangle,
    narrow,
    store,
    widen,
)
from pallas_kernels.wkv7.mosaic_gpu.tiles import load, tiles_smem
from tests.helpers import relative_rms

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
        for result, gmem in zip(function(load(x_gmem)), results_gmem, strict=True):
            store((tile, result))
            plgpu.copy_smem_to_gmem(tile, gmem)
            plgpu.wait_smem_to_gmem(0)

    kernel = Plan(interpret=interpret).kernel(
        body,
        name="registers",
        out_type=(jax.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16),) * count,
        grid={"block": 1},
        scratch_types=[tiles_smem()],
    )
    return [np.asarray(x, np.float64) for x in kernel(x)]


@on_each_device
def test_conversions_round_to_nearest(interpret):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TILE, TILE)), jnp.float32)
    x *= 2.0 ** jnp.arange(-40, 24)[None]  # also numbers that tell neighbours from each other

    def halves_by_conversions(x):
        high = narrow(x)
        return high, narrow(x - widen(high))

    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    for halves in (halves_of, halves_by_conversions):
        for half, expected in zip(apply(halves, x, 2, interpret), (high, low), strict=True):
            np.testing.assert_array_equal(half, np.asarray(expected, np.float64))


@on_each_device
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("strictly", [True, False])
def test_triangles(lower, strictly, interpret):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TILE, TILE)), jnp.bfloat16)
    # What is masked can be anything.
    x = x.at[0, -1].set(jnp.nan) if lower else x.at[-1, 0].set(jnp.inf)
    kept = apply(lambda x: keep_triangle(x, -x, lower=lower, strictly=strictly), x, 2, interpret)
    triangle = np.tril if lower else np.triu
    expected = triangle(np.asarray(x, np.float64), (-1 if lower else 1) * strictly)
    np.testing.assert_array_equal(kept[0], expected)
    np.testing.assert_array_equal(kept[1], -expected)


def blocks_of_16(x: np.ndarray) -> np.ndarray:
    """X with zeros outside of the blocks of 16 rows on its diagonal."""
    return x * np.kron(np.eye(TILE // 16), np.ones((16, 16)))


@on_each_device
@pytest.mark.parametrize("tokens", ["random", "repeated"])
def test_diagonal_blocks_are_inverted(tokens, interpret):
    rng = np.random.default_rng(0)
    A = -np.ones((TILE, TILE)) if tokens == "repeated" else 0.3 * rng.normal(size=(TILE, TILE))
    A = jnp.asarray(np.tril(A, -1), jnp.bfloat16)
    D, N = apply(invert_diagonal, A, 2, interpret)
    A = np.asarray(A, np.float64)
    exact = np.linalg.inv(np.eye(TILE) - blocks_of_16(A))
    # Measured by interpretation: 1.7e-3 and 1.6e-3 for random A, 0 for repeated tokens.
    assert relative_rms(D, exact) <= 3e-3
    np.testing.assert_array_equal(D, blocks_of_16(D))
    assert relative_rms(N, D @ (A - blocks_of_16(A))) <= 2e-3
