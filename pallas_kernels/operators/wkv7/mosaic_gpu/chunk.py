"""What the kernels share: how a call is cut up, decays within a chunk, and segments.

Decays are measured from the middle of a chunk. With g the sum of log decays from the chunk's
beginning to a token, with it, and m the same at token 31,

    r^ = scale r exp(g - m)    a^ = a exp(g - w - m)    k^ = k exp(m - g)    b^ = b exp(m - g)

so that `r^ k^T` etc. hold the right decays whatever m is, and no exponent exceeds 32 times the
bound of the log decay. The state is kept transposed, `[V, K]`, because decays then scale columns;
`S^ = S exp(m)` goes with r^ and a^, and the state that leaves is `exp(gL - m)` times what k^ and b^
wrote, gL the sum over the whole chunk.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.registers import (
    STRIP,
    Strip,
    keep_triangle,
    load,
    store_exp2_of_row,
)
from pallas_kernels.hopper.target import TILE
from pallas_kernels.hopper.tiles import (
    LOG2E,
    Operand,
    anew,
    choose,
    keep,
    load32,
    load_rows,
    products,
    row_and_column,
    spread_rows,
)

MIDDLE = TILE // 2 - 1


def number_of_chunks(T: int) -> int:
    """Number of chunks in a row of T tokens; the last one may not be full."""
    return -(-T // TILE)


def chunk_of(gmem: Any, row: Any, chunk: Any, head: Any, block: Any) -> Any:
    """64 tokens by 64 channels of an array `[B, T, H, channels]` in global memory."""
    return gmem.at[row, pl.ds(chunk * TILE, TILE), head, pl.ds(block * TILE, TILE)]


def state_tile_of(gmem: Any, row: Any, head: Any, chunk: Any, part: Any, block: Any) -> Any:
    """64 values by 64 channels of states `[B, H, chunks, V, K]` in global memory."""
    return gmem.at[row, head, chunk, pl.ds(part * TILE, TILE), pl.ds(block * TILE, TILE)]


def values_tile_of(gmem: Any, row: Any, head: Any, chunk: Any, part: Any) -> Any:
    """64 tokens by 64 values of an array `[B, H, chunks, 64, V]`."""
    return gmem.at[row, head, chunk, :, pl.ds(part * TILE, TILE)]


def prefix_sums() -> np.ndarray:
    """`[64, 64]` bfloat16 to sum log decays with, from the middle of a chunk."""
    return (np.tri(TILE) - (np.arange(TILE) <= MIDDLE)).astype(jnp.bfloat16)


def decays_from_middle(w: Any, sums_smem: Any) -> jax.Array:
    """`(g - m) log2(e)` of a tile of log decays; `sums_smem` holds `prefix_sums`."""
    (g,) = products([(sums_smem, w)])
    return g * LOG2E


def until_token(g: jax.Array) -> jax.Array:
    """The decay up to a token and with its own, of `decays_from_middle`: what goes with r."""
    return jnp.exp2(g)


def before_token(g: jax.Array, w: Any) -> jax.Array:
    """The same without the token's own, for a tile of log decays: what goes with a."""
    return jnp.exp2(g - load32(w) * LOG2E)


def since_token(g: jax.Array) -> jax.Array:
    """The reverse of `until_token`: what goes with k and b."""
    return jnp.exp2(-g)


def store_decays_of_chunk(w: Strip, g: jax.Array, until_middle: Any, from_middle: Any) -> None:
    """Writes `exp(m)` and `exp(gL - m)` to vectors over channels in shared memory.

    They are read after the next barrier.

    Args:
      w: log decays of some channels.
      g: their `decays_from_middle`.
      until_middle: for the first, `[64]` float32.
      from_middle: for the second.
    """
    store_exp2_of_row(until_middle, load32(w) * LOG2E - g, 0, w.number)
    store_exp2_of_row(from_middle, g, TILE - 1, w.number)


def for_each_strip(body: Callable[[jax.Array], None]) -> None:
    """Calls a function for both parts of the columns of tiles, and waits for all threads.

    One after the other, by the same instructions: for whole tiles registers would not suffice.
    """
    jax.lax.fori_loop(0, anew(TILE // STRIP), lambda strip, _: body(strip), None)
    plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Masks:
    """What is to be kept of tiles of 16 bits: entries of pairs of tokens in the right order, of the
    same segment.

    Attributes:
      start: for each token the first of its segment in the chunk, -1 if the segment began before;
        None if all tokens are of one segment.
      end: the last one, 64 if the segment reaches the chunk's end.
      passes: whether the segment that entered also leaves.
    """

    start: jax.Array | None
    end: jax.Array | None
    passes: jax.Array | None

    def lower(self, *tiles: jax.Array, strictly: bool = False) -> tuple[jax.Array, ...]:
        """Of matrices with a row for each reading token and a column for each writing one."""
        tiles = keep_triangle(*tiles, lower=True, strictly=strictly)
        if self.start is None:
            return tiles
        return tuple(keep(row_and_column()[1] >= spread_rows(self.start), x) for x in tiles)

    def upper(self, *tiles: jax.Array, strictly: bool = False) -> tuple[jax.Array, ...]:
        """Of the transposed matrices, with a row for each writing token."""
        tiles = keep_triangle(*tiles, lower=False, strictly=strictly)
        if self.end is None:
            return tiles
        return tuple(keep(row_and_column()[1] <= spread_rows(self.end), x) for x in tiles)

    def entered(self, x: Operand) -> Operand:
        """The rows of x whose tokens read the state that entered the chunk, the others zero."""
        if self.start is None:
            return x
        x = _loaded(x)
        return keep(spread_rows(self.start, x.shape[1]) < 0, x)

    def leaving(self, x: Operand) -> Operand:
        """The rows of x whose tokens are read from the state that leaves, the others zero."""
        return x if self.end is None else keep(spread_rows(self.end) == TILE, _loaded(x))

    def passing(self, state: jax.Array) -> jax.Array:
        """A state that entered, zero if another segment begins in the chunk."""
        return state if self.passes is None else choose(self.passes, state, jnp.zeros_like(state))


def _loaded(x: Operand) -> jax.Array:
    return x if isinstance(x, jax.Array) else load(x)


def load_masks(bounds_gmem: Sequence[Any], row: Any, chunk: Any) -> Masks:
    """The masks of a chunk; `bounds_gmem` is empty if no segment begins inside of one."""
    if not bounds_gmem:
        return Masks(None, None, None)
    start_gmem, end_gmem = bounds_gmem
    tokens = pl.ds(chunk * TILE, TILE)
    return Masks(
        start=load_rows(start_gmem.at[row, tokens]),
        end=load_rows(end_gmem.at[row, tokens]),
        passes=start_gmem[row, chunk * TILE + TILE - 1] < 0,
    )
