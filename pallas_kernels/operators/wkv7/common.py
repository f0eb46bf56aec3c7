"""What the implementations of WKV7 share."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulation_dtype, vary_alike
from pallas_kernels.types import FloatArray, SegmentIds

type Implementation = Callable[..., tuple[FloatArray, FloatArray]]
"""From the arguments of `wkv7` or `wkv7_recurrent`, checked, to outputs and final state."""


def prepare(
    inputs: Sequence[FloatArray],
    initial_state: FloatArray | None,
    segment_ids: SegmentIds | None,
    num_segments: int | None,
) -> tuple[Sequence[FloatArray], FloatArray, SegmentIds | None]:
    """Makes a call's arguments simple.

    Args:
      inputs: r, log_decay, k, v, a, b, each `[B, T, H, _]`.
      initial_state: `[B, H, K, V]`, with `num_segments` `[B, N, H, K, V]`, or None.
      segment_ids: `[B, T]` or None.
      num_segments: N or None.

    Returns:
      The inputs with zeros at padding, which lets it leave states alone and output zero; the
      initial state, zeros for None, in the dtype to compute in; the segment ids.
    """
    inputs, initial_state, segment_ids = vary_alike(list(inputs), initial_state, segment_ids)
    if segment_ids is not None:
        valid = (segment_ids != 0)[:, :, None, None]
        inputs = [jnp.where(valid, x, 0) for x in inputs]
    if initial_state is None:
        _, _, k, v, _, _ = inputs
        # Of this product only the shape is used, and over which mesh axes it varies.
        initial_state = jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        if num_segments is not None:
            initial_state = jnp.repeat(initial_state[:, None], num_segments, axis=1)
    return inputs, initial_state.astype(accumulation_dtype(*inputs)), segment_ids


def tokens_first(x: jax.Array) -> jax.Array:
    """`[B, T, ...]` to `[T, B, ...]` and back."""
    return jnp.swapaxes(x, 0, 1)


# Per-segment states: `stored` is `[B, N, H, K, V]`; a slot `[B]` names one of the N states of each
# row, or N for none.


def load_state(state: jax.Array, stored: jax.Array, slot: jax.Array) -> jax.Array:
    """The stored state of each row where its slot names one, else the carried `[B, H, K, V]`."""
    loaded = stored.at[jnp.arange(len(slot)), slot].get(mode="clip")
    return jnp.where(_named(stored, slot), loaded, state)


def load_state_backward(
    d_state: jax.Array, d_stored: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the carried state and, added to `d_stored`, of the stored ones."""
    d_stored = d_stored.at[jnp.arange(len(slot)), slot].add(d_state, mode="drop")
    return jnp.where(_named(d_stored, slot), 0, d_state), d_stored


def store_state(stored: jax.Array, slot: jax.Array, state: jax.Array) -> jax.Array:
    """The stored states with that of each row's slot replaced."""
    return stored.at[jnp.arange(len(slot)), slot].set(state, mode="drop")


def store_state_backward(d_stored: jax.Array, slot: jax.Array) -> jax.Array:
    """What the gradients of all stored states give to the state that went into the slot."""
    return d_stored.at[jnp.arange(len(slot)), slot].get(mode="fill", fill_value=0)


def never_stored(d_stored: jax.Array, slots: jax.Array) -> jax.Array:
    """`d_stored` of the states that no slot of `slots` `[..., B]` named, zero for the others."""
    slots = slots.reshape(-1, slots.shape[-1])
    states = jnp.arange(d_stored.shape[1])[None, None]
    kept = (slots[..., None] != states).all(axis=0)  # [B, N]
    return jnp.where(kept[:, :, None, None, None], d_stored, 0)


def _named(stored: jax.Array, slot: jax.Array) -> jax.Array:
    return (slot < stored.shape[1])[:, None, None, None]
