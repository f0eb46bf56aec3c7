"""The triangular inverse X of a chunk, within another kernel or by a kernel for all chunks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import divide
from pallas_kernels.hopper.registers import (
    halves_of,
    narrow,
    narrow_pairs,
    store,
    widen,
    with_diagonal,
)
from pallas_kernels.hopper.ring import Ring, slots_that_fit
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    TILE_BYTES,
    load32,
    products,
    store_halves,
    tiles_smem,
    transposed,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import (
    before_token,
    decays_from_middle,
    number_of_chunks,
    prefix_sums,
    since_token,
    tokens_tile,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.diagonal_blocks import invert_diagonal
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds, load_masks

_WARPGROUPS = 4


def invert(
    A_high: jax.Array,
    A_low: jax.Array,
    first: Any,
    second: Any,
    X_smem: Any,
    *,
    packed: bool,
    fits_float16: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array | None:
    """Writes X, `(I - A)^-1`, to X_smem in 16 bits.

    Inverses D of blocks on the diagonal grow from 4 rows to 16 and then to all 64, by `Y + N^2 Y`,
    as `diagonal_blocks` explains. Each warp does the first two steps in its registers, all warps
    together do the last one. So far operands have 16 bits. One step of Newton's method with an A of
    twice the digits, `X <- X + (I - X (I - A)) X`, removes the error of that.

    The result is rounded to 16 bits so that rounding acts like a product with `I + E`, where E
    holds the errors: `X <- round(X + (round(X) - X) X)`. X takes away what neighbouring tokens have
    in common. Errors of entries that are rounded one by one would not be taken away, and would add
    up where tokens repeat. The last rounding to bfloat16 keeps sums of two neighbours in a row as
    well as one rounding can, since the two are multiplied by nearly the same where tokens repeat.

    Args:
      A_high: `[64, 64]` bfloat16 in registers, strictly lower triangular: the high half of A.
      A_low: the low half of A, a tile of the same kind.
      first: a tile of shared memory for intermediate results.
      second: a tile of shared memory for A_high.
      X_smem: a tile of shared memory for the result, and for intermediate ones before.
      packed: whether segments may begin within the chunk. Tokens of other segments have zeros in X,
        which then stay zeros.
      fits_float16: tells whether X, float32, is to be rounded to float16, a boolean scalar. None
        for bfloat16.

    Returns:
      What `fits_float16` returned; None without it.
    """
    D, N = invert_diagonal(A_high)
    store((first, D), (second, A_high), (X_smem, N))
    N2, Y = products([(N, X_smem)], [(with_diagonal(N, 1), first)])
    store((first, A_low), (X_smem, narrow(Y)))
    (X,) = products([(narrow(N2), X_smem)], start=[Y])
    X = narrow(X)
    store((X_smem, X))
    of_identity = with_diagonal(X, 0, negated=True)  # minus X, whose diagonal is one
    (error,) = products([(X, second), (X, first)], start=[widen(of_identity)])
    (X_exact,) = products([(narrow(error), X_smem)], start=[widen(X)])

    def write(dtype):
        rounding = narrow(widen(narrow(X_exact, dtype), dtype) - X_exact)
        (X_shaped,) = products([(rounding, X_smem)], start=[X_exact])
        if dtype == jnp.bfloat16:
            store((X_smem, narrow_pairs(X_shaped, keep_zeros=packed)))
        else:
            store((X_smem, narrow(X_shaped, dtype)))

    if fits_float16 is None:
        write(jnp.bfloat16)
        return None
    fits = fits_float16(X_exact)
    jax.lax.cond(fits, lambda: write(jnp.float16), lambda: write(jnp.bfloat16))
    return fits


class Slots(NamedTuple):
    """The rings in shared memory. Lists have an entry for each 64 key channels.

    Attributes:
      log_decay: tiles `[all slots, 64, 64]`; then the low half of b^, and scratch.
      a: tiles; then scratch.
      b: tiles; then the high half of b^, and X.
    """

    log_decay: list[Any]
    a: list[Any]
    b: list[Any]

    def at(self, slot: jax.Array) -> Self:
        """Returns the tiles of a slot."""
        return type(self)(*([tile.at[slot] for tile in tiles] for tiles in self))


def inverses(
    target: Target,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    bounds: SegmentBounds | None,
) -> jax.Array:
    """Computes `X = (I - A_ab)^-1` of every chunk.

        A_ab[i, j] = sum_c a[i, c] exp(sum of log_decay over j < t < i) b[j, c]    for j < i

    There is a block of the grid for each multiprocessor. Each of its warpgroups takes every n-th
    chunk, and has slots of its own: it loads the next chunk while it works on one.

    Args:
      target: what the kernel is compiled for.
      log_decay: `[B, T, H, K]` bfloat16, T a multiple of 64.
      a: `[B, T, H, K]` bfloat16.
      b: `[B, T, H, K]` bfloat16.
      bounds: of segments that begin within chunks, or None.

    Returns:
      `[B, H, chunks, 64, 64]` bfloat16.
    """
    B, T, H, K = a.shape
    chunks, blocks = number_of_chunks(T), K // TILE
    total = B * H * chunks
    workers = min(target.multiprocessors, -(-total // _WARPGROUPS)) * _WARPGROUPS
    slots = slots_that_fit(3 * blocks * _WARPGROUPS * TILE_BYTES, others=TILE_BYTES, most=2)
    rings = Ring(slots, rings=_WARPGROUPS)

    def body(operands_gmem, sums_gmem, bounds_gmem, X_gmem, slots, sums_smem, sums_loaded, loaded):
        warpgroup = jax.lax.axis_index("warpgroup")
        ring = dataclasses.replace(rings, ring=warpgroup)
        first = jax.lax.axis_index("block") * _WARPGROUPS + warpgroup
        steps = jax.lax.div(total - 1 - first + workers, workers)

        def position(step):
            index, head = divide(first + step * workers, H)
            row, chunk = divide(index, chunks)
            return row, chunk, head

        def fetch(step):
            row, chunk, head = position(step)
            for gmem, tiles in zip(operands_gmem, slots, strict=True):
                pairs = [(tokens_tile(gmem, row, chunk, head, j), x) for j, x in enumerate(tiles)]
                ring.copy(step, loaded, pairs)

        def invert_chunk(step, _):
            plgpu.barrier_wait(ring.loaded(loaded, step))
            if ring.slots > 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # X of the step before
                ring.refill(fetch, step - 1, steps)
            row, chunk, head = position(step)
            t = slots.at(ring.slot(step))
            A = _product_of_decayed(t, sums_smem)
            masks = load_masks(bounds_gmem, row, chunk)
            A_high, A_low = masks.lower(*halves_of(A), strictly=True)
            X_smem = t.b[0]
            packed = bounds_gmem is not None
            invert(A_high, A_low, t.log_decay[0], t.a[0], X_smem, packed=packed)
            plgpu.copy_smem_to_gmem(X_smem, X_gmem.at[row, head, chunk])
            if ring.slots == 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ring.refill(fetch, step, steps)

        pl.when(steps > 0)(lambda: fetch(jnp.int32(0)))

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(sums_gmem, sums_smem, sums_loaded)

        plgpu.barrier_wait(sums_loaded)
        jax.lax.fori_loop(0, steps, invert_chunk, None)
        plgpu.wait_smem_to_gmem(0)

    kernel = target.kernel(
        body,
        name="wkv7_inverses",
        out_type=jax.ShapeDtypeStruct((B, H, chunks, TILE, TILE), jnp.bfloat16),
        grid={"block": workers // _WARPGROUPS},
        warpgroups=_WARPGROUPS,
        scratch_types={
            "slots": Slots(*[[tiles_smem(rings.all_slots)] * blocks] * 3),
            "sums_smem": tiles_smem(),
            "sums_loaded": plgpu.Barrier(),
            "loaded": rings.loaded_type(copies=3 * blocks),
        },
    )
    return kernel((log_decay, a, b), prefix_sums(), bounds)


def _product_of_decayed(t: Slots, sums_smem: Any) -> jax.Array:
    """Returns A_ab before masks, float32 in registers, and overwrites log_decay and b."""
    a_halves, b_high, b_low = [], t.b, t.log_decay
    for j, (log_decay, a, b) in enumerate(zip(*t, strict=True)):
        of_a, of_b = load32(a), load32(b)
        g = decays_from_middle(log_decay, sums_smem)
        a_halves.append(halves_of(of_a * before_token(g, log_decay)))
        store_halves(of_b * since_token(g), b_high[j], b_low[j])
    (A,) = products(
        [
            (x, transposed(y[j]))
            for j, (a_high, a_low) in enumerate(a_halves)
            for x, y in ((a_high, b_high), (a_low, b_high), (a_high, b_low))
        ]
    )
    return A


__all__ = ["inverses", "invert"]
