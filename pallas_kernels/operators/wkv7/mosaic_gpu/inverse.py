"""The triangular inverse of every chunk: within other kernels, or by one of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.registers import (
    halves_of,
    narrow,
    store,
    widen,
    with_diagonal,
)
from pallas_kernels.hopper.ring import slots_that_fit
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
    chunk_of,
    decays_from_middle,
    load_masks,
    number_of_chunks,
    prefix_sums,
    since_token,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.diagonal import invert_diagonal

_WARPGROUPS = 4


def invert(A_high: jax.Array, A_low: jax.Array, first: Any, second: Any, X_smem: Any) -> None:
    """Writes `(I - A)^-1` to X_smem.

    The inverses of blocks of 4 rows, then 16, then all 64 come from those before by `Y + N^2 Y`, as
    `diagonal` explains: each warp does the first two in its registers, all of them together the
    last. So far operands have 16 bits. A step of Newton's method with an A of twice the digits,
    `X <- X + (I - X (I - A)) X`, removes what that has lost.

    The result is rounded to 16 bits in such a way that the errors E are those of a product with
    `I + E`: `X <- round(X + (round(X) - X) X)`. X takes away what neighbouring tokens have in
    common; errors of each entry by itself would not, and add up where tokens repeat.

    Args:
      A_high: `[64, 64]` bfloat16 in registers, strictly lower triangular: the larger half of A.
      A_low: likewise, the smaller half.
      first: a tile for intermediate results.
      second: another one.
      X_smem: a third one, for the result.
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
    rounding = narrow(widen(narrow(X_exact)) - X_exact)
    (X_shaped,) = products([(rounding, X_smem)], start=[X_exact])
    store((X_smem, narrow(X_shaped)))


def inverses(
    target: Target,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    bounds: tuple[jax.Array, ...],
) -> jax.Array:
    """`X = (I - A_ab)^-1` of every chunk, `[B, H, chunks, 64, 64]` bfloat16.

        A_ab[i, j] = sum_c a[i, c] exp(sum of log_decay over j < t < i) b[j, c]    for j < i

    One block per multiprocessor; each of its warpgroups takes every n-th chunk, and loads the next
    while it works on one.
    """
    B, T, H, K = a.shape
    chunks, blocks = number_of_chunks(T), K // TILE
    total = B * H * chunks
    workers = min(target.multiprocessors, -(-total // _WARPGROUPS)) * _WARPGROUPS
    stages = slots_that_fit(3 * blocks * _WARPGROUPS * TILE_BYTES, others=TILE_BYTES, most=2)

    def body(
        w_gmem, a_gmem, b_gmem, sums_gmem, *rest,
        w_smem, a_smem, b_smem, sums_smem, sums_loaded, loaded,
    ):  # fmt: skip
        *bounds_gmem, x_gmem = rest
        warpgroup = jax.lax.axis_index("warpgroup")
        first = jax.lax.axis_index("block") * _WARPGROUPS + warpgroup
        count = jax.lax.div(total - 1 - first + workers, workers)

        def position(step):
            index = first + step * workers
            head, index = jax.lax.rem(index, H), jax.lax.div(index, H)
            return jax.lax.div(index, chunks), jax.lax.rem(index, chunks), head

        def slot_of(step):
            return warpgroup * stages + jax.lax.rem(step, jnp.int32(stages))

        def fetch(step):
            slot = slot_of(step)
            row, chunk, head = position(step)
            for gmem, smem in ((w_gmem, w_smem), (a_gmem, a_smem), (b_gmem, b_smem)):
                for j in range(blocks):
                    source = chunk_of(gmem, row, chunk, head, j)
                    plgpu.copy_gmem_to_smem(source, smem[j].at[slot], loaded.at[slot])

        def invert_chunk(step, _):
            slot = slot_of(step)
            plgpu.barrier_wait(loaded.at[slot])
            if stages > 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the slot before has been written
                pl.when(step + 1 < count)(lambda: fetch(step + 1))
            place = position(step)
            w, a, b = ([tile.at[slot] for tile in x] for x in (w_smem, a_smem, b_smem))
            a_halves, b_high, b_low = [], b, w
            for j in range(blocks):
                of_a, of_b = load32(a[j]), load32(b[j])
                g = decays_from_middle(w[j], sums_smem)
                a_halves.append(halves_of(of_a * before_token(g, w[j])))
                store_halves(of_b * since_token(g), b_high[j], b_low[j])
            (A,) = products(
                [
                    (x, transposed(y[j]))
                    for j, (a_high, a_low) in enumerate(a_halves)
                    for x, y in ((a_high, b_high), (a_low, b_high), (a_high, b_low))
                ]
            )
            masks = load_masks(bounds_gmem, *place[:2])
            A_high, A_low = masks.lower(*halves_of(A), strictly=True)

            X_smem = b[0]
            invert(A_high, A_low, w[0], a[0], X_smem)
            row, chunk, head = place
            plgpu.copy_smem_to_gmem(X_smem, x_gmem.at[row, head, chunk])
            if stages == 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(step + 1 < count)(lambda: fetch(step + 1))

        pl.when(count > 0)(lambda: fetch(jnp.int32(0)))

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(sums_gmem, sums_smem, sums_loaded)

        plgpu.barrier_wait(sums_loaded)
        jax.lax.fori_loop(0, count, invert_chunk, None)
        plgpu.wait_smem_to_gmem(0)

    slots = stages * _WARPGROUPS
    kernel = target.kernel(
        body,
        name="wkv7_inverses",
        out_type=jax.ShapeDtypeStruct((B, H, chunks, TILE, TILE), jnp.bfloat16),
        grid={"block": workers // _WARPGROUPS},
        warpgroups=_WARPGROUPS,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "wab"},
            sums_smem=tiles_smem(),
            sums_loaded=plgpu.Barrier(),
            loaded=plgpu.Barrier(num_arrivals=3 * blocks, num_barriers=slots),
        ),
    )
    return kernel(log_decay, a, b, prefix_sums(), *bounds)
