"""The tasks: batches whose targets follow from their inputs, made anew for each step.

A task is called with a step, and returns the same batch for the same step each time. Batches of
different seeds share no random numbers: one seed is for training, another one for measuring.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from jaxtyping import Int

from goose_jax.data import NOT_COUNTED, Batch, next_token_batch

TRAINING, HELD_OUT = 0, 1  # the two seeds


@dataclasses.dataclass(frozen=True)
class DigitReversal:
    """Numbers, each with its digits in reverse: `1203,3021#57,75#...`, cut off at T + 1 tokens.

    The number of digits is uniform in 1..max_digits, and each number of so many digits is equally
    likely. The tokens are the digits, "," (10) and "#" (11). Every token is predicted.
    Source: `rwkv7_train_simplified.py` of RWKV-LM.

    Attributes:
      batch_size: B, number of rows.
      sequence_length: T, tokens of a row.
      max_digits: the largest number of digits.
      seed: another seed gives other batches.
    """

    batch_size: int = 256
    sequence_length: int = 128
    max_digits: int = 60
    seed: int = TRAINING

    vocab_size = 12
    COMMA, HASH = 10, 11

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        return next_token_batch(self.rows(step)[0])

    def rows(self, step: int) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, "B N"]]:
        """Returns the N = T + 1 tokens of each row, and which tokens repeat a digit.

        The second array holds the number of digits at each token that is a digit of a reversed
        number, and 0 elsewhere.
        """
        rng = np.random.default_rng((self.seed, step))
        B, N = self.batch_size, self.sequence_length + 1
        # Of the numbers, which have at least four tokens each, so many are enough.
        digits = rng.integers(1, self.max_digits + 1, (B, N // 4 + 1))
        ends = np.cumsum(2 * digits + 2, axis=1)
        place = np.arange(N)
        is_end = np.zeros((B, N + 1), int)
        np.put_along_axis(is_end, np.minimum(ends, N), 1, axis=1)
        number = np.cumsum(is_end[:, :N], axis=1)  # at each place, the index of its number
        length = np.take_along_axis(digits, number, 1)
        begin = np.take_along_axis(ends, number, 1) - 2 * length - 2
        offset = place - begin
        drawn = rng.integers(0, 10, (B, N))
        first = (offset == 0) & (length > 1)
        drawn = np.where(first, rng.integers(1, 10, (B, N)), drawn)  # no leading zero
        mirror = np.clip(begin + 2 * length - offset, 0, N - 1)
        tokens = np.where(offset < length, drawn, np.take_along_axis(drawn, mirror, 1))
        tokens = np.where(offset == length, self.COMMA, tokens)
        tokens = np.where(offset == 2 * length + 1, self.HASH, tokens)
        reversed_digit = (offset > length) & (offset <= 2 * length)
        return tokens.astype(np.int32), np.where(reversed_digit, length, 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PermutationProducts:
    """The word problem of the symmetric group: after each permutation, the product of all so far.

    The token of a permutation of `degree` elements is its place in lexicographic order. The
    permutations of a row are drawn with equal probability; the target after t of them is
    p_1 p_2 ... p_t, which maps i to p_1(p_2(...p_t(i))). With swaps alone the products are all
    permutations, too.
    Sources: "The Illusion of State in State-Space Models", https://arxiv.org/abs/2404.08819; for
    swaps "Unlocking State-Tracking in Linear RNNs", https://arxiv.org/abs/2411.12537.

    Attributes:
      batch_size: B, number of rows.
      sequence_length: T, permutations of a row.
      degree: number of elements; 5 for S5, with 120 permutations.
      factors: "all" draws any permutation, "swaps" those that swap two elements or none.
      seed: another seed gives other batches.
    """

    batch_size: int = 256
    sequence_length: int = 32
    degree: int = 5
    factors: Literal["all", "swaps"] = "all"
    seed: int = TRAINING

    @property
    def vocab_size(self) -> int:
        """The number of permutations."""
        return len(self.permutations)

    @property
    def permutations(self) -> Int[np.ndarray, "vocab degree"]:
        """The permutation of each token."""
        return np.array(list(itertools.permutations(range(self.degree))))

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        rng = np.random.default_rng((self.seed, step))
        permutations = self.permutations
        # The digits of a permutation, as a number in base `degree`, grow with its token.
        codes = permutations @ self.degree ** np.arange(self.degree)[::-1]
        moved = (permutations != np.arange(self.degree)).sum(axis=1)
        drawn = np.flatnonzero(moved <= (2 if self.factors == "swaps" else self.degree))
        inputs = rng.choice(drawn, (self.batch_size, self.sequence_length))
        targets = np.empty_like(inputs)
        product = np.tile(np.arange(self.degree), (self.batch_size, 1))
        for t in range(self.sequence_length):
            product = np.take_along_axis(product, permutations[inputs[:, t]], axis=1)
            code = product @ self.degree ** np.arange(self.degree)[::-1]
            targets[:, t] = np.searchsorted(codes, code)
        return Batch(inputs.astype(np.int32), targets.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall: pairs of a key and a value, then each key once, as a query.

    An example begins with its pairs. Later each key comes again at a random place; there, and only
    there, the value of its pair is the target. The places follow a power law, so that most queries
    come soon. All other places hold random tokens. Keys are 1..vocab_size / 2 - 1, values are from
    vocab_size / 2 on; neither repeats within an example. A row holds as many examples as it has
    room for, and each of them is a segment.
    Source: "Zoology", https://arxiv.org/abs/2312.04927, and `multiquery_ar.py` of its code, which
    also mixes short examples with long ones.

    Attributes:
      batch_size: B, number of rows.
      sequence_length: T, tokens of a row.
      examples: the kinds of examples, the easiest first: tokens, an even number that divides T,
        and pairs, at most a fourth of the tokens. Each step has one kind, which it draws.
      curriculum: number of steps in which the kinds join the draw, one after another. The first
        step has the first kind; from the step `curriculum` on, all kinds are drawn.
      vocab_size: number of tokens, more than `sequence_length`.
      power: exponent of the power law; 1 gives all places the same probability.
      seed: another seed gives other batches.

    Raises:
      ValueError: for an example of another size.
    """

    batch_size: int = 64
    sequence_length: int = 512
    examples: tuple[tuple[int, int], ...] = ((512, 64),)
    curriculum: int = 0
    vocab_size: int = 8192
    power: float = 0.01
    seed: int = TRAINING

    def __post_init__(self) -> None:
        for tokens, pairs in self.examples:
            if self.sequence_length % tokens or tokens % 2 or not 0 < 4 * pairs <= tokens:
                raise ValueError(
                    "examples must have an even number of tokens that divides sequence_length="
                    f"{self.sequence_length}, and at most a pair for 4 of them, got {tokens=}, "
                    f"{pairs=}"
                )

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        rng = np.random.default_rng((self.seed, step))
        kinds = len(self.examples)
        if step < self.curriculum:
            kinds = 1 + step * kinds // self.curriculum
        tokens, pairs = self.examples[rng.integers(kinds)]
        B, T = self.batch_size, self.sequence_length
        inputs, targets = self._draw(rng, B * T // tokens, tokens, pairs)
        segment_ids = np.broadcast_to(1 + np.arange(T, dtype=np.int32) // tokens, (B, T))
        return Batch(inputs.reshape(B, T), targets.reshape(B, T), segment_ids)

    def _draw(
        self, rng: np.random.Generator, count: int, tokens: int, pairs: int
    ) -> tuple[Int[np.ndarray, "count tokens"], Int[np.ndarray, "count tokens"]]:
        """Returns inputs and targets of examples of one kind."""
        half = self.vocab_size // 2
        keys = 1 + _distinct(rng, count, half - 1, pairs)
        values = half + _distinct(rng, count, self.vocab_size - half, pairs)
        inputs = rng.integers(0, self.vocab_size, (count, tokens))
        targets = np.full((count, tokens), NOT_COUNTED)
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        # Gumbel's trick: the largest of log p + noise are a weighted sample without repetition.
        places = (tokens - 2 * pairs) // 2
        log_probability = (self.power - 1) * np.log(np.arange(1, places + 1))
        order = np.argsort(-(log_probability + rng.gumbel(size=(count, places))), axis=1)
        queries = 2 * pairs + 2 * order[:, :pairs]
        np.put_along_axis(inputs, queries, keys, axis=1)
        np.put_along_axis(targets, queries, values, axis=1)
        return inputs.astype(np.int32), targets.astype(np.int32)


def _distinct(
    rng: np.random.Generator, rows: int, below: int, count: int
) -> Int[np.ndarray, "rows count"]:
    """Draws `count` different numbers below `below` for each row."""
    return np.argpartition(rng.random((rows, below)), count, axis=1)[:, :count]


@dataclasses.dataclass(frozen=True)
class Passkey:
    """A key of digits that is hidden in noise, and asked for at the end.

    A row is noise, the token `KEY`, the digits of the key, more noise, the token `QUERY`, and the
    digits again, which are the targets. The key is anywhere in the noise. Digits are 0..9; noise is
    drawn from other tokens.

    Attributes:
      batch_size: B, number of rows.
      sequence_length: T, tokens of a row.
      digits: number of digits of the key.
      noise: number of different tokens of the noise.
      seed: another seed gives other batches.
    """

    batch_size: int = 64
    sequence_length: int = 256
    digits: int = 5
    noise: int = 20
    seed: int = TRAINING

    KEY, QUERY = 10, 11

    @property
    def vocab_size(self) -> int:
        """The number of digits, marks and tokens of noise."""
        return 12 + self.noise

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        rng = np.random.default_rng((self.seed, step))
        B, N, D = self.batch_size, self.sequence_length + 1, self.digits
        tokens = rng.integers(12, self.vocab_size, (B, N))
        key = rng.integers(0, 10, (B, D))
        begin = rng.integers(0, N - 2 * (D + 1) + 1, (B, 1))
        np.put_along_axis(tokens, begin, self.KEY, axis=1)
        np.put_along_axis(tokens, begin + 1 + np.arange(D), key, axis=1)
        tokens[:, -D - 1] = self.QUERY
        tokens[:, -D:] = key
        batch = next_token_batch(tokens)
        counted = np.arange(N - 1) >= N - 1 - D
        return dataclasses.replace(batch, targets=np.where(counted, batch.targets, NOT_COUNTED))
