"""Which pairs of tokens of a chunk act on each other, and which tokens meet the state.

A token reads only what earlier tokens of its own segment wrote. It reads the state that entered the
chunk only if its segment began before the chunk, and is read from the state that leaves it only if
no other segment begins after it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.hopper.registers import keep_triangle, load
from pallas_kernels.hopper.target import TILE
from pallas_kernels.hopper.tiles import (
    Operand,
    choose,
    keep,
    load_rows,
    row_and_column,
    spread_rows,
)


class SegmentBounds(NamedTuple):
    """Where the segment of each token begins and ends, as positions in the token's chunk.

    Attributes:
      first: `[B, T]` int32, the first token of the segment; -1 if it began before the chunk.
      last: `[B, T]` int32, the last token of the segment; 64 if it goes on after the chunk or ends
        with it.
    """

    first: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class TileMasks:
    """Sets entries of a chunk's tiles to zero; all three attributes are None if it has one segment.

    Attributes:
      first: `[64]`, `SegmentBounds.first` of the chunk's tokens, an entry for each row of a tile.
      last: `[64]`, `SegmentBounds.last` of the chunk's tokens.
      passes: boolean scalar, whether the segment that entered the chunk also leaves it.
    """

    first: jax.Array | None
    last: jax.Array | None
    passes: jax.Array | None

    def lower(self, *tiles: jax.Array, strictly: bool = False) -> tuple[jax.Array, ...]:
        """Masks matrices with a row for each reading token and a column for each writing one.

        Args:
          *tiles: bfloat16.
          strictly: whether tokens do not read what they write themselves.
        """
        tiles = keep_triangle(*tiles, lower=True, strictly=strictly)
        if self.first is None:
            return tiles
        return tuple(keep(row_and_column()[1] >= spread_rows(self.first), x) for x in tiles)

    def upper(self, *tiles: jax.Array, strictly: bool = False) -> tuple[jax.Array, ...]:
        """Masks matrices with a row for each writing token and a column for each reading one.

        Args:
          *tiles: bfloat16.
          strictly: whether tokens do not read what they write themselves.
        """
        tiles = keep_triangle(*tiles, lower=False, strictly=strictly)
        if self.last is None:
            return tiles
        return tuple(keep(row_and_column()[1] <= spread_rows(self.last), x) for x in tiles)

    def entered(self, x: Operand) -> Operand:
        """Keeps the rows of tokens that read the state which entered the chunk."""
        if self.first is None:
            return x
        x = _loaded(x)
        return keep(spread_rows(self.first, x.shape[1]) < 0, x)

    def leaving(self, x: Operand) -> Operand:
        """Keeps the rows of tokens that are read from the state which leaves the chunk."""
        return x if self.last is None else keep(spread_rows(self.last) == TILE, _loaded(x))

    def passing(self, state: jax.Array) -> jax.Array:
        """Returns the state that entered the chunk, or zero if another segment begins in it."""
        return state if self.passes is None else choose(self.passes, state, jnp.zeros_like(state))


def _loaded(x: Operand) -> jax.Array:
    return x if isinstance(x, jax.Array) else load(x)


def load_masks(bounds_gmem: SegmentBounds | None, row: jax.Array, chunk: jax.Array) -> TileMasks:
    """Loads the masks of a chunk.

    Args:
      bounds_gmem: references; None if no segment begins within a chunk.
      row: row of the batch.
      chunk: chunk of that row.
    """
    if bounds_gmem is None:
        return TileMasks(None, None, None)
    tokens = pl.ds(chunk * TILE, TILE)
    return TileMasks(
        first=load_rows(bounds_gmem.first.at[row, tokens]),
        last=load_rows(bounds_gmem.last.at[row, tokens]),
        passes=bounds_gmem.first[row, chunk * TILE + TILE - 1] < 0,
    )


__all__ = ["SegmentBounds", "TileMasks", "load_masks"]
