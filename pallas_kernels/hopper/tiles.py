"""Device helpers: matrices of 64 x 64, in shared memory or in the registers of a warpgroup."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.products import Transposed, multiply
from pallas_kernels.hopper.registers import (
    TILE_LAYOUT,
    TRANSFORMS,
    Part,
    halves_of,
    load,
    store,
    widen,
)
from pallas_kernels.hopper.target import TILE, is_interpreted

TILE_BYTES = TILE * TILE * 2
"""Size of a 16-bit tile in shared memory."""

LOG2E = math.log2(math.e)
"""`exp(x)` is `exp2(x * LOG2E)`: the hardware has powers of two."""

ROWS = TILE_LAYOUT.reduce(1)
"""Layout of a vector with one entry for each row of a tile."""
COLUMNS = TILE_LAYOUT.reduce(0)
"""Layout of a vector with one entry for each column of a tile."""

type Operand = Any
"""A tile in shared memory or its `transposed`, or a 16-bit tile in registers."""


def tiles_smem(*counts: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for `[*counts, 64, 64]`, laid out for tensor cores."""
    return plgpu.SMEM((*counts, TILE, TILE), dtype, transforms=TRANSFORMS)


def anew(index: jax.Array | int) -> jax.Array:
    """An index of tiles: LLVM must find the addresses of those anew, and cannot keep them.

    Kept from use to use, those of all tiles would take more registers than there are.
    """
    return jax.lax.optimization_barrier(jnp.int32(index))


def load32(x: Any) -> jax.Array:
    """A tile of bfloat16, or a part of one, in float32."""
    return widen(load(x))


def load_rows(ref: Any) -> jax.Array:
    """A vector `[64]` in registers, one entry for each row of a tile."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def load_columns(ref: Any) -> jax.Array:
    """A vector `[64]` in registers, one entry for each column of a tile."""
    return plgpu.load(ref, layout=COLUMNS, optimized=False)


def spread_rows(vector: jax.Array, columns: int = TILE) -> jax.Array:
    """A tile whose rows each repeat one entry of a vector from `load_rows`."""
    return jax.lax.broadcast_in_dim(vector, (TILE, columns), [0])


def spread_columns(vector: jax.Array) -> jax.Array:
    """A tile whose columns each repeat one entry of a vector from `load_columns`."""
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), [1])


def transposed(ref: Any) -> Transposed:
    """The transpose of a tile in shared memory, as an operand of a product."""
    return Transposed(ref)


def row_and_column() -> tuple[jax.Array, jax.Array]:
    """The index of each entry's row and of its column."""
    row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS)
    # Behind the barrier LLVM cannot compute masks once and keep them in registers, of which they
    # would take too many, or in memory.
    row = spread_rows(jax.lax.optimization_barrier(row))
    return row, plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=TILE_LAYOUT)


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
    start = [None] * len(sums) if start is None else start
    if not is_interpreted():
        return multiply(sums, start)

    def value(operand):
        if isinstance(operand, Part):
            return load(operand)
        return operand.tile[...].T if isinstance(operand, Transposed) else operand[...]

    def sum_of(pairs, start):
        terms = [jnp.dot(value(x), value(y), preferred_element_type=jnp.float32) for x, y in pairs]
        return sum(terms) if start is None else sum(terms, start)

    return tuple(sum_of(*x) for x in zip(sums, start, strict=True))
