"""The layer norm, token shift and mixes by their definitions, with nothing rounded between them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.operators.layer_norm.reference import layer_norm_reference
from pallas_kernels.operators.token_shift.reference import (
    last_position,
    mask_padding,
    take_tokens,
    token_shift_mix_reference,
)
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.sharding import Layout
from pallas_kernels.types import SegmentIds

INPUTS = ("B T C", "C", "C", "M C", "B C", "B T")
KERNEL_LAYOUT = Layout(inputs=INPUTS, results=("B T C", "B C"), independent="B")
"""Of the forward kernel, which need not hand its argument on."""

LAYOUT = Layout(inputs=INPUTS, results=("B T C", "B C", "B T C"), independent="B")

type Mixed = tuple[Float[Array, "B T C"], ...]
type Results = tuple[Mixed, Float[Array, "B C"], Float[Array, "B T C"]]


def norm_shift_mix_reference(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    eps: float,
) -> Results:
    """Computes `pallas_kernels.norm_shift_mix`, which documents the arguments."""
    dtype = accumulation_dtype(x, scale, bias, mixes)
    tokens = mask_padding(x, segment_ids).astype(dtype)
    normed = layer_norm_reference(tokens, scale, bias, eps=eps)
    before = None if state is None else state.astype(dtype)
    mixed, new_state = token_shift_mix_reference(normed, mixes, before, segment_ids)
    return tuple(mix.astype(x.dtype) for mix in mixed), new_state.astype(x.dtype), x


def last_token(x: Float[Array, "B T C"], segment_ids: SegmentIds | None) -> Float[Array, "B C"]:
    """Returns each row's last token that is not padding; zeros if all are."""
    if segment_ids is None:
        return x[:, -1]
    return take_tokens(x, last_position(segment_ids)[:, None])[:, 0]


def norm_of_token(
    token: Float[Array, "B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], eps: float
) -> Float[Array, "B C"]:
    """Returns the layer norm of one token of each row."""
    return layer_norm_reference(token[:, None], scale, bias, eps=eps)[:, 0]


def state_after(
    normed: Float[Array, "B C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> Float[Array, "B C"]:
    """Returns the new state.

    Args:
      normed: the norm of each row's last token.
      state: the state before, or None for zeros.
      segment_ids: rows of padding keep the state.
    """
    if segment_ids is None:
        return normed
    before = jnp.zeros_like(normed) if state is None else state
    return jnp.where((segment_ids != 0).any(1, keepdims=True), normed, before)


__all__ = [
    "KERNEL_LAYOUT",
    "LAYOUT",
    "Mixed",
    "Results",
    "last_token",
    "norm_of_token",
    "norm_shift_mix_reference",
    "state_after",
]
