"""The training loss: cross entropy of the next token, with the official pull on large logits."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from goose_jax.data import Batch
from goose_jax.nn import RWKV7
from goose_jax.parallel.in_model import gather_parameters, tokens_of_device
from goose_jax.state import RWKV7State
from pallas_kernels import cross_entropy, cross_entropy_sum
from pallas_kernels.types import Scalar

L2WRAP = 1e-4
"""The official factor of the pull on each token's largest logit."""


def token_losses(
    model: RWKV7, batch: Batch, *, l2wrap: float = L2WRAP, state: RWKV7State | None = None
) -> Float[Array, "B T"]:
    """Returns the cross entropy of each target, in nats; 0 where a target is below 0.

    A target or an input that is not below the size of the vocabulary is an error where its value is
    known. In a compiled program it makes the loss and the gradient NaN.

    The logits of all tokens are never in memory at once. For each counted target, `l2wrap` times
    the token's largest logit is added to the gradient of that logit. The value of the loss does not
    change. Source: `L2Wrap` in the training code of RWKV-LM.

    Args:
      model: the model; it computes in the compute dtype of its config.
      batch: a batch without the axis of microbatches.
      l2wrap: factor of the pull on large logits; 0 turns it off.
      state: the state that each row begins with; None for the start of a text.

    Returns:
      `[B, T]` float32. On a mesh whose axis "tensor" has n devices, each has `[B, T / n]` of them.
    """
    hidden, head, targets, counted = _operands(model, batch, state)
    losses = cross_entropy(hidden, head, targets, l2wrap=l2wrap)
    return jnp.where(counted, losses, 0.0)


def _operands(
    model: RWKV7, batch: Batch, state: RWKV7State | None
) -> tuple[Float[Array, "B T C"], Float[Array, "C vocab"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns hidden, head and targets for the cross entropy, and which targets are counted."""
    ids = batch.segment_ids
    ids = None if ids is None else jnp.asarray(ids)
    hidden, _ = model.hidden(jnp.asarray(batch.inputs), state, ids)
    hidden, targets = tokens_of_device((hidden, jnp.asarray(batch.targets)))
    counted = targets >= 0
    head = gather_parameters(
        model.head[...], hidden.dtype, within="head", over=("fsdp", "tensor")
    ).astype(hidden.dtype)
    return hidden, head, jnp.where(counted, targets, 0), counted


def sum_of_losses(
    model: RWKV7, batch: Batch, *, l2wrap: float = L2WRAP, state: RWKV7State | None = None
) -> Scalar:
    """Returns the sum of `token_losses`, which takes the same arguments; float32.

    For training: its gradient needs three matrix products with the head, that of `token_losses`
    four.
    """
    hidden, head, targets, counted = _operands(model, batch, state)
    return cross_entropy_sum(hidden, head, targets, counted.astype(jnp.float32), l2wrap=l2wrap)


def mean_loss(model: RWKV7, batch: Batch, *, l2wrap: float = L2WRAP) -> Scalar:
    """Returns the mean of `token_losses` over the counted targets; 0 if there is none."""
    return sum_of_losses(model, batch, l2wrap=l2wrap) / jnp.maximum(num_targets(batch), 1)


def num_targets(batch: Batch) -> Scalar:
    """Returns the number of counted targets over all axes of a batch; int32."""
    return jnp.sum(batch.targets >= 0)


def num_tokens(batch: Batch) -> Scalar:
    """Returns the number of tokens that are read over all axes of a batch; int32."""
    if batch.segment_ids is None:
        return jnp.int32(batch.inputs.size)
    return jnp.sum(batch.segment_ids > 0)  # 0 is padding


__all__ = ["L2WRAP", "mean_loss", "num_targets", "num_tokens", "sum_of_losses", "token_losses"]
