"""Batches of tokens. They are made with NumPy on the host; nothing here touches a device."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Protocol, Self

import jax
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Int

from pallas_kernels.validation import check_positive

NOT_COUNTED = -1
"""A target that is left out of the loss, as every target below 0 is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of one training step; a leading axis A divides them into A microbatches.

    Attributes:
      inputs: `[(A,) B, T]` int32, tokens that the model reads.
      targets: `[(A,) B, T]` int32, the token to predict at each place; below 0 (such as
        `NOT_COUNTED`) where there is none.
      segment_ids: `[(A,) B, T]` int32, 0 for padding; None if every row is one sequence.
    """

    inputs: Int[Array | np.ndarray, "*batch B T"]
    targets: Int[Array | np.ndarray, "*batch B T"]
    segment_ids: Int[Array | np.ndarray, "*batch B T"] | None = None


class BatchSource(Protocol):
    """Training data: one batch for each step, always the same one for the same step.

    A run that is resumed at some step therefore reads what it would have read without the break.
    Several processes divide the rows of each batch: the rows of all processes, one process after
    another, are the batch that a single process reads.
    """

    @property
    def source(self) -> str:
        """What messages call the data, such as its path."""
        ...

    @property
    def checksum(self) -> str:
        """Identifies the data. A run is resumed only with data of the same checksum."""
        ...

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0: the rows of this process."""
        ...

    def for_process(self, index: int, count: int) -> Self:
        """Returns the same data for one of several processes.

        Args:
          index: number of the process, from 0, as `jax.process_index()`.
          count: number of processes, as `jax.process_count()`. It divides the batch size.

        Raises:
          ValueError: if `index` is not in 0..count - 1, or `count` does not divide the batch size.
        """
        ...


def process_rows(batch_size: int, index: int, count: int) -> slice:
    """Returns which of the `batch_size` rows of a batch belong to one of `count` processes.

    Raises:
      ValueError: if `index` is not in 0..count - 1, or `count` does not divide `batch_size`.
    """
    check_positive("process_count", count)
    if not 0 <= index < count:
        raise ValueError(f"process_index must be in 0..{count - 1}, got {index}")
    if batch_size % count:
        raise ValueError(f"{batch_size=} must be a multiple of the {count} processes")
    rows = batch_size // count
    return slice(index * rows, (index + 1) * rows)


