"""What the two walks over the chunks share: from the first to the last, and with gradients back.

Both have one form. With the state S transposed, `[V, K]`, in blocks of 64 channels,

    A  = mask(x y^T)    R = X x    U0 = X A Y        `solve`, of the chunk alone
    S^ = S before       U = U0 + R S^^T              `advance`, with the state
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

from pallas_kernels.wkv7.mosaic_gpu.chunk import Masks
from pallas_kernels.wkv7.mosaic_gpu.registers import halves_of, narrow, store
from pallas_kernels.wkv7.mosaic_gpu.state import State
from pallas_kernels.wkv7.mosaic_gpu.tiles import (
    Operand,
    load,
    load32,
    load_columns,
    products,
    split,
    spread_columns,
    transposed,
)


class Chunk(NamedTuple):
    """Tiles of a chunk in shared memory; lists have one for each 64 channels.

    Attributes:
      x: x, its larger half; then R.
      low: the smaller half of x; then, of the first, that of A; then S^.
      y: as above.
      z: likewise.
      Y: likewise.
      X: likewise; then U0, then U.
      before: vectors `[64]`.
      after: likewise.
    """

    x: Sequence[Any]
    low: Sequence[Any]
    y: Sequence[Any]
    z: Sequence[Any]
    Y: Any
    X: Any
    before: Sequence[Any]
    after: Sequence[Any]


def solve(
    chunk: Chunk,
    X: Operand,
    mask: Callable[..., tuple[jax.Array, ...]],
    A_smem: Any,
    selections: Sequence[tuple[Callable[[jax.Array], Any], Sequence[Any]]],
) -> None:
    """Computes R and U0.

    Args:
      chunk: is overwritten.
      X: its X, or that transposed.
      mask: of tiles like A.
      A_smem: a tile for the larger half of A.
      selections: which rows of which tiles meet the states, unless all do.
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
    A_tiles = A_smem, chunk.low[0]
    values = *mask(*halves_of(A)), *R
    store(*zip((*A_tiles, *chunk.x), values, strict=True))
    (XA,) = products([(X, half) for half in A_tiles])
    (U0,) = products([(narrow(XA), chunk.Y)])
    store((chunk.X, narrow(U0)))


def advance(
    chunk: Chunk,
    state: State,
    masks: Masks,
    low_smem: Sequence[Any],
    leaving_smem: Any | None = None,
) -> State:
    """The next state.

    Args:
      chunk: after `solve`; gets S^ and U.
      state: S.
      masks: tell whether S passes the chunk.
      low_smem: tiles for the smaller half of S^.
      leaving_smem: a tile for the rows of U that change S', unless all do; those of Y are then put
        where the smaller half of S^ was.
    """
    read = [s * spread_columns(load_columns(x)) for s, x in zip(state, chunk.before, strict=True)]
    U0 = load32(chunk.X)
    for high, low, s in zip(chunk.low, low_smem, read, strict=True):
        split(s, high, low)
    (U,) = products(
        [
            (R, transposed(half))
            for R, *halves in zip(chunk.x, chunk.low, low_smem, strict=True)
            for half in halves
        ],
        start=[U0],
    )
    U = narrow(U)
    values = [(chunk.X, U)]
    if leaving_smem is not None:
        values.append((low_smem[0], masks.leaving(load(chunk.Y))))
        values.append((leaving_smem, masks.leaving(U)))
    store(*values)
    Y, U = (chunk.Y, chunk.X) if leaving_smem is None else (low_smem[0], leaving_smem)
    Y, U = transposed(Y), transposed(U)
    new = products(
        *([(Y, y), (U, z)] for y, z in zip(chunk.y, chunk.z, strict=True)),
        start=[masks.passing(s) for s in read],
    )
    return tuple(s * spread_columns(load_columns(x)) for s, x in zip(new, chunk.after, strict=True))
