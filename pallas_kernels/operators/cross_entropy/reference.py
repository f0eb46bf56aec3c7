"""Cross entropy by its definition, with full logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import contract
from pallas_kernels.sharding import Layout

LAYOUT = Layout(inputs=("B T C", "C vocab", "B T"), results="B T", independent="B T")
SUM_LAYOUT = Layout(inputs=("B T C", "C vocab", "B T", "B T"), results="", independent="B T")


def token_of(logits: Float[Array, "*tokens vocab"]) -> Int[Array, "*tokens vocab"]:
    """Returns the token that each logit is for."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


class Losses(NamedTuple):
    """The losses of tokens, and what turns their logits into probabilities again.

    The logsumexp is kept in two parts: rounded as one number, it would hide the differences between
    huge logits.

    Attributes:
      losses: `[*tokens]`, nan for a target out of range.
      largest: `[*tokens]`, the largest logit; nan for a target out of range.
      log_total: `[*tokens]`, logarithm of the sum of `exp(logits - largest)`.
    """

    losses: jax.Array
    largest: jax.Array
    log_total: jax.Array


def losses_of(logits: Float[Array, "*tokens vocab"], targets: Int[Array, "*tokens"]) -> Losses:
    """Computes the losses of logits."""
    vocab = logits.shape[-1]
    # A masked sum rather than a gather, so that logits sharded over the vocabulary stay so.
    is_target = token_of(logits) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0).sum(-1)
    # A nan here makes the loss nan, and the gradient of every logit: without it the gradient of a
    # target out of range would be that of a token without a target.
    in_range = (targets >= 0) & (targets < vocab)
    largest = jnp.where(in_range, jax.lax.stop_gradient(logits.max(-1)), jnp.nan)
    log_total = jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    return Losses(log_total + (largest - target_logit), largest, log_total)


def cross_entropy_reference(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int | None,
) -> Float[Array, "B T"]:
    """Computes `pallas_kernels.cross_entropy`, which documents the arguments."""
    del chunk_size
    logits = contract("btc,cv->btv", hidden, weight)
    losses = losses_of(logits, targets).losses
    if l2wrap:
        first_largest = jnp.argmax(logits, axis=-1, keepdims=True)
        largest = jnp.take_along_axis(logits, first_largest, axis=-1)[..., 0]
        penalty = l2wrap / 2 * jnp.square(largest)
        losses += penalty - jax.lax.stop_gradient(penalty)
    return losses


def weighted_sum(
    token_weights: Float[Array, "B T"], losses: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the sum of losses times weights; a loss of weight 0 may be nan."""
    return jnp.where(token_weights == 0, 0, token_weights * losses).sum()


def cross_entropy_sum_reference(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    l2wrap: float,
    chunk_size: int | None,
) -> Float[Array, ""]:
    """Computes `pallas_kernels.cross_entropy_sum`, which documents the arguments."""
    losses = cross_entropy_reference(hidden, weight, targets, l2wrap, chunk_size)
    return weighted_sum(token_weights, losses)


__all__ = [
    "LAYOUT",
    "SUM_LAYOUT",
    "Losses",
    "cross_entropy_reference",
    "cross_entropy_sum_reference",
    "losses_of",
    "token_of",
    "weighted_sum",
]
