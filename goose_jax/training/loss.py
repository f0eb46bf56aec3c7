"""The training loss: cross entropy of the next token, with the official pull on large logits."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from goose_jax.data import NOT_COUNTED, Batch
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State
from pallas_kernels import cross_entropy
from pallas_kernels.types import Scalar

L2WRAP = 1e-4
"""The official factor of the pull on each row's largest logit."""


def token_losses(
    model: RWKV7, batch: Batch, *, l2wrap: float = L2WRAP, state: RWKV7State | None = None
) -> Float[Array, "B T"]:
    """The cross entropy of each target, in nats; 0 where the target is not counted.

    Full logits never exist. To the gradient of each counted loss, `l2wrap` times the row's largest
    logit is added at that logit; the value of the loss does not show it.

    Args:
      model: its config gives the compute dtype.
      batch: without the axis of microbatches.
      l2wrap: 0 turns the pull off.
      state: that rows begin with; None is the start of a text.

    Returns:
      `[B, T]` float32.
    """
    ids = batch.segment_ids
    ids = None if ids is None else jnp.asarray(ids)
    hidden, _ = model.hidden(jnp.asarray(batch.inputs), state, ids)
    counted = batch.targets != NOT_COUNTED
    head = model.head[...].astype(hidden.dtype)
    losses = cross_entropy(hidden, head, jnp.where(counted, batch.targets, 0), l2wrap=l2wrap)
    return jnp.where(counted, losses, 0.0)


def mean_loss(model: RWKV7, batch: Batch, *, l2wrap: float = L2WRAP) -> Scalar:
    """The mean of `token_losses` over the counted targets; 0 if there is none."""
    losses = token_losses(model, batch, l2wrap=l2wrap)
    return jnp.sum(losses) / jnp.maximum(num_targets(batch), 1)


def num_targets(batch: Batch) -> Scalar:
    """How many targets of a batch count, over all its axes; int32."""
    return jnp.sum(batch.targets != NOT_COUNTED)


__all__ = ["L2WRAP", "mean_loss", "num_targets", "token_losses"]
