"""The steps that the two walks over the chunks share, forward for outputs and back for gradients.

Both walks have one form. With the state S transposed, `[V, K]`, in blocks of 64 channels,

    A  = mask(x y^T)    R = X x    XA = X A              `solve`, of the chunk alone
    S^ = S before       U = XA Y + R S^^T                `advance`, with the state
    S' = (S^ + Y^T y + U^T z) after

where `before` and `after` are a factor for each channel, and

                X     x    y    z    Y    U     before        after         mask, row and column
    forward     X     a^   k^   b^   V    U     exp(m)        exp(gL - m)   i > j
    backward    X^T   b^   r^   a^   dO   dW    exp(gL - m)   exp(m)        i <= j

U is a small difference of large numbers where tokens repeat: X takes away what neighbours have in
common. So x, A and S^ go into U as two bfloat16 tiles each, a high and a low half, which together
have twice the digits of one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.registers import are_between, halves_of, load, narrow, store
from pallas_kernels.hopper.tiles import (
    Operand,
    load32,
    load_columns,
    products,
    spread_columns,
    transposed,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.carried_state import State
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import TileMasks

_LEAST_STATE, _MOST_STATE = 2.0**-10, 2.0**15
"""Range of S^ in float16. If its largest numbers were smaller, they would have fewer digits."""


class Chunk(NamedTuple):
    """A chunk in shared memory. Lists have an entry for each 64 key channels.

    R, S and U lie where x was, which is no longer needed when they are written.

    Attributes:
      x_high: tiles, the high half of x.
      x_low: tiles, the low half of x.
      y: tiles.
      z: tiles.
      Y: a tile.
      X: a tile.
      R: tiles, written by `solve`.
      S_high: tiles, the high half of S^, written by `advance`.
      U: a tile, written by `advance` after it has read R.
      before: float32 vectors `[64]`.
      after: float32 vectors `[64]`.
    """

    x_high: Sequence[Any]
    x_low: Sequence[Any]
    y: Sequence[Any]
    z: Sequence[Any]
    Y: Any
    X: Any
    R: Sequence[Any]
    S_high: Sequence[Any]
    U: Any
    before: Sequence[Any]
    after: Sequence[Any]


def chunk_tiles(
    *,
    x_high: Sequence[Any],
    x_low: Sequence[Any],
    y: Sequence[Any],
    z: Sequence[Any],
    Y: Any,
    X: Any,
    before: Sequence[Any],
    after: Sequence[Any],
) -> Chunk:
    """Makes a `Chunk` of the tiles that are loaded, with R, S and U where x is."""
    return Chunk(x_high, x_low, y, z, Y, X, x_low, x_high, x_low[0], before, after)


def solve(
    chunk: Chunk,
    X: Operand,
    mask: Callable[..., tuple[jax.Array, ...]],
    selections: Sequence[tuple[Callable[[jax.Array], Any], Sequence[Any]]],
    A_smem: tuple[Any, Any],
    dtype: Any = jnp.bfloat16,
) -> jax.Array:
    """Writes R, and returns XA, 16 bits in registers.

    Args:
      chunk: with everything but R, S and U.
      X: the first operand of R and XA.
      mask: masks tiles like A.
      selections: pairs of a function and tiles, which it is applied to when A is known: it keeps
        the rows of tokens that meet the state. Empty if all tokens do.
      A_smem: tiles for the halves of A; one of them may be a tile of `x_high`.
      dtype: of the numbers of all tiles, bfloat16 or float16.
    """
    x_tiles = list(zip(chunk.x_high, chunk.x_low, strict=True))
    for_A = [
        (half, transposed(y)) for halves, y in zip(x_tiles, chunk.y, strict=True) for half in halves
    ]
    for_R = [[(X, half) for half in halves] for halves in x_tiles]
    if selections or len(for_R) > 1:
        (A,) = products(for_A, dtype=dtype)
        for select, tiles in selections:
            for tile in tiles:
                tile[...] = select(load(tile))
        plgpu.commit_smem()
        R = [narrow(products(pairs, dtype=dtype)[0], dtype) for pairs in for_R]
    else:
        A, *exact = products(for_A, *for_R, dtype=dtype)
        R = [narrow(x, dtype) for x in exact]
    store(*zip((*chunk.R, *A_smem), (*R, *mask(*halves_of(A, dtype))), strict=True))
    (XA,) = products([(X, half) for half in A_smem], dtype=dtype)
    return narrow(XA, dtype)


class Step(NamedTuple):
    """A step of `advance` whose U is known, but not yet written.

    Attributes:
      read: S^, float32 tiles.
      U: float32 tile.
    """

    read: Sequence[jax.Array]
    U: jax.Array


def advance(
    chunk: Chunk,
    state: State,
    masks: TileMasks,
    S_low_smem: Sequence[Any],
    XA: Operand,
    *,
    selecting: bool = False,
) -> State:
    """Writes S^ and U, and returns the next state S'.

    Args:
      chunk: after `solve`.
      state: S.
      masks: `masks.passing` tells whether S^ becomes a part of S'.
      S_low_smem: tiles for the low half of S^.
      XA: what `solve` returned.
      selecting: whether only those rows of Y and U become a part of S' that `masks.leaving` keeps.
    """
    step = begin_step(chunk, state, S_low_smem, XA)
    return finish_step(chunk, step, masks, S_low_smem, selecting=selecting)


def begin_step(
    chunk: Chunk,
    state: State,
    S_low_smem: Sequence[Any],
    XA: Operand,
    dtype: Any = jnp.bfloat16,
) -> Step:
    """Writes S^ and computes U, as in `advance`, with numbers of a dtype."""
    read = [s * spread_columns(load_columns(x)) for s, x in zip(state, chunk.before, strict=True)]
    store_read(chunk, read, S_low_smem, dtype)
    (U,) = products([(XA, chunk.Y), *reading(chunk, S_low_smem)], dtype=dtype)
    return Step(read, U)


def store_read(
    chunk: Chunk, read: Sequence[jax.Array], S_low_smem: Sequence[Any], dtype: Any = jnp.bfloat16
) -> None:
    """Writes the halves of S^."""
    state_tiles = zip(chunk.S_high, S_low_smem, strict=True)
    store(
        *(
            pair
            for tiles, s in zip(state_tiles, read, strict=True)
            for pair in zip(tiles, halves_of(s, dtype), strict=True)
        )
    )


def reading(chunk: Chunk, S_low_smem: Sequence[Any]) -> list[tuple[Operand, Operand]]:
    """Returns the products of R with S^, which `store_read` wrote."""
    return [
        (R, transposed(half))
        for R, *halves in zip(chunk.R, chunk.S_high, S_low_smem, strict=True)
        for half in halves
    ]


def finish_step(
    chunk: Chunk,
    step: Step,
    masks: TileMasks,
    S_low_smem: Sequence[Any],
    dtype: Any = jnp.bfloat16,
    *,
    selecting: bool = False,
) -> State:
    """Writes U, and returns the next state, as in `advance`."""
    U = narrow(step.U, dtype)
    if selecting:
        Y = S_low_smem[0]
        store((Y, masks.leaving(load(chunk.Y))), (chunk.U, masks.leaving(U)))
    else:
        Y = chunk.Y
        store((chunk.U, U))
    new = products(
        *(
            [(transposed(Y), y), (transposed(chunk.U), z)]
            for y, z in zip(chunk.y, chunk.z, strict=True)
        ),
        start=[masks.passing(s) for s in step.read],
        dtype=dtype,
    )
    if selecting:
        store((chunk.U, U))
    return next_state(chunk, new)


def advance_in_float16(
    chunk: Callable[[], Chunk],
    state: State,
    masks: TileMasks,
    S_low_smem: Callable[[], Sequence[Any]],
    XA: Operand,
    most_U: float,
    to_bfloat16: Callable[[], None],
    *,
    selecting: bool,
) -> State:
    """Does `advance` in float16, which takes 64 keys.

    Where S^ or U exceeds the range, both are bfloat16, with what they multiply.

    Args:
      chunk: returns the chunk, with addresses that are computed anew.
      state: as for `advance`.
      masks: as for `advance`.
      S_low_smem: returns the tile for the low half of S^, with an address that is computed anew.
      XA: as for `advance`.
      most_U: largest magnitude of U in float16.
      to_bfloat16: is called if S^ and U are to be bfloat16.
      selecting: as for `advance`.
    """
    step = begin_step(chunk(), state, S_low_smem(), XA, jnp.float16)
    (read,), U = step
    fits = are_between((read, _LEAST_STATE, _MOST_STATE), (U, 0.0, most_U))

    def all_in_float16():
        return finish_step(chunk(), step, masks, S_low_smem(), jnp.float16, selecting=selecting)

    def all_but_state():
        to_bfloat16()
        return _advance_but_state(chunk(), step.read, masks, S_low_smem(), XA, selecting=selecting)

    return jax.lax.cond(fits, all_in_float16, all_but_state)


def _advance_but_state(
    chunk: Chunk,
    read: Sequence[jax.Array],
    masks: TileMasks,
    S_low_smem: Sequence[Any],
    XA: Operand,
    *,
    selecting: bool,
) -> State:
    """Does `advance` with S^ and U in bfloat16, and what they multiply; the rest is float16."""
    (R,), (y,), (z,), (S_low,) = chunk.R, chunk.y, chunk.z, S_low_smem
    store((R, narrow(load32(R, jnp.float16))))
    store_read(chunk, read, [S_low])
    (U_exact,) = products([(XA, chunk.Y)], dtype=jnp.float16)
    (U_exact,) = products(reading(chunk, [S_low]), start=[U_exact])
    U, Y = narrow(U_exact), chunk.Y
    if selecting:
        Y = S_low
        store((Y, masks.leaving(load(chunk.Y))))
    store((chunk.U, masks.leaving(U) if selecting else U))
    start = [masks.passing(s) for s in read]
    (new,) = products([(transposed(Y), y)], start=start, dtype=jnp.float16)
    store((S_low, narrow(load32(z, jnp.float16))))
    (new,) = products([(transposed(chunk.U), S_low)], start=[new])
    if selecting:
        store((chunk.U, U))
    return next_state(chunk, [new])


def next_state(chunk: Chunk, new: Sequence[jax.Array]) -> State:
    """Returns the state that leaves a chunk, of the sum of S^ and what the tokens wrote."""
    return tuple(s * spread_columns(load_columns(x)) for s, x in zip(new, chunk.after, strict=True))
