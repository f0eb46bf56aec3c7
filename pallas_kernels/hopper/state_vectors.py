"""States and vectors of a head in registers, for kernels that work on one token at a time.

One warpgroup holds a state `[K, 64]` in float32: a row for each key channel, a column for each of
64 value channels. Each warp has 16 of the columns, each thread 4 of them for every eighth row:

    warp w                      columns 16 w .. 16 w + 15
    thread 4 i + j of the warp  rows i, i + 8, i + 16, ..; columns 16 w + 4 j .. 16 w + 4 j + 3

So a thread loads 16 bytes at a time, and a warp two whole sectors of 32 bytes in each of eight
rows. A sum over rows stays within a warp. A sum over columns crosses warps, which have to wait for
each other.

A vector over keys has an entry for each row of the state, a vector over values one for each column.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

STATE = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (8, 16), (4,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""Layout of a state `[K, 64]`."""

KEYS = STATE.reduce(1)
"""Layout of a vector over keys, `[K]`."""

VALUES = STATE.reduce(0)
"""Layout of a vector over values, `[64]`."""


def along_keys(vector: jax.Array, state: jax.Array) -> jax.Array:
    """Repeats a vector over keys, `[K]`, in each column of an array like `state`."""
    return jax.lax.broadcast_in_dim(vector, state.shape, [0])


def along_values(vector: jax.Array, state: jax.Array) -> jax.Array:
    """Repeats a vector over values, `[64]`, in each row of an array like `state`."""
    return jax.lax.broadcast_in_dim(vector, state.shape, [1])


def read(state: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns `state^T keys`, a vector over values, `[64]`."""
    return jnp.sum(along_keys(keys, state) * state, axis=0)


__all__ = ["KEYS", "STATE", "VALUES", "along_keys", "along_values", "read"]
