"""The token shift and its gradients on Hopper GPUs, each in one pass over memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.target import TILE, target_in_context
from pallas_kernels.hopper.token_tiles import BEFORE, NONE, Tiles
from pallas_kernels.operators.token_shift.reference import last_position, take_tokens
from pallas_kernels.operators.token_shift.xla import following_position
from pallas_kernels.packing import find_segments
from pallas_kernels.types import SegmentIds

KERNEL_UNITS = {"C": TILE}


class Neighbours(NamedTuple):
    """Where tokens and their neighbours lie; `NONE` where there is none. Each is `[B, T]` int32.

    Attributes:
      token: the token itself, `NONE` for padding.
      previous: the token before it in its segment, `BEFORE` for the first token of a row.
      following: the token after it in its segment.
    """

    token: Any
    previous: Any
    following: Any


class Places(NamedTuple):
    """`Neighbours` of the tokens of a tile."""

    token: jax.Array
    previous: jax.Array
    following: jax.Array


def find_neighbours(segment_ids: SegmentIds) -> Neighbours:
    """Finds the neighbours of the tokens of packed rows."""
    segments, valid = find_segments(segment_ids), segment_ids != 0
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = segments.start & (segments.index == 0)
    previous = jnp.where(first, BEFORE, segments.previous)
    return Neighbours(
        *(
            jnp.where(valid, x, NONE).astype(jnp.int32)
            for x in (position, previous, following_position(segment_ids))
        )
    )


def places_of(
    tiles: Tiles, neighbours_gmem: Neighbours | None, row: jax.Array, positions: jax.Array
) -> Places:
    """Returns the neighbours of the tokens of a tile.

    Args:
      tiles: of the kernel.
      neighbours_gmem: references; None if each row is one sequence.
      row: row of the batch.
      positions: of the tile.
    """
    if neighbours_gmem is not None:
        return Places(
            *(
                token_tiles.load_positions(x.at[row], positions, tiles.width)
                for x in neighbours_gmem
            )
        )
    none, before = (jnp.full_like(positions, x) for x in (NONE, BEFORE))
    previous = jnp.where(positions > 0, positions - 1, jnp.where(positions == 0, before, none))
    last = tiles.tokens - 1
    following = jnp.where((positions >= 0) & (positions < last), positions + 1, none)
    return Places(positions, previous, following)


def token_shift_mix_mosaic_gpu(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[Float[Array, "B T C"], ...], Float[Array, "B C"]]:
    """Computes `pallas_kernels.token_shift_mix`, which documents the arguments.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    target, count = target_in_context(), len(mixes)
    tiles = token_tiles.tiles_of(target, x, registers=24 + 15 * count)

    def body(x_gmem, mixes_gmem, state_gmem, neighbours_gmem, *mixed_gmem):
        channels = tiles.channels_of_block()
        mixes = [tiles.load_parameter(mixes_gmem.at[m, channels]) for m in range(count)]

        def mix_tokens(row, positions, _):
            places = places_of(tiles, neighbours_gmem, row, positions)
            x_row = x_gmem.at[row, :, channels]
            before = None if state_gmem is None else state_gmem.at[row, channels]
            token = token_tiles.load(x_row, places.token)
            difference = token_tiles.load(x_row, places.previous, before) - token
            for mix, gmem in zip(mixes, mixed_gmem, strict=True):
                token_tiles.store(gmem.at[row, :, channels], positions, token + difference * mix)

        tiles.for_each(mix_tokens, None)

    kernel = target.kernel(
        body,
        name="token_shift_mix",
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * count,
        grid=tiles.grid,
        scratch_types=(),
    )
    neighbours = None if segment_ids is None else find_neighbours(segment_ids)
    mixed = kernel(x, mixes.astype(jnp.float32), state, neighbours)
    return tuple(mixed), _new_state(x, state, segment_ids)


def _new_state(
    x: Float[Array, "B T C"], state: Float[Array, "B C"] | None, segment_ids: SegmentIds | None
) -> Float[Array, "B C"]:
    if segment_ids is None:
        return x[:, -1]
    last = last_position(segment_ids)[:, None]
    before = jnp.zeros_like(x[:, 0]) if state is None else state
    return jnp.where(last < 0, before, take_tokens(x, last)[:, 0])


