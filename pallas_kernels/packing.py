"""Several sequences in one row of tokens.

`segment_ids[b, t]` says which sequence a token belongs to: 0 is padding, consecutive equal ids are
one segment. Padding counts as absent, wherever it stands: it neither reads nor changes a state, its
outputs are zero, and taking it out changes nothing for the others. A recurrent state restarts at
the first token of each segment; a state that a caller carries in belongs to the first segment of
the row, and the state handed back is the one after the row's last token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.types import SegmentIds
from pallas_kernels.validation import check_int, check_positive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the segments of rows begin and end.

    Attributes:
      valid: `[B, T]`, false for padding.
      index: `[B, T]` int32, 0 for the row's first segment, 1 for its second, and so on; padding has
        the index of the token before it (0 at the beginning of a row).
      start: `[B, T]`, true for the first token of each segment.
      end: `[B, T]`, true for the last token of each segment.
      previous: `[B, T]` int32, position of the token before in the same segment, or -1.
    """

    valid: Bool[Array, "B T"]
    index: Int[Array, "B T"]
    start: Bool[Array, "B T"]
    end: Bool[Array, "B T"]
    previous: Int[Array, "B T"]


def find_segments(segment_ids: SegmentIds) -> Segments:
    """Finds the segments of each row of `segment_ids` `[B, T]`."""
    valid = segment_ids != 0
    before, id_before = _nearest_before(segment_ids)
    _, id_after = _nearest_before(jnp.flip(segment_ids, 1))
    start = valid & (id_before != segment_ids)
    end = valid & (jnp.flip(id_after, 1) != segment_ids)
    index = jnp.maximum(jnp.cumsum(start, axis=1, dtype=jnp.int32) - 1, 0)
    return Segments(valid, index, start, end, previous=jnp.where(valid & ~start, before, -1))


def _nearest_before(segment_ids: SegmentIds) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Finds the last token before each one that is not padding.

    Returns:
      Its position; -1 if there is none.
      Its segment id; 0 if there is none.
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(segment_ids != 0, position, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return before, jnp.where(before < 0, 0, ids)


def segment_ids_from_cu_seqlens(cu_seqlens: Any, length: int) -> SegmentIds:
    """Returns the segment ids `[1, length]` int32 of a row that FLA's `cu_seqlens` describes.

    Args:
      cu_seqlens: `[N + 1]` integers, non-decreasing, starting at 0: sequence n takes the tokens
        from `cu_seqlens[n]` to `cu_seqlens[n + 1] - 1`; it may be empty. Its id is n + 1. Tokens
        from `cu_seqlens[N]` on are padding.
      length: T, the static number of tokens in the row.

    Raises:
      TypeError: if `cu_seqlens` is not an array of integers.
      ValueError: if its shape or, where known (not under jit), its values are wrong.
    """
    cu_seqlens = cu_seqlens if hasattr(cu_seqlens, "dtype") else jnp.asarray(cu_seqlens)
    check_int("cu_seqlens", cu_seqlens, "N+1", {})
    check_positive("length", length)
    if not isinstance(cu_seqlens, jax.core.Tracer):
        values = np.asarray(cu_seqlens)
        if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > length:
            raise ValueError(
                f"cu_seqlens must rise from 0 to at most {length=}, got {values.tolist()}"
            )
    token = jnp.arange(length, dtype=jnp.int32)
    ids = jnp.searchsorted(cu_seqlens, token, side="right").astype(jnp.int32)
    return jnp.where(token < cu_seqlens[-1], ids, 0)[None]


__all__ = ["Segments", "find_segments", "segment_ids_from_cu_seqlens"]
