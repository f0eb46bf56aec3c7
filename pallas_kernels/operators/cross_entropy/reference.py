"""Cross entropy by its definition, with full logits."""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import contract
from pallas_kernels.types import FloatArray


def token_of(logits: FloatArray) -> jax.Array:
    """The token that each of the logits `[..., vocab]` is for."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def losses_of(logits: FloatArray, targets: jax.Array) -> tuple[FloatArray, FloatArray]:
    """The losses `[...]` of logits `[..., vocab]`, and their logsumexp."""
    vocab = logits.shape[-1]
    # A masked sum rather than a gather, so that logits sharded over the vocabulary stay so.
    is_target = token_of(logits) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0).sum(-1)
    target_logit = jnp.where((targets >= 0) & (targets < vocab), target_logit, jnp.nan)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    return logsumexp - target_logit, logsumexp


def cross_entropy_reference(
    hidden: FloatArray, weight: FloatArray, targets: jax.Array, l2wrap: float, chunk_size: int
) -> FloatArray:
    """The operator of `pallas_kernels.cross_entropy`, which documents the arguments."""
    del chunk_size
    logits = contract("btc,cv->btv", hidden, weight)
    losses, _ = losses_of(logits, targets)
    if l2wrap:
        first_largest = jnp.argmax(logits, axis=-1, keepdims=True)
        largest = jnp.take_along_axis(logits, first_largest, axis=-1)[..., 0]
        penalty = l2wrap / 2 * jnp.square(largest)
        losses += penalty - jax.lax.stop_gradient(penalty)
    return losses
