"""States that a walk carries from chunk to chunk, and that segments begin and end with.

The states of N segments, or of the pieces of a row, lie in global memory as `[B, N, H, V, K]`
float32. Where each segment has its own, `Transfers` tell for each chunk which one it starts from
and which one it ends, N for none.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place
from pallas_kernels.hopper.registers import TILE_LAYOUT
from pallas_kernels.hopper.target import TILE, as_computed
from pallas_kernels.hopper.tiles import choose
from pallas_kernels.operators.wkv7.chunk_alignment import Transfers

type State = tuple[jax.Array, ...]
"""Float32 tiles `[64 of V, 64 of K]` in registers, one for each 64 of K."""


def zero_state(blocks: int) -> State:
    """Returns a state of zeros with 64 `blocks` key channels."""
    zeros = jnp.zeros((TILE, TILE), jnp.float32)
    return tuple(plgpu.layout_cast(zeros, TILE_LAYOUT) for _ in range(blocks))


def load_state_tiles(states_gmem: Any, segment: jax.Array, place: Place) -> State:
    """Loads the state of a segment."""
    return tuple(
        as_computed(plgpu.load(tile, layout=TILE_LAYOUT, optimized=False))
        for tile in _tiles(states_gmem, segment, place)
    )


def store_state_tiles(state: State, states_gmem: Any, segment: jax.Array, place: Place) -> None:
    """Writes the state of a segment."""
    for gmem, tile in zip(_tiles(states_gmem, segment, place), state, strict=True):
        gmem[...] = tile


def enter(
    state: State, initial_gmem: Any, transfers_gmem: Transfers, place: Place, chunk: jax.Array
) -> State:
    """Returns the state that a chunk starts from.

    Args:
      state: after the chunk before.
      initial_gmem: the initial states.
      transfers_gmem: references.
      place: where the walk is.
      chunk: the chunk.

    Returns:
      The initial state of the segment that begins with the chunk, or `state` if none does.
    """
    N = initial_gmem.shape[1]
    segment = transfers_gmem.load[place.row, chunk]
    loaded = load_state_tiles(initial_gmem, jnp.minimum(segment, N - 1), place)
    return tuple(choose(segment < N, x, s) for x, s in zip(loaded, state, strict=True))


def leave(
    state: State, final_gmem: Any, transfers_gmem: Transfers, place: Place, chunk: jax.Array
) -> None:
    """Writes the state after a chunk to the final states, if a segment ends with the chunk."""
    segment = transfers_gmem.store[place.row, chunk]

    @pl.when(segment < final_gmem.shape[1])
    def _():
        store_state_tiles(state, final_gmem, segment, place)


def leave_backward(
    d_state: State, d_final_gmem: Any, transfers_gmem: Transfers, place: Place, chunk: jax.Array
) -> State:
    """Returns the gradient of the state after a chunk.

    Args:
      d_state: what the chunks after it contribute.
      d_final_gmem: gradients of the final states; one is added if its segment ends with the chunk.
      transfers_gmem: references.
      place: where the walk is.
      chunk: the chunk.
    """
    N = d_final_gmem.shape[1]
    segment = transfers_gmem.store[place.row, chunk]
    stored = load_state_tiles(d_final_gmem, jnp.minimum(segment, N - 1), place)
    return tuple(
        s + choose(segment < N, x, jnp.zeros_like(x)) for x, s in zip(stored, d_state, strict=True)
    )


def enter_backward(
    d_state: State, d_initial_gmem: Any, transfers_gmem: Transfers, place: Place, chunk: jax.Array
) -> State:
    """Returns what a chunk contributes to the gradient of the state after the chunk before.

    If a segment begins with the chunk, that is zero, and `d_state` is written as the gradient of
    the segment's initial state.
    """
    segment = transfers_gmem.load[place.row, chunk]
    loaded = segment < d_initial_gmem.shape[1]

    @pl.when(loaded)
    def _():
        store_state_tiles(d_state, d_initial_gmem, segment, place)

    return tuple(choose(loaded, jnp.zeros_like(s), s) for s in d_state)


def _tiles(states_gmem: Any, segment: jax.Array, place: Place) -> list[Any]:
    row, head, value_block = place
    values = pl.ds(value_block * TILE, TILE)
    return [
        states_gmem.at[row, segment, head, values, pl.ds(j * TILE, TILE)]
        for j in range(states_gmem.shape[-1] // TILE)
    ]
