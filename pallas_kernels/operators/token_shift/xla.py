"""Token shift with a backward that keeps only the inputs and gathers where autodiff scatters."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulation_dtype, per_token
from pallas_kernels.operators.token_shift.reference import (
    last_position,
    mask_padding,
    shift,
    take_tokens,
    token_shift_mix_reference,
)
from pallas_kernels.packing import find_segments
from pallas_kernels.types import FloatArray, SegmentIds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      x: `[B, T, C]`; shifted again for the gradient of the mixes.
      mixes: `[M, C]`; they weight the gradients of `x` and of the shifted `x`.
      state: `[B, C]` or None; part of the shifted `x`.
      segment_ids: `[B, T]` or None; say which tokens are neighbours.
    """

    x: FloatArray
    mixes: FloatArray
    state: FloatArray | None
    segment_ids: SegmentIds | None


def following_position(segment_ids: SegmentIds) -> jax.Array:
    """Position `[B, T]` of the token after each one in the same segment, or -1."""
    # Segments read backwards are segments too, where "before" means "after".
    mirrored = find_segments(segment_ids[:, ::-1]).previous[:, ::-1]
    return jnp.where(mirrored < 0, -1, segment_ids.shape[1] - 1 - mirrored)


def shift_transpose(
    dshifted: FloatArray, dnew_state: FloatArray, segment_ids: SegmentIds | None
) -> tuple[FloatArray, FloatArray]:
    """The gradients of the two arrays `x` and `state` that `shift` took."""
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
    residuals: Residuals, cotangents: tuple[Sequence[FloatArray], FloatArray]
) -> tuple[FloatArray, FloatArray, FloatArray | None, None]:
    """The gradients of x, mixes, state; none of segment_ids."""
    dmixed, dnew_state = cotangents
    mixes, state, segment_ids = residuals.mixes, residuals.state, residuals.segment_ids
    dtype = accumulation_dtype(residuals.x, mixes)
    x = mask_padding(residuals.x, segment_ids)
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


def _forward(
    x: FloatArray,
    mixes: FloatArray,
    state: FloatArray | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[tuple[FloatArray, ...], FloatArray], Residuals]:
    results = token_shift_mix_reference(x, mixes, state, segment_ids)
    return results, Residuals(x, mixes, state, segment_ids)


token_shift_mix_xla = jax.custom_vjp(token_shift_mix_reference)
token_shift_mix_xla.defvjp(_forward, token_shift_mix_backward)
