"""Token shift by its definition: `mixed_m = x + (shift(x) - x) * mixes[m]`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import find_segments
from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.sharding import Layout
from pallas_kernels.types import SegmentIds

LAYOUT = Layout(inputs=("B T C", "M C", "B C", "B T"), results=("B T C", "B C"), independent="B C")


def mask_padding(x: Float[Array, "B T C"], segment_ids: SegmentIds | None) -> Float[Array, "B T C"]:
    """Returns `x` with zeros at padding, whatever stands there (it may be nan)."""
    return x if segment_ids is None else jnp.where((segment_ids != 0)[..., None], x, 0)


def take_tokens(x: Float[Array, "B T C"], position: Int[Array, "B n"]) -> Float[Array, "B n C"]:
    """Returns `x[b, position[b, i]]`, or zero where the position is negative."""
    index = jnp.maximum(position, 0)[..., None]
    taken = jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
    return jnp.where(position[..., None] < 0, 0, taken)


def last_position(segment_ids: SegmentIds) -> Int[Array, " B"]:
    """Returns the position of each row's last token that is not padding, or -1."""
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return jnp.where(segment_ids != 0, position, -1).max(axis=1)


def add_to_last_token(
    x: Float[Array, "B T C"], addend: Float[Array, "B C"], segment_ids: SegmentIds | None
) -> Float[Array, "B T C"]:
    """Adds to each row's last token that is not padding, if there is one.

    Args:
      x: result of a kernel.
      addend: what to add.
      segment_ids: of the tokens.
    """
    addend = addend.astype(x.dtype)
    # Within a loop, XLA of JAX 0.11 may take the update for a part of the kernel, and fail.
    x = jax.lax.optimization_barrier(x)
    if segment_ids is None:
        # Unlike a scatter, this writes one token of each row and leaves the others where they are.
        # Without the barrier, XLA would add and write in one kernel, which copies all tokens.
        last = jax.lax.optimization_barrier(x[:, -1:] + addend[:, None])
        return jax.lax.dynamic_update_slice_in_dim(x, last, x.shape[1] - 1, axis=1)
    position = last_position(segment_ids)
    position = jnp.where(position < 0, x.shape[1], position)  # out of range: dropped
    return x.at[jnp.arange(len(x)), position].add(addend, mode="drop")


def shift(
    x: Float[Array, "B T C"], state: Float[Array, "B C"] | None, segment_ids: SegmentIds | None
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"]]:
    """Returns the token before each one, and each row's last token."""
    before = jnp.zeros_like(x[:, 0]) if state is None else state
    if segment_ids is None:
        return jnp.concatenate([before[:, None], x[:, :-1]], axis=1), x[:, -1]
    segments = find_segments(segment_ids)
    first = segments.start & (segments.index == 0)
    shifted = take_tokens(x, segments.previous)
    last = last_position(segment_ids)[:, None]
    new_state = jnp.where(last < 0, before, take_tokens(x, last)[:, 0])
    return jnp.where(first[..., None], before[:, None], shifted), new_state


def token_shift_mix_reference(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[Float[Array, "B T C"], ...], Float[Array, "B C"]]:
    """Computes `pallas_kernels.token_shift_mix`, which documents the arguments."""
    dtype = accumulation_dtype(x, mixes)
    x = mask_padding(x, segment_ids)  # makes the outputs and gradients of padding zero
    shifted, new_state = shift(x, state, segment_ids)
    token = x.astype(dtype)
    difference = shifted.astype(dtype) - token
    mixed = tuple((token + difference * per_token(mix, dtype)).astype(x.dtype) for mix in mixes)
    return mixed, new_state


__all__ = [
    "LAYOUT",
    "add_to_last_token",
    "last_position",
    "mask_padding",
    "shift",
    "take_tokens",
    "token_shift_mix_reference",
]
