"""Device helpers: matrices of 64 x 64, in shared memory or in the registers of a warpgroup."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TILE, is_interpreted
from pallas_kernels.wkv7.mosaic_gpu.registers import LAYOUT, TRANSFORMS, halves_of, store, widen

ROWS = LAYOUT.reduce(1)
"""Layout of a vector with one entry for each row of a tile."""
COLUMNS = LAYOUT.reduce(0)
"""Layout of a vector with one entry for each column of a tile."""

type Operand = Any
"""A tile in shared memory (or its transpose), or a 16-bit tile in registers."""


def tiles_smem(*counts: int, dtype: Any = jnp.bfloat16, rows: int = TILE) -> Any:
    """Shared memory for `[*counts, rows, 64]`, laid out for tensor cores."""
    return plgpu.SMEM(
        (*counts, rows, TILE),
        dtype,
        transforms=TRANSFORMS,
    )


def load(ref: Any) -> jax.Array:
    """A tile from shared or global memory in registers."""
    return plgpu.load(ref, layout=LAYOUT, optimized=False)


def load32(ref: Any) -> jax.Array:
    """A tile of bfloat16 in float32."""
    return widen(load(ref))


def load_rows(ref: Any) -> jax.Array:
    """A vector `[64]` in registers, one entry for each row of a tile."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def load_columns(ref: Any) -> jax.Array:
    """A vector `[64]` in registers, one entry for each column of a tile."""
    return plgpu.load(ref, layout=COLUMNS, optimized=False)


def spread_rows(vector: jax.Array) -> jax.Array:
    """A tile whose rows each repeat one entry of a vector from `load_rows`."""
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), [0])


def spread_columns(vector: jax.Array) -> jax.Array:
    """A tile whose columns each repeat one entry of a vector from `load_columns`."""
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), [1])


def transposed(ref: Any) -> Any:
    """The transpose of a tile in shared memory, as an operand of a product."""
    return ref.transpose((1, 0))


def row_and_column() -> tuple[jax.Array, jax.Array]:
    """The index of each entry's row and of its column."""
    row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS)
    # Behind the barrier LLVM cannot compute masks once and keep them in registers, of which they
    # would take too many, or in memory.
    row = spread_rows(jax.lax.optimization_barrier(row))
    return row, plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=LAYOUT)


def zeros(rows: int = TILE, columns: int = TILE) -> jax.Array:
    """A float32 tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), LAYOUT)


def choose(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """One of two tiles, by a condition that is one number."""
    # Mosaic GPU has no selection of tiles by a scalar.
    return jnp.where(jnp.broadcast_to(condition, x.shape), x, y)


def keep(mask: jax.Array, x: jax.Array) -> jax.Array:
    """X where the mask is true, else 0."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def split(x: jax.Array, high: Any, low: Any) -> tuple[Any, Any]:
    """`halves_of`, written to shared memory, ready for tensor cores."""
    store(*zip((high, low), halves_of(x), strict=True))
    return high, low


def products(
    *sums: Sequence[tuple[Operand, Operand]], start: Sequence[jax.Array | None] | None = None
) -> tuple[jax.Array, ...]:
    """Several sums of matrix products, in flight together: for each, `sum of x @ y`, in float32.

    Args:
      *sums: pairs (x, y); y lies in shared memory.
      start: what each sum starts from; None is zero.
    """
    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in sums]
    start = [None] * len(sums) if start is None else start
    start = tuple(zeros(*s) if x is None else x for s, x in zip(shapes, start, strict=True))
    if is_interpreted():
        return tuple(
            sum((jnp.dot(x[...], y[...], preferred_element_type=jnp.float32) for x, y in pairs), s)
            for pairs, s in zip(sums, start, strict=True)
        )

    def accumulate(accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for x, y in pairs:
                plgpu.wgmma(accumulator, x, y)

    return pl.run_state(accumulate)(tuple(plgpu.ACC.init(x) for x in start))
