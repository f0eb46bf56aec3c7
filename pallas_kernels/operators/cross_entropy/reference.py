"""Cross entropy by its definition, with full logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import contract


def token_of(logits: Float[Array, "*tokens vocab"]) -> Int[Array, "*tokens vocab"]:
    """Returns the token that each logit is for."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def losses_of(
    logits: Float[Array, "*tokens vocab"], targets: Int[Array, "*tokens"]
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """Returns the losses and the logsumexp of logits; nan for a target out of range."""
    vocab = logits.shape[-1]
    # A masked sum rather than a gather, so that logits sharded over the vocabulary stay so.
    is_target = token_of(logits) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0).sum(-1)
    target_logit = jnp.where((targets >= 0) & (targets < vocab), target_logit, jnp.nan)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    return logsumexp - target_logit, logsumexp


def cross_entropy_reference(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    l2wrap: float,
    chunk_size: int,
) -> Float[Array, "B T"]:
    """Computes `pallas_kernels.cross_entropy`, which documents the arguments."""
    del chunk_size
    logits = contract("btc,cv->btv", hidden, weight)
    losses, _ = losses_of(logits, targets)
    if l2wrap:
        first_largest = jnp.argmax(logits, axis=-1, keepdims=True)
        largest = jnp.take_along_axis(logits, first_largest, axis=-1)[..., 0]
        penalty = l2wrap / 2 * jnp.square(largest)
        losses += penalty - jax.lax.stop_gradient(penalty)
    return losses


__all__ = ["cross_entropy_reference", "losses_of", "token_of"]
