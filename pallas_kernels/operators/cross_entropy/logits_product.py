"""Exponentials of logits and statistics, or only these, from one kernel on Hopper GPUs.

Each tile of the product of tokens and head gives, for each of its rows, statistics of the logits in
it. A small second pass joins those of a row's tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.matrix_product import COLUMNS, Epilogue, Memory, multiply
from pallas_kernels.hopper.registers import TILE_LAYOUT, TRANSFORMS, first_zeros
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import LOG2E, ROWS, keep, load_rows, spread_rows
from pallas_kernels.hopper.whole_tokens import LOWEST

MOST = 50.0
"""Exponentials of logits up to this one are stored as they are. Sums of products with them, and the
inverse of their sum, stay within the range of float32."""

_LEAST = -80.0
"""Exponentials of logits from this one on are stored as they are. bfloat16 has few smaller ones."""

_WORKERS = 2


class TileStatistics(NamedTuple):
    """Statistics of a row's logits in each tile of 256 columns.

    Attributes:
      largest: `[tiles, M]` float32, the largest logit.
      total: `[tiles, M]` float32, sum of `exp(logits - largest)`.
      of_target: `[tiles, M]` float32, logit of the target; 0 if the tile does not have it.
      first: `[tiles, M]` float32, column of the largest logit, counted from the beginning of the
        tile; the first of equals. None without exponentials.
    """

    largest: jax.Array
    total: jax.Array
    of_target: jax.Array
    first: jax.Array | None


def bases_of(largest: jax.Array) -> jax.Array:
    """Returns what is subtracted from logits before their exponentials are stored.

    It is 0 if the largest logit of the row in the tile is between `_LEAST` and `MOST`. Else it
    makes that logit equal to the nearer of both.

    Args:
      largest: the largest logit of a row in a tile.
    """
    return largest - jnp.clip(largest, _LEAST, MOST)


def statistics_of_product(
    target: Target,
    x: Float[Array, "M K"],
    y: Float[Array, "K N"],
    targets: Int[Array, " M"],
    *,
    with_exponentials: bool,
) -> tuple[Float[Array, "M N"] | None, TileStatistics]:
    """Returns exponentials of the logits `x @ y` less the `bases_of` tiles, and statistics of rows.

    Args:
      target: the GPU, for which `matrix_product.is_served` is true.
      x: `[M, K]` bfloat16.
      y: `[K, N]` bfloat16.
      targets: int32, of each row one column; others than 0..N-1 are in no tile.
      with_exponentials: whether to store the exponentials, in bfloat16; else None stands for them.
    """
    epilogue = _Statistics(targets, y.shape[1], with_exponentials)
    name = "exponentials_of_logits" if with_exponentials else "statistics_of_logits"
    largest, total, of_target, *others = multiply(target, x, y, epilogue, name=name)
    first, exponentials = others if with_exponentials else (None, None)
    return exponentials, TileStatistics(largest, total, of_target, first)


class _Statistics(Epilogue):
    """Finds statistics of rows, from sums in float32 that are still in registers."""

    def __init__(self, targets: Int[Array, " M"], columns: int, with_exponentials: bool):
        rows, tiles = len(targets), columns // COLUMNS
        self.with_exponentials = with_exponentials
        tile_of_target = jnp.floor_divide(targets, COLUMNS).reshape(1, -1, TILE)
        has_target = (tile_of_target == jnp.arange(tiles)[:, None, None]).any(-1)
        self.operands = (targets, has_target.astype(jnp.int32))
        of_tiles = jax.ShapeDtypeStruct((tiles, rows), jnp.float32)
        self.results = (of_tiles,) * 3
        self.scratch_types = {}
        if with_exponentials:
            self.results += of_tiles, jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
            shape = (_WORKERS, TILE, COLUMNS)
            exponentials_smem = plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)
            self.scratch_types = {"exponentials_smem": exponentials_smem}

    def store(
        self, memory: Memory, worker: jax.Array, row: jax.Array, column: jax.Array, sums: jax.Array
    ) -> None:
        rows = pl.ds(row, TILE)
        tile = jax.lax.div(column, jnp.int32(COLUMNS))
        largest_gmem, total_gmem, of_target_gmem, *_ = memory.results
        targets_gmem, has_target_gmem = memory.operands
        # Long before it is needed, because it takes a while to arrive.
        has_target = has_target_gmem[tile, jax.lax.div(row, jnp.int32(TILE))] > 0
        # Parts, because there are no registers for more numbers beside the sums.
        parts = {first: sums[:, first : first + TILE] for first in range(0, COLUMNS, TILE)}

        largest = jnp.float32(LOWEST)
        for logits in parts.values():
            largest = jnp.maximum(largest, logits.max(1))

        def find_target() -> None:
            of_target = jnp.float32(0)
            in_tile = load_rows(targets_gmem.at[rows]) - column
            of_column = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=TILE_LAYOUT)
            for first, logits in parts.items():
                is_target = of_column == spread_rows(in_tile - first)
                of_target += keep(is_target, logits).sum(1)
            of_target_gmem[tile, rows] = of_target

        def find_none() -> None:
            of_target_gmem[tile, rows] = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS)

        # Where rows have targets all over the vocabulary, most tiles have none. Before differences
        # take the place of logits: there are no registers for both.
        jax.lax.cond(has_target, find_target, find_none)

        if self.with_exponentials:
            exponentials_smem = memory.scratch["exponentials_smem"].at[worker]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            plgpu.commit_smem()
            scale = spread_rows(jnp.exp2((largest - bases_of(largest)) * LOG2E))
        total, first_largest = jnp.float32(0), jnp.float32(COLUMNS - 1)
        for first, logits in parts.items():
            # First the difference: where logits are huge, a product with a sum of them would round.
            difference = logits - spread_rows(largest)
            exponential = jnp.exp2(difference * LOG2E)
            total += exponential.sum(1)
            if self.with_exponentials:
                scaled = (exponential * scale).astype(jnp.bfloat16)
                exponentials_smem[:, pl.ds(first, TILE)] = scaled
                first_largest = jnp.minimum(first_largest, first_zeros(difference) + first)
        if self.with_exponentials:
            plgpu.commit_smem()
            columns = pl.ds(column, COLUMNS)
            plgpu.copy_smem_to_gmem(exponentials_smem, memory.results[4].at[rows, columns])
            memory.results[3][tile, rows] = first_largest.min(1)
        largest_gmem[tile, rows] = largest
        total_gmem[tile, rows] = total


__all__ = ["MOST", "TileStatistics", "bases_of", "statistics_of_product"]
