"""Moves the tokens of a row so that each segment begins a chunk.

The states of segments then enter and leave between chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.packing import find_segments
from pallas_kernels.types import SegmentIds, Size
from pallas_kernels.validation import is_known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transfers:
    """Says which of the N states of a row are loaded before each chunk and stored after it.

    Attributes:
      load: `[B, T / L]` int32, the stored state that a chunk starts from; N to go on with
        the state of the chunk before.
      store: `[B, T / L]` int32, the segment that ends with a chunk; N for none.
    """

    load: jax.Array
    store: jax.Array


def aligned_length(T: Size, num_segments: int, chunk: int) -> Size:
    """Returns how long rows of T tokens become: each segment may need chunk - 1 more tokens."""
    most = min(T, num_segments) if is_known(T) else num_segments
    return (T + most * (chunk - 1)) // chunk * chunk


def align_segments(
    segment_ids: SegmentIds, num_segments: int, chunk: int, T: Size
) -> tuple[jax.Array, Transfers]:
    """Finds the tokens' new positions and the states that move between chunks.

    Args:
      segment_ids: `[B, tokens]`, before the move.
      num_segments: N.
      chunk: L.
      T: length of a row after the move, from `aligned_length`.

    Returns:
      `[B, tokens]` int32, the new position of each token; T, which is out of range, for padding.
      The transfers of the chunks after the move.
    """
    B, N = segment_ids.shape[0], num_segments
    row = jnp.arange(B)[:, None]
    segments = find_segments(segment_ids)
    slot = jnp.where(segments.valid, segment_ids - 1, N)
    tokens = jnp.zeros((B, N), jnp.int32).at[row, slot].add(1, mode="drop")
    chunks = -(-tokens // chunk)
    end = jnp.cumsum(chunks, axis=1)  # [B, N], in chunks
    begin = end - chunks
    count = jnp.cumsum(segments.valid, axis=1)
    rank = count - jax.lax.cummax(jnp.where(segments.start, count, 0), axis=1)
    position = begin.at[row, slot].get(mode="clip") * chunk + rank
    position = jnp.where(segments.valid, position, T)

    each = jnp.arange(T // chunk)
    owner = jax.vmap(lambda end: jnp.searchsorted(end, each, side="right"))(end)  # [B, T / L]
    load = jnp.where(each[None] == begin.at[row, owner].get(mode="clip"), owner, N)
    store = jnp.where(each[None] + 1 == end.at[row, owner].get(mode="clip"), owner, N)
    return position, Transfers(load.astype(jnp.int32), store.astype(jnp.int32))


__all__ = ["Transfers", "align_segments", "aligned_length"]