def token_shift_mix_backward_mosaic_gpu(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    cotangents: tuple[Sequence[Float[Array, "B T C"]], Float[Array, "B C"]],
) -> tuple[Float[Array, "B T C"], Float[Array, "M C"], Float[Array, "B C"] | None, None]:
    """Returns the gradients of x, mixes and state, and None for the segment ids.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    dnew_state = cotangents[1]
    dmixed = tuple(gradient.astype(x.dtype) for gradient in cotangents[0])
    target, count = target_in_context(), len(mixes)
    tiles = token_tiles.tiles_of(target, x, registers=40 + 25 * count)

    def body(x_gmem, mixes_gmem, state_gmem, neighbours_gmem, dmixed_gmem, dx_gmem, dmixes_gmem):
        channels = tiles.channels_of_block()
        mixes = [tiles.load_parameter(mixes_gmem.at[m, channels]) for m in range(count)]

        def add_tokens(row, positions, dmixes):
            places = places_of(tiles, neighbours_gmem, row, positions)
            x_row = x_gmem.at[row, :, channels]
            before = None if state_gmem is None else state_gmem.at[row, channels]
            gmem = [x.at[row, :, channels] for x in dmixed_gmem]
            gradients = [token_tiles.load(x, places.token) for x in gmem]
            of_following = [token_tiles.load(x, places.following) for x in gmem]
            token = token_tiles.load(x_row, places.token)
            difference = token_tiles.load(x_row, places.previous, before) - token
            dx = tiles.zeros()
            for mix, gradient, following in zip(mixes, gradients, of_following, strict=True):
                dx += gradient + mix * (following - gradient)
            token_tiles.store(dx_gmem.at[row, :, channels], positions, dx)
            return tuple(
                total + gradient * difference
                for total, gradient in zip(dmixes, gradients, strict=True)
            )

        dmixes = tiles.for_each(add_tokens, (tiles.zeros(),) * count)
        split = jax.lax.axis_index("split")
        for m, total in enumerate(dmixes):
            token_tiles.store_sums(dmixes_gmem.at[split, m, :, channels], total)

    kernel = target.kernel(
        body,
        name="token_shift_mix_backward",
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), tiles.partial_sums(count)),
        grid=tiles.grid,
        scratch_types=(),
    )
    neighbours = None if segment_ids is None else find_neighbours(segment_ids)
    dx, dmixes = kernel(x, mixes.astype(jnp.float32), state, neighbours, dmixed)
    dx, dstate = _add_of_states(dx, mixes, state, segment_ids, dmixed, dnew_state)
    return dx, dmixes.sum((0, 2)), dstate, None


def _add_of_states(
    dx: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    dmixed: Sequence[Float[Array, "B T C"]],
    dnew_state: Float[Array, "B C"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"] | None]:
    """Adds what the new state contributes to dx, and returns the gradient of the state, too."""
    rows, tokens = jnp.arange(len(dx)), dx.shape[1]
    first, empty = jnp.zeros_like(rows), None
    if segment_ids is None:
        last_token = dx[:, -1:] + dnew_state[:, None].astype(dx.dtype)
        # Unlike a scatter, this writes one token of each row and leaves the others where they are.
        dx = jax.lax.dynamic_update_slice_in_dim(dx, last_token, tokens - 1, axis=1)
    else:
        valid = segment_ids != 0
        first, empty = jnp.argmax(valid, axis=1), ~valid.any(1)
        last = jnp.where(empty, tokens, last_position(segment_ids))  # out of range: dropped
        dx = dx.at[rows, last].add(dnew_state.astype(dx.dtype), mode="drop")
    if state is None:
        return dx, None
    dstate = jnp.zeros(state.shape, jnp.float32)
    for gradient, mix in zip(dmixed, mixes.astype(jnp.float32), strict=True):
        dstate += gradient[rows, first] * mix[None]
    if empty is not None:
        dstate = jnp.where(empty[:, None], dnew_state, dstate)
    return dx, dstate.astype(state.dtype)


__all__ = ["KERNEL_UNITS", "token_shift_mix_backward_mosaic_gpu", "token_shift_mix_mosaic_gpu"]
