"""Lays tokenized documents of different lengths side by side in rows of one length."""

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pallas_kernels.validation import check_positive


def pack_documents(
    documents: Sequence[Sequence[int]], *, length: int
) -> tuple[Int[np.ndarray, "rows length"], Int[np.ndarray, "rows length"]]:
    """Packs documents into rows, each document a segment of its own.

    A document is put at the end of the row that it fills up best. A document longer than a row is
    cut into pieces, and each piece becomes a segment.

    Args:
      documents: sequences of token ids; empty ones are left out.
      length: tokens of a row (T + 1 for `next_token_batch`).

    Returns:
      tokens: `[rows, length]` int32; 0 in padding.
      segment_ids: `[rows, length]` int32; segments are numbered from 1 in each row, 0 is padding.

    Raises:
      ValueError: if no document has a token, or `length` is not a positive integer.
    """
    check_positive("length", length)
    pieces = [
        np.asarray(document[start : start + length], np.int32)
        for document in documents
        for start in range(0, len(document), length)
    ]
    if not pieces:
        raise ValueError("documents must hold at least one token")
    rows: list[list[np.ndarray]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in pieces:
        best = bisect.bisect_left(rooms, (len(piece), -1))
        if best == len(rooms):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = rooms.pop(best)
        rows[row].append(piece)
        bisect.insort(rooms, (free - len(piece), row))
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, row_pieces in enumerate(rows):
        sizes = [len(piece) for piece in row_pieces]
        tokens[i, : sum(sizes)] = np.concatenate(row_pieces)
        segment_ids[i, : sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return tokens, segment_ids


__all__ = ["pack_documents"]
