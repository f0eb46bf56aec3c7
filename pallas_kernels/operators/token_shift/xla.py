"""The gradients of the token shift, from its inputs; gathers where JAX would scatter."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.operators.token_shift.reference import (
    last_position,
    mask_padding,
    shift,
    take_tokens,
)
from pallas_kernels.packing import find_segments
from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.types import SegmentIds


def following_position(segment_ids: SegmentIds) -> Int[Array, "B T"]:
    """Returns the position of the token after each one in the same segment, or -1."""
    # Segments read backwards are segments too, where "before" means "after".
    mirrored = find_segments(segment_ids[:, ::-1]).previous[:, ::-1]
    return jnp.where(mirrored < 0, -1, segment_ids.shape[1] - 1 - mirrored)


def shift_transpose(
    dshifted: Float[Array, "B T C"],
    dnew_state: Float[Array, "B C"],
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"]]:
    """Returns the gradients of the `x` and `state` of `shift`."""
    if segment_ids is None:
        return jnp.concatenate([dshifted[:, 1:], dnew_state[:, None]], axis=1), dshifted[:, 0]
    valid = segment_ids != 0
    empty = ~valid.any(axis=1, keepdims=True)  # [B, 1], rows of padding hand the state through
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    is_last = position == last_position(segment_ids)[:, None]
    dx = take_tokens(dshifted, following_position(segment_ids))
    dx += jnp.where(is_last[..., None], dnew_state[:, None], 0)
    first = jnp.argmax(valid, axis=1)[:, None]
    return dx, jnp.where(empty, dnew_state, take_tokens(dshifted, first)[:, 0])


def token_shift_mix_backward(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    cotangents: tuple[Sequence[Float[Array, "B T C"]], Float[Array, "B C"]],
) -> tuple[Float[Array, "B T C"], Float[Array, "M C"], Float[Array, "B C"] | None, None]:
    """Returns the gradients of x, mixes and state, and None for the segment ids."""
    dmixed, dnew_state = cotangents
    dtype = accumulation_dtype(x, mixes)
    x = mask_padding(x, segment_ids)
    shifted, _ = shift(x, state, segment_ids)
    difference = shifted.astype(dtype) - x.astype(dtype)  # [B, T, C]
    gradients = [gradient.astype(dtype) for gradient in dmixed]
    dmixes = jnp.stack([(gradient * difference).sum((0, 1)) for gradient in gradients])
    dshifted = jnp.zeros_like(difference)
    for gradient, mix in zip(gradients, mixes, strict=True):
        dshifted += gradient * per_token(mix, dtype)
    dx, dstate = shift_transpose(dshifted, dnew_state.astype(dtype), segment_ids)
    dx = mask_padding(dx + (sum(gradients) - dshifted), segment_ids)
    return (
        dx.astype(x.dtype),
        dmixes.astype(mixes.dtype),
        None if state is None else dstate.astype(state.dtype),
        None,
    )


__all__ = ["token_shift_mix_backward"]
