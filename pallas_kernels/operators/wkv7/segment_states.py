"""One state for each segment of a row, loaded and stored while tokens are read.

`stored` is `[B, N, H, K, V]`. A slot `[B]` names one of the N states of each row, or N for none.
"""

import jax
import jax.numpy as jnp


def load_state(state: jax.Array, stored: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns each row's stored state if its slot names one, else its `state` `[B, H, K, V]`."""
    loaded = stored.at[jnp.arange(slot.shape[0]), slot].get(mode="clip")
    return jnp.where(_is_named(stored, slot), loaded, state)


def load_state_backward(
    dstate: jax.Array, dstored: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient of the carried state; and `dstored` with the loaded ones' added."""
    dstored = dstored.at[jnp.arange(slot.shape[0]), slot].add(dstate, mode="drop")
    return jnp.where(_is_named(dstored, slot), 0, dstate), dstored


def store_state(stored: jax.Array, slot: jax.Array, state: jax.Array) -> jax.Array:
    """Returns the stored states, with each row's `state` in the slot that the row names."""
    return stored.at[jnp.arange(slot.shape[0]), slot].set(state, mode="drop")


def store_state_backward(dstored: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns the gradient of the state that was stored in the slot; zero if there was none."""
    return dstored.at[jnp.arange(slot.shape[0]), slot].get(mode="fill", fill_value=0)


def never_stored(dstored: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns `dstored`, with zeros for the states that a slot of `slots` `[..., B]` names."""
    slots = slots.reshape(-1, slots.shape[-1])
    states = jnp.arange(dstored.shape[1])[None, None]
    kept = (slots[..., None] != states).all(axis=0)  # [B, N]
    return jnp.where(kept[:, :, None, None, None], dstored, 0)


def _is_named(stored: jax.Array, slot: jax.Array) -> jax.Array:
    return (slot < stored.shape[1])[:, None, None, None]


__all__ = [
    "load_state",
    "load_state_backward",
    "never_stored",
    "store_state",
    "store_state_backward",
]
