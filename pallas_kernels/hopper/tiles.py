"""Tiles: matrices of 64 x 64, in shared memory or in the registers of a warpgroup."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.products import Transposed, multiply
from pallas_kernels.hopper.registers import (
    STRIP,
    TILE_LAYOUT,
    TRANSFORMS,
    Strip,
    halves_of,
    load,
    numbers_of,
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
"""A 16-bit tile in shared memory, its `transposed`, or a 16-bit tile in registers."""


def tiles_smem(*counts: int, dtype: Any = jnp.bfloat16) -> Any:
    """Returns the type of shared memory for `[*counts, 64, 64]`, laid out for tensor cores."""
    return plgpu.SMEM((*counts, TILE, TILE), dtype, transforms=TRANSFORMS)


def anew(index: jax.Array | int) -> jax.Array:
    """Returns an index of tiles that LLVM does not know, so that it computes addresses anew.

    It would keep the addresses of all tiles from one use to the next, in more registers than there
    are.
    """
    return jax.lax.optimization_barrier(jnp.int32(index))


def for_each_strip(body: Callable[[jax.Array], None]) -> None:
    """Calls a function with the number of each `Strip` of a tile, and waits for all threads.

    A loop, not two copies of the instructions, because strips are for work that has no registers
    for whole tiles.
    """
    jax.lax.fori_loop(0, anew(TILE // STRIP), lambda number, _: body(number), None)
    plgpu.commit_smem()


def load32(x: Any, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Loads a 16-bit tile, or a `Strip` of one, and converts it to float32."""
    return widen(load(x), dtype)


def load_rows(ref: Any) -> jax.Array:
    """Loads a vector `[64]` that has an entry for each row of a tile."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def load_columns(ref: Any) -> jax.Array:
    """Loads a vector `[64]` that has an entry for each column of a tile."""
    return plgpu.load(ref, layout=COLUMNS, optimized=False)


def spread_rows(vector: jax.Array, columns: int = TILE) -> jax.Array:
    """Repeats a vector from `load_rows` in each column of a tile."""
    return jax.lax.broadcast_in_dim(vector, (TILE, columns), [0])


def spread_columns(vector: jax.Array) -> jax.Array:
    """Repeats a vector from `load_columns` in each row of a tile."""
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), [1])


def transposed(ref: Any) -> Transposed:
    """Returns the transpose of a tile in shared memory, as an operand of a product."""
    return Transposed(ref)


def row_and_column() -> tuple[jax.Array, jax.Array]:
    """Returns two int32 tiles: the row, and the column, of each entry."""
    row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS)
    # Without the barrier LLVM would compute masks once for all steps and keep them, in more
    # registers than there are.
    row = spread_rows(jax.lax.optimization_barrier(row))
    return row, plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=TILE_LAYOUT)


def choose(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x if a boolean scalar is true, else y."""
    # Mosaic GPU cannot select between tiles by a scalar.
    return jnp.where(jnp.broadcast_to(condition, x.shape), x, y)


def keep(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x where the mask is true, else 0."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def store_halves(x: jax.Array, high: Any, low: Any) -> tuple[Any, Any]:
    """Writes `halves_of` x to two tiles in shared memory, and returns these tiles."""
    store(*zip((high, low), halves_of(x), strict=True))
    return high, low


def products(
    *sums: Sequence[tuple[Operand, Operand]],
    start: Sequence[jax.Array | None] | None = None,
    dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, ...]:
    """Computes sums of matrix products, `start + x @ y + ...`, in float32.

    Args:
      *sums: pairs (x, y) of 16-bit tiles for each sum. y lies in shared memory; every y may be a
        `Strip`, all with one number.
      start: float32 tiles that the sums start from; None for zero.
      dtype: of the numbers of all operands, bfloat16 or float16.

    Returns:
      A float32 tile in registers for each sum.
    """
    start = [None] * len(sums) if start is None else start
    if not is_interpreted():
        return multiply(sums, start, dtype)

    def value(operand):
        if isinstance(operand, Strip):
            return numbers_of(load(operand), dtype)
        if isinstance(operand, Transposed):
            return numbers_of(operand.tile[...], dtype).T
        return numbers_of(operand[...], dtype)

    def sum_of(pairs, start):
        terms = [jnp.dot(value(x), value(y), preferred_element_type=jnp.float32) for x, y in pairs]
        return sum(terms) if start is None else sum(terms, start)

    return tuple(sum_of(*x) for x in zip(sums, start, strict=True))


def column_sums(
    mask: Callable[[jax.Array], Sequence[jax.Array]],
    halves: tuple[Operand, Operand],
    start: jax.Array,
) -> jax.Array:
    """Sums over the rows of a tile, by tensor cores, with a choice of rows for each row of the sum.

    Args:
      mask: keeps some entries of a bfloat16 tile and sets the others to zero. Entry (i, j) of a
        tile of ones tells whether row j is added to row i of the result.
      halves: the tile, as `store_halves` returns it.
      start: float32 tile in registers that the sums are added to.

    Returns:
      A float32 tile in registers.
    """
    (ones,) = mask(plgpu.layout_cast(jnp.ones((TILE, TILE), jnp.bfloat16), TILE_LAYOUT))
    (total,) = products([(ones, half) for half in halves], start=[start])
    return total
