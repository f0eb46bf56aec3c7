"""Chunks of 64 tokens: where they lie in global memory, and how their tokens decay.

Decays are measured from the middle of a chunk. Let g be the sum of log decays from the chunk's
first token to a token, that token included, m the same sum up to token 31, and gL up to the last
token. With w the log decay of the token itself,

    r^ = scale r exp(g - m)    a^ = a exp(g - w - m)    k^ = k exp(m - g)    b^ = b exp(m - g)

Products like `r^ k^T` hold the decay between two tokens whatever m is. No exponent exceeds 32 times
the bound of the log decay.

The state is kept transposed, `[V, K]`, because decays then scale its columns. r^ and a^ read
`S^ = S exp(m)`. The state that leaves the chunk is the sum of S^ and of what k^ and b^ wrote, times
`exp(gL - m)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.hopper.registers import Strip, load, store_exp2_of_row
from pallas_kernels.hopper.target import TILE
from pallas_kernels.hopper.tiles import LOG2E, load32, products

MIDDLE = TILE // 2 - 1
"""The token that decays are measured from."""


def number_of_chunks(T: int) -> int:
    """Returns the number of chunks in a row of T tokens; the last one may not be full."""
    return -(-T // TILE)


def tokens_tile(gmem: Any, row: Any, chunk: Any, head: Any, block: Any) -> Any:
    """Returns 64 tokens by 64 channels of an array `[B, T, H, channels]` in global memory."""
    return gmem.at[row, pl.ds(chunk * TILE, TILE), head, pl.ds(block * TILE, TILE)]


def state_tile(gmem: Any, row: Any, head: Any, chunk: Any, value_block: Any, block: Any) -> Any:
    """Returns 64 values by 64 channels of states `[B, H, chunks, V, K]` in global memory."""
    return gmem.at[row, head, chunk, pl.ds(value_block * TILE, TILE), pl.ds(block * TILE, TILE)]


def values_tile(gmem: Any, row: Any, head: Any, chunk: Any, value_block: Any) -> Any:
    """Returns 64 tokens by 64 values of an array `[B, H, chunks, 64, V]` in global memory."""
    return gmem.at[row, head, chunk, :, pl.ds(value_block * TILE, TILE)]


def prefix_sums() -> np.ndarray:
    """Returns the bfloat16 matrix `[64, 64]` that sums log decays, from the middle of a chunk."""
    return (np.tri(TILE) - (np.arange(TILE) <= MIDDLE)).astype(jnp.bfloat16)


def decays_from_middle(log_decay: Any, sums_smem: Any) -> jax.Array:
    """Returns `(g - m) log2(e)`, float32, for each token and channel.

    Args:
      log_decay: a tile or a strip in shared memory.
      sums_smem: `prefix_sums` in shared memory.
    """
    (g,) = products([(sums_smem, log_decay)])
    return g * LOG2E


_MOST_LOG_DECAY = 2.0**-3
"""Half a chunk of them changes numbers by a factor of e^4, about 55, at most."""


def little_decay(log_decay: Any, strip: int) -> tuple[jax.Array, float, float]:
    """Returns log decays with bounds, for `are_between` to tell whether a chunk forgets little.

    Args:
      log_decay: a tile in shared memory.
      strip: which channels, as in `Strip`.
    """
    return load(Strip(log_decay, jnp.int32(strip))), 0.0, _MOST_LOG_DECAY


def until_token(g: jax.Array) -> jax.Array:
    """Returns `exp(g - m)`, which r is multiplied by, of `decays_from_middle`."""
    return jnp.exp2(g)


def before_token(g: jax.Array, log_decay: Any) -> jax.Array:
    """Returns `exp(g - w - m)`, which a is multiplied by.

    Args:
      g: `decays_from_middle`.
      log_decay: the tile or strip in shared memory that g was made of.
    """
    return jnp.exp2(g - load32(log_decay) * LOG2E)


def since_token(g: jax.Array) -> jax.Array:
    """Returns `exp(m - g)`, which k and b are multiplied by, of `decays_from_middle`."""
    return jnp.exp2(-g)


def store_decays_of_chunk(
    log_decay: Strip,
    g: jax.Array,
    until_middle: Any,
    from_middle: Any,
    exponent: jax.Array | None = None,
) -> None:
    """Writes `exp(m)` and `exp(gL - m)` of some channels to shared memory.

    A barrier must follow before they are read.

    Args:
      log_decay: the channels.
      g: `decays_from_middle` of them.
      until_middle: `[64]` float32, gets `exp(m)`.
      from_middle: `[64]` float32, gets `exp(gL - m)`.
      exponent: float32 scalar: `exp(gL - m)` is multiplied by this power of two, and `exp(m)`
        divided by it. None for neither.
    """
    first_row, last_row = load32(log_decay) * LOG2E - g, g
    if exponent is not None:
        first_row, last_row = first_row - exponent, last_row + exponent
    store_exp2_of_row(until_middle, first_row, 0, log_decay.number)
    store_exp2_of_row(from_middle, last_row, TILE - 1, log_decay.number)
