"""What the two walks over the chunks share: from the first to the last, and with gradients back.

Both have one form. With the state S transposed, `[V, K]`, in blocks of 64 channels,

    A  = mask(x y^T)    R = X x    XA = X A              `solve`, of the chunk alone
    S^ = S before       U = XA Y + R S^^T                `advance`, with the state
    S' = (S^ + Y^T y + U^T z) after

where `before` and `after` are a factor for each channel, and

                X     x    y    z    Y    U     before        after         mask, row and column
    forward     X     a^   k^   b^   V    U     exp(m)        exp(gL - m)   i > j
    backward    X^T   b^   r^   a^   dO   dW    exp(gL - m)   exp(m)        i <= j

U is a small difference of large numbers where tokens repeat: X takes away what neighbours have in
common. So x, A and S^ go into it as two tiles each, which together have twice the digits of one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.registers import halves_of, load, narrow, store
from pallas_kernels.hopper.tiles import (
    Operand,
    load_columns,
    products,
    spread_columns,
    transposed,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import Masks
from pallas_kernels.operators.wkv7.mosaic_gpu.state import State


class Chunk(NamedTuple):
    """Tiles of a chunk in shared memory; lists have one for each 64 channels.

    Attributes:
      x: x, its larger half; then S^.
      low: the smaller half of x; then R; then, of the first, U.
      y: as above.
      z: likewise.
      Y: likewise.
      X: likewise.
      U: where U will be: the first of low.
      before: vectors `[64]`.
      after: likewise.
    """

    x: Sequence[Any]
    low: Sequence[Any]
    y: Sequence[Any]
    z: Sequence[Any]
    Y: Any
    X: Any
    U: Any
    before: Sequence[Any]
    after: Sequence[Any]


def solve(
    chunk: Chunk,
    X: Operand,
    mask: Callable[..., tuple[jax.Array, ...]],
    selections: Sequence[tuple[Callable[[jax.Array], Any], Sequence[Any]]],
    A_smem: tuple[Any, Any],
) -> jax.Array:
    """Computes R, and returns XA, bfloat16 in registers.

    Args:
      chunk: its tiles.
      X: its X, in registers, or that transposed.
      mask: of tiles like A.
      selections: which rows of which tiles meet the states, unless all do.
      A_smem: tiles for the halves of A, of which one may be of x.
    """
    x_tiles = list(zip(chunk.x, chunk.low, strict=True))
    for_A = [
        (half, transposed(y)) for halves, y in zip(x_tiles, chunk.y, strict=True) for half in halves
    ]
    for_R = [[(X, half) for half in halves] for halves in x_tiles]
    if selections or len(for_R) > 1:
        (A,) = products(for_A)
        for select, tiles in selections:
            for tile in tiles:
                tile[...] = select(load(tile))
        plgpu.commit_smem()
        R = [narrow(*products(pairs)) for pairs in for_R]
    else:
        A, *exact = products(for_A, *for_R)
        R = [narrow(x) for x in exact]
    store(*zip((*chunk.low, *A_smem), (*R, *mask(*halves_of(A))), strict=True))
    (XA,) = products([(X, half) for half in A_smem])
    return narrow(XA)


def advance(
    chunk: Chunk,
    state: State,
    masks: Masks,
    low_smem: Sequence[Any],
    XA: Operand,
    *,
    selecting: bool = False,
) -> State:
    """The next state.

    Args:
      chunk: after `solve`; gets S^ and U.
      state: S.
      masks: tell whether S passes the chunk.
      low_smem: tiles for the smaller half of S^.
      XA: of `solve`.
      selecting: whether only the rows of Y and U change S' that `masks.leaving` keeps.
    """
    read = [s * spread_columns(load_columns(x)) for s, x in zip(state, chunk.before, strict=True)]
    state_tiles = list(zip(chunk.x, low_smem, strict=True))
    store(
        *(
            pair
            for tiles, s in zip(state_tiles, read, strict=True)
            for pair in zip(tiles, halves_of(s), strict=True)
        )
    )
    (U,) = products(
        [
            (XA, chunk.Y),
            *(
                (R, transposed(half))
                for R, halves in zip(chunk.low, state_tiles, strict=True)
                for half in halves
            ),
        ]
    )
    U = narrow(U)
    if selecting:
        Y = low_smem[0]
        store((Y, masks.leaving(load(chunk.Y))), (chunk.U, masks.leaving(U)))
    else:
        Y = chunk.Y
        store((chunk.U, U))
    new = products(
        *(
            [(transposed(Y), y), (transposed(chunk.U), z)]
            for y, z in zip(chunk.y, chunk.z, strict=True)
        ),
        start=[masks.passing(s) for s in read],
    )
    if selecting:
        store((chunk.U, U))
    return tuple(s * spread_columns(load_columns(x)) for s, x in zip(new, chunk.after, strict=True))
