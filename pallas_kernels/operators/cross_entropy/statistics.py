"""The statistics that turn the logits of tokens into losses, and into gradients of the logits."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.operators.cross_entropy.chunks import in_chunks
from pallas_kernels.operators.cross_entropy.reference import token_of
from pallas_kernels.precision import contract


class Statistics(NamedTuple):
    """Statistics of the logits of some tokens, each `[B, T]`.

    Attributes:
      largest: the largest logit.
      log_total: logarithm of the sum of `exp(logits - largest)`.
      first: position of the largest logit in the vocabulary, int32; the first of equals. None where
        only losses are wanted.
      of_target: logit of the target; 0 if it is out of range.
    """

    largest: Any
    log_total: Any
    first: Any
    of_target: Any

    def losses(self) -> Float[Array, "B T"]:
        """Returns the losses. Differences first: sums of huge logits would round."""
        return self.log_total + (self.largest - self.of_target)


class Logits(NamedTuple):
    """Logits of some tokens, as differences to one number for each tile of the vocabulary.

    Attributes:
      differences: `[B, T, vocab]`, in the dtype of sums or a shorter one.
      bases: `[B, T, tiles]`, in the dtype of sums; what to add to the differences in each tile.
    """

    differences: jax.Array
    bases: jax.Array

    def less(self, numbers: Float[Array, "B T"]) -> Float[Array, "B T vocab"]:
        """Returns logits less a number for each token. Sums of huge logits would round."""
        size = self.differences.shape[-1] // self.bases.shape[-1]
        return self.differences + jnp.repeat(self.bases - numbers[..., None], size, axis=-1)


@dataclasses.dataclass(frozen=True)
class Finder:
    """How an implementation finds statistics of logits.

    Attributes:
      statistics: from hidden `[B, T, C]`, weight `[C, vocab]`, targets `[B, T]` and `chunk_size` to
        the `Statistics` for losses, without `first`. It keeps the logits of as many tokens at once
        as `chunk_size` allows, or none.
      logits: from hidden, weight and targets of a chunk of tokens to the logits, and their
        `Statistics`.
    """

    statistics: Callable[[jax.Array, jax.Array, jax.Array, int], Statistics]
    logits: Callable[[jax.Array, jax.Array, jax.Array], tuple[Logits, Statistics]]


def find_after_product(
    statistics_of: Callable[[jax.Array, jax.Array], Statistics],
) -> Finder:
    """Makes a finder of a function that passes over logits, which XLA computes.

    Args:
      statistics_of: from logits `[B, L, vocab]` and targets `[B, L]`.
    """

    def logits_of(
        hidden: jax.Array, weight: jax.Array, targets: jax.Array
    ) -> tuple[Logits, Statistics]:
        logits = contract("blc,cv->blv", hidden, weight)
        in_one_tile = Logits(logits, jnp.zeros_like(logits[..., :1]))
        return in_one_tile, statistics_of(logits, targets)

    def statistics(
        hidden: jax.Array, weight: jax.Array, targets: jax.Array, chunk_size: int
    ) -> Statistics:
        def of_chunk(hidden: jax.Array, targets: jax.Array) -> Statistics:
            return logits_of(hidden, weight, targets)[1]._replace(first=None)

        return in_chunks(of_chunk, chunk_size, hidden, targets)

    return Finder(statistics, logits_of)


def statistics_xla(logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"]) -> Statistics:
    """Returns the statistics of logits."""
    largest = logits.max(-1)
    log_total = jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    # A masked sum rather than a gather, so that logits sharded over the vocabulary stay so.
    of_target = jnp.where(token_of(logits) == targets[..., None], logits, 0).sum(-1)
    return Statistics(largest, log_total, jnp.argmax(logits, axis=-1), of_target)


FINDER_XLA = find_after_product(statistics_xla)


def nan_out_of_range(statistics: Statistics, targets: Int[Array, "B T"], vocab: int) -> Statistics:
    """Returns statistics whose losses, and gradients, are nan for targets out of range."""
    in_range = (targets >= 0) & (targets < vocab)
    return statistics._replace(largest=jnp.where(in_range, statistics.largest, jnp.nan))


def gradients_of_logits(
    logits: Logits, targets: Int[Array, "B T"], statistics: Statistics, l2wrap: float
) -> Float[Array, "B T vocab"]:
    """Returns the gradients of the losses, for logits."""
    less_largest = logits.less(statistics.largest)
    token = token_of(less_largest)
    largest, log_total, first, targets = (
        x[..., None] for x in (statistics.largest, statistics.log_total, statistics.first, targets)
    )
    # One after the other: rounded as one number, they would hide differences of huge logits.
    dlogits = jnp.exp(less_largest - log_total) - (token == targets)
    if l2wrap:
        dlogits += jnp.where(token == first, l2wrap * largest, 0)
    return dlogits


__all__ = [
    "FINDER_XLA",
    "Finder",
    "Logits",
    "Statistics",
    "find_after_product",
    "gradients_of_logits",
    "nan_out_of_range",
    "statistics_xla",
]
