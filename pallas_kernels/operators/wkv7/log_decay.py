"""The log decay of RWKV-7, and its bound."""

import math

import jax

MIN_LOG_DECAY = -math.exp(-0.5)
"""No log decay of RWKV-7 is below this number, about -0.607."""


def log_decay_from_logits(logits: jax.Array) -> jax.Array:
    """Returns `MIN_LOG_DECAY * sigmoid(logits)`, as in the official RWKV-7; kernels use it too."""
    return MIN_LOG_DECAY * jax.nn.sigmoid(logits)


__all__ = ["MIN_LOG_DECAY", "log_decay_from_logits"]
