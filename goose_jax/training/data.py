"""Batches of tokens. Only numpy: nothing here touches a device."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.validation import check_positive

NOT_COUNTED = -1
"""A target that is left out of the loss."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one training step reads; with a leading axis A, as A microbatches.

    Attributes:
      inputs: `[(A,) B, T]` int32 tokens.
      targets: `[(A,) B, T]` int32, the token to predict at each place, or `NOT_COUNTED`.
      segment_ids: `[(A,) B, T]` int32 (0 is padding), or None if every row is one sequence.
    """

    inputs: Int[Array | np.ndarray, "*batch B T"]
    targets: Int[Array | np.ndarray, "*batch B T"]
    segment_ids: Int[Array | np.ndarray, "*batch B T"] | None = None


def next_token_batch(tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> Batch:
    """The batch in which every token predicts the next one of its sequence.

    Args:
      tokens: `[(A,) B, T + 1]` integers.
      segment_ids: `[(A,) B, T + 1]` integers, 0 for padding; consecutive equal ids, padding left
        out, are one sequence. The last token of a sequence and padding predict nothing.

    Returns:
      A batch of T tokens per row.

    Raises:
      ValueError: if the shapes differ, or have fewer than two axes or two tokens.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim not in (2, 3) or tokens.shape[-1] < 2:
        raise ValueError(f"tokens must have shape [(A,) B, T + 1] with T >= 1, got {tokens.shape=}")
    if segment_ids is None:
        return Batch(tokens[..., :-1], tokens[..., 1:])
    ids = np.asarray(segment_ids, np.int32)
    if ids.shape != tokens.shape:
        raise ValueError(f"segment_ids must have {tokens.shape=}, got {ids.shape=}")
    # The nearest place to the right that is not padding: found from the right, as a minimum.
    place = np.where(ids != 0, np.arange(ids.shape[-1]), ids.shape[-1] - 1)
    following = np.minimum.accumulate(place[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    same = (np.take_along_axis(ids, following, -1) == ids[..., :-1]) & (ids[..., :-1] != 0)
    targets = np.where(same, np.take_along_axis(tokens, following, -1), NOT_COUNTED)
    return Batch(tokens[..., :-1], targets.astype(np.int32), ids[..., :-1])


def random_batch(
    tokens: np.ndarray,
    step: int,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    microbatches: int = 1,
) -> Batch:
    """Windows drawn at random from one row of tokens: a pure function of `seed` and `step`.

    A run that is resumed at some step therefore sees what it would have seen without the break.

    Args:
      tokens: `[N]` integers, N > sequence_length.
      step: counts from 0.
      batch_size: B, rows of each microbatch.
      sequence_length: T.
      seed: another seed gives other windows.
      microbatches: A; 1 gives a batch without the leading axis.

    Raises:
      ValueError: if the tokens do not fill one window, or a size is not a positive integer.
    """
    check_positive("batch_size", batch_size)
    check_positive("sequence_length", sequence_length)
    check_positive("microbatches", microbatches)
    starts = len(tokens) - sequence_length
    if starts < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill a window of {sequence_length=} + 1")
    shape = (batch_size,) if microbatches == 1 else (microbatches, batch_size)
    first = np.random.default_rng((seed, step)).integers(0, starts, shape)
    return next_token_batch(tokens[first[..., None] + np.arange(sequence_length + 1)])


def evaluation_batches(
    tokens: np.ndarray, *, batch_size: int, sequence_length: int
) -> Iterator[Batch]:
    """Batches `[B, T]` in which every token of a row but the first is a target exactly once.

    Args:
      tokens: `[N]` integers, N >= 2.
      batch_size: B; the last batch is filled up with rows that are not counted.
      sequence_length: T; each window starts without memory of the one before.
    """
    check_positive("batch_size", batch_size)
    check_positive("sequence_length", sequence_length)
    if len(tokens) < 2:
        raise ValueError(f"tokens must hold at least two, got {len(tokens)=}")
    area = batch_size * sequence_length
    missing = -(len(tokens) - 1) % area
    inputs = np.pad(np.asarray(tokens[:-1], np.int32), (0, missing))
    targets = np.pad(np.asarray(tokens[1:], np.int32), (0, missing), constant_values=NOT_COUNTED)
    shape = (-1, batch_size, sequence_length)
    for some_inputs, some_targets in zip(
        inputs.reshape(shape), targets.reshape(shape), strict=True
    ):
        yield Batch(some_inputs, some_targets)


def pack_documents(
    documents: Sequence[Sequence[int]], *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lays tokenized documents side by side into rows of one length, each a segment of its own.

    A document goes to the end of the row that it fills up best; one that is longer than a row is
    cut into pieces, and each piece becomes a segment.

    Args:
      documents: sequences of token ids; empty ones are left out.
      length: tokens of a row (T + 1 for `next_token_batch`).

    Returns:
      (tokens, segment_ids), both `[rows, length]` int32: segments are numbered from 1 in each row,
      0 is padding.

    Raises:
      ValueError: if no document has a token.
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


__all__ = [
    "NOT_COUNTED",
    "Batch",
    "evaluation_batches",
    "next_token_batch",
    "pack_documents",
    "random_batch",
]
