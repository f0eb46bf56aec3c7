"""A state that is carried from chunk to chunk in registers, and where states come from and go."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place
from pallas_kernels.hopper.registers import TILE_LAYOUT
from pallas_kernels.hopper.target import TILE, as_computed
from pallas_kernels.hopper.tiles import choose

type State = tuple[jax.Array, ...]
"""Float32 tiles `[64 of V, 64 of K]` in registers, one for each block of K."""


def zero_state(blocks: int) -> State:
    """What a walk starts with if no initial state is given."""
    zeros = jnp.zeros((TILE, TILE), jnp.float32)
    return tuple(plgpu.layout_cast(zeros, TILE_LAYOUT) for _ in range(blocks))


def load_state(states_gmem: Any, segment: jax.Array, place: Place) -> State:
    """One of the states `[B, N, H, V, K]`, all of its channels."""
    return tuple(
        as_computed(plgpu.load(tile, layout=TILE_LAYOUT, optimized=False))
        for tile in _tiles(states_gmem, segment, place)
    )


def store_state(state: State, states_gmem: Any, segment: jax.Array, place: Place) -> None:
    """Writes what `load_state` reads."""
    for gmem, tile in zip(_tiles(states_gmem, segment, place), state, strict=True):
        gmem[...] = tile


def entering_state(
    state: State, states_gmem: Any, load_gmem: Any, place: Place, chunk: jax.Array
) -> State:
    """The state that a chunk starts from: that of a segment which begins with it, or `state`."""
    N = states_gmem.shape[1]
    segment = load_gmem[place[0], chunk]
    loaded = load_state(states_gmem, jnp.minimum(segment, N - 1), place)
    return tuple(choose(segment < N, x, s) for x, s in zip(loaded, state, strict=True))


def leaving_state(
    state: State, states_gmem: Any, store_gmem: Any, place: Place, chunk: jax.Array
) -> None:
    """Stores the state for the segment that ends with a chunk, if one does."""
    segment = store_gmem[place[0], chunk]

    @pl.when(segment < states_gmem.shape[1])
    def _():
        store_state(state, states_gmem, segment, place)


def left_state_backward(
    d_state: State, d_states_gmem: Any, store_gmem: Any, place: Place, chunk: jax.Array
) -> State:
    """The gradient of the state after a chunk, with that of its segment's stored state."""
    N = d_states_gmem.shape[1]
    segment = store_gmem[place[0], chunk]
    stored = load_state(d_states_gmem, jnp.minimum(segment, N - 1), place)
    return tuple(
        s + choose(segment < N, x, jnp.zeros_like(x)) for x, s in zip(stored, d_state, strict=True)
    )


def entered_state_backward(
    d_state: State, d_states_gmem: Any, load_gmem: Any, place: Place, chunk: jax.Array
) -> State:
    """Stores the gradient of the state a segment began with; zero is what is left to carry then."""
    segment = load_gmem[place[0], chunk]
    loaded = segment < d_states_gmem.shape[1]

    @pl.when(loaded)
    def _():
        store_state(d_state, d_states_gmem, segment, place)

    return tuple(choose(loaded, jnp.zeros_like(s), s) for s in d_state)


def _tiles(states_gmem: Any, segment: jax.Array, place: Place) -> list[Any]:
    row, head, value_block = place
    values = pl.ds(value_block * TILE, TILE)
    return [
        states_gmem.at[row, segment, head, values, pl.ds(j * TILE, TILE)]
        for j in range(states_gmem.shape[-1] // TILE)
    ]
