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


class Gradients(NamedTuple):
    """Gradients of losses for logits: `dlogits * factors[..., None]`.

    Attributes:
      dlogits: `[B, T, vocab]`, in the dtype of the head's weight.
      factors: `[B, T]`, in the dtype of sums.
    """

    dlogits: Any
    factors: Any


type FindGradients = Callable[[Statistics, float, jax.Array | None], Gradients]
"""From the statistics of tokens, `l2wrap`, and which tokens count `[B, T]`, to the gradients.

Gradients of tokens that do not count are zero, also where logits are nan. None counts all tokens.
The gradients are computed from stored logits, or from what is stored instead of them.
"""


@dataclasses.dataclass(frozen=True)
class Finder:
    """How an implementation finds statistics of logits.

    Attributes:
      statistics: from hidden `[B, T, C]`, weight `[C, vocab]`, targets `[B, T]` and `chunk_size` to
        the `Statistics` for losses, without `first`. It keeps the logits of as many tokens at once
        as `chunk_size` allows, or none.
      gradients: from hidden, weight and targets of a chunk of tokens to what finds their gradients,
        and their `Statistics`.
    """

    statistics: Callable[[jax.Array, jax.Array, jax.Array, int], Statistics]
    gradients: Callable[[jax.Array, jax.Array, jax.Array], tuple[FindGradients, Statistics]]


def find_after_product(
    statistics_of: Callable[[jax.Array, jax.Array], Statistics],
) -> Finder:
    """Makes a finder of a function that passes over logits, which XLA computes.

    Args:
      statistics_of: from logits `[B, L, vocab]` and targets `[B, L]`.
    """

    def logits_of(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        return contract("blc,cv->blv", hidden, weight)

    def gradients(
        hidden: jax.Array, weight: jax.Array, targets: jax.Array
    ) -> tuple[FindGradients, Statistics]:
        logits = logits_of(hidden, weight)

        def find(statistics: Statistics, l2wrap: float, counts: jax.Array | None) -> Gradients:
            dlogits = gradients_of_logits(logits, targets, statistics, l2wrap)
            if counts is not None:
                dlogits = jnp.where(counts[..., None], dlogits, 0)
            factors = jnp.ones_like(dlogits, shape=targets.shape)
            return Gradients(dlogits.astype(weight.dtype), factors)

        return find, statistics_of(logits, targets)

    def statistics(
        hidden: jax.Array, weight: jax.Array, targets: jax.Array, chunk_size: int
    ) -> Statistics:
        def of_chunk(hidden: jax.Array, targets: jax.Array) -> Statistics:
            return statistics_of(logits_of(hidden, weight), targets)._replace(first=None)

        return in_chunks(of_chunk, chunk_size, hidden, targets)

    return Finder(statistics, gradients)


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
    logits: Float[Array, "B T vocab"],
    targets: Int[Array, "B T"],
    statistics: Statistics,
    l2wrap: float,
) -> Float[Array, "B T vocab"]:
    """Returns the gradients of the losses, for logits."""
    # One after the other: rounded as one number, they would hide differences of huge logits.
    dlogits = jnp.exp((logits - statistics.largest[..., None]) - statistics.log_total[..., None])
    token = token_of(dlogits)
    # Without the barrier XLA would look for it among those of all chunks, for each logit again.
    target = jax.lax.optimization_barrier(targets)[..., None]
    dlogits -= token == target
    if l2wrap:
        pull = l2wrap * statistics.largest[..., None]
        dlogits += jnp.where(token == statistics.first[..., None], pull, 0)
    return dlogits


__all__ = [
    "FINDER_XLA",
    "FindGradients",
    "Finder",
    "Gradients",
    "Statistics",
    "find_after_product",
    "gradients_of_logits",
    "nan_out_of_range",
    "statistics_xla",
]