def next_token_batch(tokens: npt.ArrayLike, segment_ids: npt.ArrayLike | None = None) -> Batch:
    """Returns the batch in which every token predicts the next token of its sequence.

    Args:
      tokens: `[(A,) B, T + 1]` integers.
      segment_ids: `[(A,) B, T + 1]` integers, 0 for padding. Tokens with equal ids are one
        sequence if at most padding is between them. The last token of a sequence predicts nothing,
        and padding predicts nothing. None makes each row one sequence.

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
    # For each place the nearest one to its right that is not padding: a running minimum from the
    # right over the indices of such places.
    place = np.where(ids != 0, np.arange(ids.shape[-1]), ids.shape[-1] - 1)
    following = np.minimum.accumulate(place[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    same = (np.take_along_axis(ids, following, -1) == ids[..., :-1]) & (ids[..., :-1] != 0)
    targets = np.where(same, np.take_along_axis(tokens, following, -1), NOT_COUNTED)
    return Batch(tokens[..., :-1], targets.astype(np.int32), ids[..., :-1])


def random_batch(
    tokens: Int[np.ndarray, " N"],
    step: int,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    microbatches: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    counted: Bool[np.ndarray, " N"] | None = None,
) -> Batch:
    """Draws windows at random from one row of tokens, as a pure function of `seed` and `step`.

    Args:
      tokens: `[N]` integers, N > sequence_length.
      step: counts from 0.
      batch_size: B, rows of each microbatch.
      sequence_length: T, tokens of a row.
      seed: another seed gives other windows.
      microbatches: A; 1 gives a batch without the leading axis.
      process_index: which process reads, from 0. It gets its share of the B rows.
      process_count: number of processes; it divides B.
      counted: `[N]`, false for tokens that are no target; None counts all.

    Raises:
      ValueError: if the tokens do not fill one window, a size is not a positive integer, or the
        processes cannot divide the rows.
    """
    check_positive("batch_size", batch_size)
    check_positive("sequence_length", sequence_length)
    check_positive("microbatches", microbatches)
    starts = len(tokens) - sequence_length
    if starts < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill a window of {sequence_length=} + 1")
    shape = (batch_size,) if microbatches == 1 else (microbatches, batch_size)
    rows = process_rows(batch_size, process_index, process_count)
    first = window_starts(starts, shape, step, seed=seed)[..., rows]
    places = first[..., None] + np.arange(sequence_length + 1)
    batch = next_token_batch(tokens[places])
    if counted is None:
        return batch
    targets = np.where(counted[places[..., 1:]], batch.targets, NOT_COUNTED)
    return dataclasses.replace(batch, targets=targets)


def window_starts(
    count: int, shape: tuple[int, ...], step: int, *, seed: int
) -> Int[np.ndarray, "..."]:
    """Draws where windows begin, from 0 to `count - 1`; a pure function of `seed` and `step`."""
    return np.random.default_rng((seed, step)).integers(0, count, shape)


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWindows:
    """A `BatchSource` that draws its batches from one row of tokens with `random_batch`.

    Attributes:
      tokens: `[N]` integers, N > sequence_length.
      batch_size: B, rows of each microbatch.
      sequence_length: T, tokens of a row.
      seed: another seed gives other windows.
      microbatches: A; 1 gives batches without the leading axis.
      source: what messages call the tokens.
      process_index: which process reads, from 0. It gets its share of the B rows.
      process_count: number of processes; it divides B.
      counted: `[N]`, false for tokens that are no target; None counts all.
    """

    tokens: Int[np.ndarray, " N"]
    _: dataclasses.KW_ONLY
    batch_size: int
    sequence_length: int
    seed: int
    microbatches: int = 1
    source: str = "the tokens"
    process_index: int = 0
    process_count: int = 1
    counted: Bool[np.ndarray, " N"] | None = None

    @functools.cached_property
    def checksum(self) -> str:
        """The SHA-256 of the tokens and of what is counted, in hexadecimal digits."""
        digest = hashlib.sha256(self.tokens.tobytes())
        if self.counted is not None:
            digest.update(self.counted.tobytes())
        return digest.hexdigest()

    def for_process(self, index: int, count: int) -> Self:
        """Returns the same data for one of several processes, as `BatchSource` says."""
        process_rows(self.batch_size, index, count)
        return dataclasses.replace(self, process_index=index, process_count=count)

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0: the rows of this process.

        Raises:
          ValueError: if the tokens do not fill one window, or a size is not a positive integer.
        """
        return random_batch(
            self.tokens,
            step,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            seed=self.seed,
            microbatches=self.microbatches,
            process_index=self.process_index,
            process_count=self.process_count,
            counted=self.counted,
        )


def evaluation_batches(
    tokens: Int[np.ndarray, " N"],
    *,
    batch_size: int,
    sequence_length: int,
    counted: Bool[np.ndarray, " N"] | None = None,
) -> Iterator[Batch]:
    """Yields batches `[B, T]` in which every token but the first is a target exactly once.

    Args:
      tokens: `[N]` integers, N >= 2.
      batch_size: B; the last batch is filled up with rows that are not counted.
      sequence_length: T; no window remembers the window before it.
      counted: `[N]`, false for tokens that are no target; None counts all.

    Raises:
      ValueError: if there are fewer than two tokens, or a size is not a positive integer.
    """
    check_positive("batch_size", batch_size)
    check_positive("sequence_length", sequence_length)
    if len(tokens) < 2:
        raise ValueError(f"tokens must hold at least two, got {len(tokens)=}")
    area = batch_size * sequence_length
    missing = -(len(tokens) - 1) % area
    inputs = np.pad(np.asarray(tokens[:-1], np.int32), (0, missing))
    targets = np.asarray(tokens[1:], np.int32)
    if counted is not None:
        targets = np.where(counted[1:], targets, NOT_COUNTED)
    targets = np.pad(targets, (0, missing), constant_values=NOT_COUNTED)
    shape = (-1, batch_size, sequence_length)
    for some_inputs, some_targets in zip(
        inputs.reshape(shape), targets.reshape(shape), strict=True
    ):
        yield Batch(some_inputs, some_targets)


__all__ = [
    "NOT_COUNTED",
    "Batch",
    "BatchSource",
    "RandomWindows",
    "evaluation_batches",
    "next_token_batch",
    "process_rows",
    "random_batch",
    "window_starts",
]
