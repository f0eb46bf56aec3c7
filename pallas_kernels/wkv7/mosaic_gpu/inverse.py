"""Kernel 1 of 4: the triangular inverse of every chunk."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wkv7.mosaic_gpu.chunk import (
    CONSTANTS_ROWS,
    LOG2E,
    Plan,
    chunk_of,
    constants,
    decays_from_middle,
    load_masks,
)
from pallas_kernels.wkv7.mosaic_gpu.tiles import (
    TILE,
    keep,
    load,
    products,
    row_and_column,
    split,
    tiles_smem,
    transposed,
)


def inverses(
    plan: Plan,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    bounds: tuple[jax.Array, ...],
) -> jax.Array:
    """`X = (I - A_ab)^-1` of every chunk, `[B, H, chunks, 64, 64]` bfloat16.

        A_ab[i, j] = sum_c a[i, c] exp(sum of log_decay over j < t < i) b[j, c]    for j < i

    X grows from the identity by merging the inverses of diagonal blocks of s rows to those of 2 s,
    `X <- X + mask_s(X A X)`, where the mask keeps the lower left quarter of each larger block.
    Every intermediate is part of the true inverse, also when tokens repeat and powers of A would be
    huge, so operands of 16 bits lose little. A step of Newton's method with an A of twice the
    digits, `X <- X + (I - X (I - A)) X`, removes that loss.

    The result is rounded to 16 bits in such a way that the errors E are those of a product with
    `I + E`: `X <- round(X + (round(X) - X) X)`. X takes away what neighbouring tokens have in
    common; errors of each entry by itself would not, and add up where tokens repeat.

    One block per multiprocessor; each of its warpgroups takes every n-th chunk, and loads the next
    while it works on one.
    """
    B, T, H, K = a.shape
    chunks, blocks = plan.chunks(T), K // TILE
    total = B * H * chunks
    warpgroups = plan.inverting_warpgroups
    workers = min(plan.multiprocessors, -(-total // warpgroups)) * warpgroups
    stages = plan.slots(3 * blocks * warpgroups, others=1, most=2)
    product = functools.partial(products, interpret=plan.interpret)

    def body(
        w_gmem, a_gmem, b_gmem, constants_gmem, *rest,
        w_smem, a_smem, b_smem, constants_smem, constants_loaded, loaded,
    ):  # fmt: skip
        *bounds_gmem, x_gmem = rest
        warpgroup = jax.lax.axis_index("warpgroup")
        first = jax.lax.axis_index("block") * warpgroups + warpgroup
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

        def invert(step, _):
            slot = slot_of(step)
            plgpu.barrier_wait(loaded.at[slot])
            if stages > 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the slot before has been written
                pl.when(step + 1 < count)(lambda: fetch(step + 1))
            place = position(step)
            w, a, b = ([tile.at[slot] for tile in x] for x in (w_smem, a_smem, b_smem))
            a_in = []
            for j in range(blocks):
                g = decays_from_middle(product, w[j], constants_smem.at[:TILE])
                before_token = jnp.exp2(g - load(w[j]).astype(jnp.float32) * LOG2E)
                a_in.append((load(a[j]) * before_token).astype(jnp.bfloat16))
                b[j][...] = (load(b[j]) * jnp.exp2(-g)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            (A,) = product([(a_in[j], transposed(b[j])) for j in range(blocks)])
            A = keep(load_masks(bounds_gmem, *place[:2]).lower(strictly=True), A)

            X_smem, A_high, A_low = b[0], a[0], w[0]
            split(A, A_high, A_low)
            row, column = row_and_column()
            X = jnp.where(row == column, 1.0, jnp.where((row ^ 1) == column, A, 0.0))
            X = jax.lax.optimization_barrier(X).astype(jnp.bfloat16)
            size = 2
            while size < TILE:
                X_smem[...] = X
                plgpu.commit_smem()
                (XA,) = product([(X, A_high)])
                (XAX,) = product([(XA.astype(jnp.bfloat16), X_smem)])
                row, column = row_and_column()
                # The halves of a block of 2 size differ in this bit, and agree in those above.
                meets = (row & (TILE - size)) == ((column & (TILE - size)) ^ size)
                X += keep(meets, XAX).astype(jnp.bfloat16)
                size *= 2
            X_smem[...] = X
            plgpu.commit_smem()
            row, column = row_and_column()
            of_identity = jnp.where(row == column, 1.0, 0.0) - X.astype(jnp.float32)
            (error,) = product([(X, A_high), (X, A_low)], start=[of_identity])
            (X_exact,) = product(
                [(error.astype(jnp.bfloat16), X_smem)], start=[X.astype(jnp.float32)]
            )
            X = X_exact.astype(jnp.bfloat16)
            X_smem[...] = X
            plgpu.commit_smem()
            rounding = (X.astype(jnp.float32) - X_exact).astype(jnp.bfloat16)
            (X_shaped,) = product([(rounding, X_smem)], start=[X_exact])
            X_smem[...] = X_shaped.astype(jnp.bfloat16)
            plgpu.commit_smem()
            row, chunk, head = place
            plgpu.copy_smem_to_gmem(X_smem, x_gmem.at[row, head, chunk])
            if stages == 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(step + 1 < count)(lambda: fetch(step + 1))

        pl.when(count > 0)(lambda: fetch(jnp.int32(0)))

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(constants_gmem, constants_smem, constants_loaded.at[0])
            plgpu.barrier_wait(constants_loaded.at[0])
            for other in range(1, warpgroups):
                plgpu.barrier_arrive(constants_loaded.at[other])

        pl.when(warpgroup > 0)(lambda: plgpu.barrier_wait(constants_loaded.at[warpgroup]))
        jax.lax.fori_loop(0, count, invert, None)
        plgpu.wait_smem_to_gmem(0)

    slots = stages * warpgroups
    kernel = plan.kernel(
        body,
        name="wkv7_inverses",
        out_type=jax.ShapeDtypeStruct((B, H, chunks, TILE, TILE), jnp.bfloat16),
        grid={"block": workers // warpgroups},
        warpgroups=warpgroups,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "wab"},
            constants_smem=tiles_smem(rows=CONSTANTS_ROWS),
            constants_loaded=plgpu.Barrier(num_barriers=warpgroups),
            loaded=plgpu.Barrier(num_arrivals=3 * blocks, num_barriers=slots),
        ),
    )
    return kernel(log_decay, a, b, constants(log_decay.dtype), *bounds)
