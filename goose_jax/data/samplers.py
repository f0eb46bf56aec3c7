"""Batches from tokens on disk: windows at random, in the official order, or packed documents.

Each is a `BatchSource`: a pure function of its settings and the step. Only the rows of a batch are
in memory.
"""

import abc
import dataclasses
import math
from typing import Self

import numpy as np
from jaxtyping import Int

from goose_jax.data.batches import NOT_COUNTED, Batch, process_rows, window_starts
from goose_jax.data.binidx import Binidx
from pallas_kernels.validation import check_positive

type Places = Int[np.ndarray, "... B"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BinidxBatches(abc.ABC):
    """A `BatchSource` whose tokens are in a `Binidx`. Subclasses say where rows begin.

    Attributes:
      data: the tokens.
      vocab_size: number of ids of the model; a batch with another id is an error.
      batch_size: B, rows of each microbatch, of all processes.
      sequence_length: T, tokens of a row.
      microbatches: A; 1 gives batches without the leading axis.
      process_index: which process reads, from 0. It gets its share of the B rows.
      process_count: number of processes; it divides B.
      num_tokens: number of tokens that are read, from the first; None reads all.
      source: what messages call the tokens; by default their path.
    """

    data: Binidx
    vocab_size: int
    batch_size: int
    sequence_length: int
    microbatches: int = 1
    process_index: int = 0
    process_count: int = 1
    num_tokens: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            object.__setattr__(self, "source", str(self.data.prefix))
        for name in ("vocab_size", "batch_size", "sequence_length", "microbatches"):
            check_positive(name, getattr(self, name))
        process_rows(self.batch_size, self.process_index, self.process_count)
        if self._total <= self.sequence_length:
            raise ValueError(
                f"{self.source} is too short: {self._total} tokens to train on, "
                f"but sequence_length={self.sequence_length}"
            )

    @property
    def checksum(self) -> str:
        """The checksum of the tokens."""
        if self._total == len(self.data.tokens):
            return self.data.checksum
        return f"{self.data.checksum}, the first {self._total} tokens"

    @property
    def _total(self) -> int:
        total = len(self.data.tokens)
        return total if self.num_tokens is None else min(self.num_tokens, total)

    def for_process(self, index: int, count: int) -> Self:
        """Returns the same data for one of several processes, as `BatchSource` says."""
        return dataclasses.replace(self, process_index=index, process_count=count)

    @abc.abstractmethod
    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0: the rows of this process.

        Raises:
          ValueError: if a token is not below `vocab_size`. The message names it and its place.
        """

    @property
    def _shape(self) -> tuple[int, ...]:
        return (
            (self.batch_size,) if self.microbatches == 1 else (self.microbatches, self.batch_size)
        )

    def _row_numbers(self, step: int) -> Places:
        """Returns the numbers of the rows of this process among the rows of all steps."""
        size = self.microbatches * self.batch_size
        numbers = np.arange(step * size, (step + 1) * size).reshape(self._shape)
        return numbers[..., process_rows(self.batch_size, self.process_index, self.process_count)]

    def _windows(self, starts: Places) -> Batch:
        """Returns the batch of the windows that begin at these tokens."""
        places = starts[..., None] + np.arange(self.sequence_length + 1)
        tokens = self._tokens_at(places)
        targets = tokens[..., 1:]
        if self.data.counted is not None:
            targets = np.where(self.data.counted[places[..., 1:]], targets, NOT_COUNTED)
        return Batch(tokens[..., :-1], targets)

    def _tokens_at(self, places: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        self.data.check_size()
        found = self.data.tokens[places]
        wrong = (found < 0) | (found >= self.vocab_size)
        if wrong.any():
            first = np.argmax(wrong)
            raise ValueError(
                f"{self.data.prefix}.bin: token number {places.flat[first]} is "
                f"{found.flat[first]}, not below the vocabulary's size of {self.vocab_size}"
            )
        return found.astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RandomBinidxWindows(BinidxBatches):
    """Windows drawn at random, as `random_batch` draws them. They may span several documents.

    Attributes:
      seed: another seed gives other windows.
    """

    seed: int

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0: the rows of this process.

        Raises:
          ValueError: if a token is not below `vocab_size`. The message names it and its place.
        """
        count = self._total - self.sequence_length
        starts = window_starts(count, self._shape, step, seed=self.seed)
        rows = process_rows(self.batch_size, self.process_index, self.process_count)
        return self._windows(starts[..., rows])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MagicPrimeWindows(BinidxBatches):
    """The windows of the official training code, in its order.

    The text is divided into slots of T tokens. The row number n of the training, counted from 1,
    begins at slot `(f n^3) mod p`, where p is a prime of the form 3 k + 2 a little below the number
    of slots, and f is about 0.618 p. So any p consecutive rows are p different slots. A window is
    one token longer than its slot, and may span several documents.

    Rows follow each other over microbatches and steps, so that a run sees, at each step, the rows
    of an official run with the same number of rows per step. Source: `dataset.py` in
    `RWKV-v7/train_temp` of https://github.com/BlinkDL/RWKV-LM.

    Attributes:
      magic_prime: p; None takes the largest one that `make_data.py` of RWKV-LM would name.
    """

    magic_prime: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        num_tokens, prime = self._total, self.magic_prime
        default = magic_prime(num_tokens, self.sequence_length)
        if prime is None:
            object.__setattr__(self, "magic_prime", default)
        elif not _may_be_magic(prime, num_tokens):
            raise ValueError(f"magic_prime must be a prime of the form 3 k + 2, got {prime}")
        elif prime != default:
            slots = num_tokens // self.sequence_length
            if prime <= 0.9 * slots or prime * self.sequence_length >= num_tokens:
                raise ValueError(
                    f"magic_prime must be above 0.9 of the {slots} slots of {self.sequence_length} "
                    f"tokens in {self.source}, and leave a token after its last slot; got {prime}"
                )

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0: the rows of this process.

        Raises:
          ValueError: if a token is not below `vocab_size`. The message names it and its place.
        """
        assert self.magic_prime is not None
        factor = int(self.magic_prime * ((math.sqrt(5) - 1) / 2))
        numbers = self._row_numbers(step)
        slots = [factor * (1 + n) ** 3 % self.magic_prime for n in numbers.ravel().tolist()]
        return self._windows(np.array(slots).reshape(numbers.shape) * self.sequence_length)


def magic_prime(num_tokens: int, sequence_length: int) -> int:
    """Returns the prime that `make_data.py` of RWKV-LM names for a text.

    Raises:
      ValueError: if the text has fewer than three slots of `sequence_length` tokens.
    """
    for number in range(num_tokens // sequence_length - 1, 1, -1):
        if number % 3 == 2 and _is_prime(number):
            return number
    raise ValueError(
        f"{num_tokens} tokens are too few for the magic prime of {sequence_length=}: "
        f"at least {3 * sequence_length} are needed"
    )


def _may_be_magic(prime: int, num_tokens: int) -> bool:
    """Returns whether a number has the form of a magic prime; a prime, if the tokens reach it."""
    if not isinstance(prime, int) or prime % 3 != 2:
        return False
    return prime >= num_tokens or _is_prime(prime)  # of a large one the range is checked


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PackedDocuments(BinidxBatches):
    """Documents side by side in full rows, each a segment of its own: no token sees another text.

    The documents of the text are divided, one after another, into rows of T tokens. A document
    that does not fit goes on in another row, as a segment without memory of its beginning; at the
    beginning of each epoch all borders of rows move, so that documents are cut elsewhere. In each
    epoch the rows have another order. There is no padding, and each token is a target once in an
    epoch (fewer than T tokens twice, in the last row).

    `start_token` is read before the first token of each document and predicts it. The last token of
    a document is a target, but not an input. Without a start token the first token of a document
    is no target, and its last token is an input without a target.

    Attributes:
      seed: another seed gives another order.
      start_token: the tokenizer's `end_of_document`.
    """

    seed: int
    start_token: int | None

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0: the rows of this process.

        Raises:
          ValueError: if a token is not below `vocab_size`. The message names it and its place.
        """
        numbers = self._row_numbers(step)
        rows = [self._row(number) for number in numbers.ravel().tolist()]
        shape = (*numbers.shape, self.sequence_length)
        inputs, targets, ids = (np.stack(parts).reshape(shape) for parts in zip(*rows, strict=True))
        return Batch(inputs, targets, ids)

    @property
    def rows_per_epoch(self) -> int:
        """The number of rows that hold all tokens once."""
        return -(-self._total // self.sequence_length)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from grain.experimental import index_shuffle  # takes a second to import

        epoch, number = divmod(number, self.rows_per_epoch)
        shift, seed = np.random.default_rng((self.seed, epoch)).integers(0, 2**31, 2).tolist()
        row = index_shuffle(number, max_index=self.rows_per_epoch - 1, seed=seed, rounds=4)
        total = self._total
        first = (shift % self.sequence_length + row * self.sequence_length) % total
        places = (first + np.arange(self.sequence_length)) % total

        begins = np.isin(places, self._begins(first))
        tokens = self._tokens_at(places)
        ids = np.cumsum(begins).astype(np.int32) + (0 if begins[0] else 1)
        if self.start_token is None:
            inputs, following = tokens, (places + 1) % total
            ends = np.isin(following, self._begins(int(following[0])))
            targets = np.where(ends, NOT_COUNTED, self._tokens_at(following))
        else:
            inputs = np.where(begins, self.start_token, self._tokens_at((places - 1) % total))
            targets, following = tokens, places
        if self.data.counted is not None:
            targets = np.where(self.data.counted[following], targets, NOT_COUNTED)
        return inputs.astype(np.int32), targets.astype(np.int32), ids

    def _begins(self, first: int) -> list[int]:
        """Returns the places at which items begin, from `first` to at least a row's end."""
        end, total = first + self.sequence_length, self._total
        begins = self.data.begins(first, min(end, total))
        return begins + (self.data.begins(0, end - total) if end > total else [])


__all__ = [
    "BinidxBatches",
    "MagicPrimeWindows",
    "PackedDocuments",
    "RandomBinidxWindows",
    "magic_prime",
]
