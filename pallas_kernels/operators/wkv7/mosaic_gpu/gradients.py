"""Gradients of the inputs, each chunk in a block of its own."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.registers import TILE_LAYOUT, load, narrow, store
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    anew,
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
    state_tile_of,
    until_token,
    values_tile_of,
)

_SLOTS = 2  # one chunk is worked on while the next one is loaded
_ROWS, _COLUMNS = range(2)  # the warpgroups


class Tiles(NamedTuple):
    """A slot in shared memory: what is loaded of a chunk, and a tile for ROWS to write from."""

    r: Any
    w: Any
    k: Any
    a: Any
    b: Any
    v: Any
    do: Any
    u: Any
    dw: Any
    s: Any
    ds: Any
    rows: Any


def input_gradients(
    target: Target,
    inputs: tuple[jax.Array, ...],
    do: jax.Array,
    entries: jax.Array,
    U: jax.Array,
    exits: jax.Array,
    dW: jax.Array,
    bounds: tuple[jax.Array, ...],
    *,
    scale: float,
) -> tuple[jax.Array, ...]:
    """Gradients of r, log_decay, k, v, a, b, given what the two walks have computed.

    With everything decayed to the middle of the chunk, as in `chunk`, and the matrices A masked:

        dA_rk = dO V^T    dA_rb = dO U^T           dA_ak = dW V^T                  dA_ab = dW U^T
        dr^  = dO S^^T + dA_rk k^ + dA_rb b^       da^ = dW S^^T + dA_ak k^ + dA_ab b^
        dk^  = V dS^^T + dA_rk^T r^ + dA_ak^T a^   db^ = U dS^^T + dA_rb^T r^ + dA_ab^T a^
        dV   = k^ dS^ + A_rk^T dO + A_ak^T dW

    The log decay of token j takes part in `r^_i` and `a^_i` of later tokens, in `k^_i` and `b^_i`
    of earlier ones, and in the state S1 that leaves the chunk:

        dw_j = sum_{i >= j} (r^ dr^ - k^ dk^ - b^ db^)_i + sum_{i > j} (a^ da^)_i + sum_V S1 dS1

    One block per multiprocessor takes every n-th of the chunks, heads, 64 channels and 64 values.
    Of its warpgroups ROWS does what has a row for each reading token, dr, da, and their part in dw
    with that of S1; COLUMNS does dk, db and dV, and adds up dw. Each decays its own inputs.

    Args:
      target: what the kernel is compiled for.
      inputs: r, log_decay, k, v, a, b, `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      do: `[B, T, H, V]` bfloat16.
      entries: S^ of `forward.outputs`.
      U: of `forward.outputs`.
      exits: dS^ of `backward.state_gradients`.
      dW: of `backward.state_gradients`.
      bounds: as for `forward.outputs`.
      scale: factor on the outputs.

    Returns:
      dr, dlog_decay, dk, dv, da, db in bfloat16, like the inputs.
    """
    r, _, _, v, _, _ = inputs
    B, T, H, K = r.shape
    chunks, blocks, parts = number_of_chunks(T), K // TILE, v.shape[-1] // TILE
    sizes = {"block": blocks, "part": parts, "head": H, "chunk": chunks, "row": B}
    total = math.prod(sizes.values())
    workers = min(target.multiprocessors, total)

    def body(
        r_gmem, w_gmem, k_gmem, v_gmem, a_gmem, b_gmem, do_gmem, s_gmem, u_gmem, ds_gmem, dw_gmem,
        sums_gmem, *rest,
        tiles_smem, rows_smem, columns_smem, sums_smem,
        sums_loaded, inputs_loaded, others_loaded, decayed, summed,
    ):  # fmt: skip
        bounds_gmem, gradients_gmem = rest[: len(bounds)], rest[len(bounds) :]
        dr_gmem, d_log_decay_gmem, dk_gmem, dv_gmem, da_gmem, db_gmem = gradients_gmem
        warpgroup = jax.lax.axis_index("warpgroup")
        first = jax.lax.axis_index("multiprocessor")
        count = jax.lax.div(total - 1 - first + workers, workers)

        def slot_of(step):
            return jax.lax.rem(step, jnp.int32(_SLOTS))

        def tiles_at(step):
            slot = anew(slot_of(step))
            return Tiles(*(tile.at[slot] for tile in tiles_smem))

        def place_of(step):
            index, place = first + step * workers, []
            for size in sizes.values():
                place.append(jax.lax.rem(index, jnp.int32(size)))
                index = jax.lax.div(index, jnp.int32(size))
            return place

        def fetch(step):
            block, part, head, chunk, row = place_of(step)
            t, slot = tiles_at(step), slot_of(step)
            for gmem, smem in (
                (w_gmem, t.w), (r_gmem, t.r), (a_gmem, t.a), (k_gmem, t.k), (b_gmem, t.b)
            ):  # fmt: skip
                source = chunk_of(gmem, row, chunk, head, block)
                plgpu.copy_gmem_to_smem(source, smem, inputs_loaded.at[slot])
            for source, smem in (
                (chunk_of(do_gmem, row, chunk, head, part), t.do),
                (chunk_of(v_gmem, row, chunk, head, part), t.v),
                (values_tile_of(u_gmem, row, head, chunk, part), t.u),
                (values_tile_of(dw_gmem, row, head, chunk, part), t.dw),
                (state_tile_of(s_gmem, row, head, chunk, part, block), t.s),
                (state_tile_of(ds_gmem, row, head, chunk, part, block), t.ds),
            ):
                plgpu.copy_gmem_to_smem(source, smem, others_loaded.at[slot])

        def operand(tile):
            """A first operand of several products, in registers unless masks need those."""
            return tile if bounds else load(tile)

        def write(smem, gradient, gmem):
            """Writes a tile to global memory through one of two, in turn."""
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            store((smem, narrow(gradient)))
            plgpu.copy_smem_to_gmem(smem, gmem)

        def sums(mask, terms, start):
            """Adds up what two tiles hold together, with ones where the mask keeps them."""
            (ones,) = mask(plgpu.layout_cast(jnp.ones((TILE, TILE), jnp.bfloat16), TILE_LAYOUT))
            (total,) = products([(ones, half) for half in terms], start=[start])
            return total

        def context(step):
            """Where the gradients of a chunk are written, and its masks, loaded when needed."""
            block, part, head, chunk, row = place_of(step)

            def of_input(gmem):
                return chunk_of(gmem.at[part], row, chunk, head, block)

            dv = chunk_of(dv_gmem.at[block], row, chunk, head, part)
            return of_input, dv, lambda: load_masks(bounds_gmem, row, chunk)

        def rows(step, _):
            of_input, _, masks = context(step)
            slot, t = slot_of(step), tiles_at(step)
            plgpu.barrier_wait(inputs_loaded.at[slot])
            g = decays_from_middle(t.w, sums_smem)
            of_r = narrow(load32(t.r) * (until_token(g) * scale))
            store((t.r, of_r), (t.a, narrow(load32(t.a) * before_token(g, t.w))))
            plgpu.barrier_arrive(decayed)

            t = tiles_at(step)
            plgpu.barrier_wait(others_loaded.at[slot])
            do, dw = operand(t.do), operand(t.dw)
            found = products(*([(x, transposed(y))] for x in (do, dw) for y in (t.v, t.u)))
            dA_rk, dA_rb, dA_ak, dA_ab = map(narrow, found)
            dA_rk, dA_rb = masks().lower(dA_rk, dA_rb)
            dA_ak, dA_ab = masks().lower(dA_ak, dA_ab, strictly=True)
            plgpu.barrier_wait(decayed)
            dr, da = products(
                [(masks().entered(do), t.s), (dA_rk, t.k), (dA_rb, t.b)],
                [(masks().entered(dw), t.s), (dA_ak, t.k), (dA_ab, t.b)],
            )

            t = tiles_at(step)
            g = decays_from_middle(t.w, sums_smem)  # registers are too few to keep it
            write(t.rows, dr * (until_token(g) * scale), of_input(dr_gmem))
            write(rows_smem, da * before_token(g, t.w), of_input(da_gmem))
            exclusive = load32(t.a) * da
            inclusive = load32(t.r) * dr + exclusive

            t = tiles_at(step)
            state, V, U = masks().passing(load32(t.s)), t.v, t.u
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            if bounds:
                store((t.rows, masks().leaving(load(V))), (t.s, masks().leaving(load(U))))
                V, U = t.rows, t.s
            (state,) = products([(transposed(V), t.k), (transposed(U), t.b)], start=[state])
            of_state = state * load32(t.ds)
            terms = t.rows, t.s
            total = sums(masks().upper, store_halves(inclusive, *terms), -exclusive)
            total = sums(lambda x: [masks().leaving(x)], store_halves(of_state, *terms), total)
            store_halves(total, *terms)
            plgpu.barrier_arrive(summed)

        def decay_columns(step):
            t = tiles_at(step)
            plgpu.barrier_wait(inputs_loaded.at[slot_of(step)])
            since = since_token(decays_from_middle(t.w, sums_smem))
            k, b = (narrow(load32(x) * since) for x in (t.k, t.b))
            store((t.k, k), (t.b, b))
            plgpu.barrier_arrive(decayed)

        def columns(step, _):
            of_input, dv_gmem, masks = context(step)
            # The other slot is free: ROWS was done with it before the last sums of the step before.
            pl.when(step + 1 < count)(lambda: fetch(step + 1))
            plgpu.barrier_wait(others_loaded.at[slot_of(step)])
            t = tiles_at(step)
            v, u = operand(t.v), operand(t.u)
            found = products(*([(x, transposed(y))] for y in (t.do, t.dw) for x in (v, u)))
            dA_rk, dA_rb, dA_ak, dA_ab = map(narrow, found)  # transposed
            dA_rk, dA_rb = masks().upper(dA_rk, dA_rb)
            dA_ak, dA_ab = masks().upper(dA_ak, dA_ab, strictly=True)
            plgpu.barrier_wait(decayed)
            dk, db = products(
                [(masks().leaving(v), t.ds), (dA_rk, t.r), (dA_ak, t.a)],
                [(masks().leaving(u), t.ds), (dA_rb, t.r), (dA_ab, t.a)],
            )

            t = tiles_at(step)
            since = since_token(decays_from_middle(t.w, sums_smem))
            write(columns_smem.at[0], dk * since, of_input(dk_gmem))
            write(columns_smem.at[1], db * since, of_input(db_gmem))
            inclusive = load32(t.k) * dk + load32(t.b) * db

            t = tiles_at(step)
            k = operand(t.k)
            A_rk, A_ak = products([(k, transposed(t.r))], [(k, transposed(t.a))])
            (A_rk,) = masks().upper(narrow(A_rk))
            (A_ak,) = masks().upper(narrow(A_ak), strictly=True)
            (dv,) = products([(masks().leaving(k), transposed(t.ds)), (A_rk, t.do), (A_ak, t.dw)])
            write(columns_smem.at[0], dv, dv_gmem)

            # Of the next chunk, so that ROWS need not wait for it.
            pl.when(step + 1 < count)(lambda: decay_columns(step + 1))
            t = tiles_at(step)
            plgpu.barrier_wait(summed)
            of_rows = load32(t.rows) + load32(t.s)
            total = sums(masks().upper, store_halves(-inclusive, t.v, t.u), of_rows)
            write(columns_smem.at[1], total, of_input(d_log_decay_gmem))

        @pl.when(warpgroup == _ROWS)
        def _():
            plgpu.barrier_wait(sums_loaded)
            jax.lax.fori_loop(0, count, rows, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == _COLUMNS)
        def _():
            plgpu.copy_gmem_to_smem(sums_gmem, sums_smem, sums_loaded)
            fetch(jnp.int32(0))
            plgpu.barrier_wait(sums_loaded)
            decay_columns(jnp.int32(0))
            jax.lax.fori_loop(0, count, columns, None)
            plgpu.wait_smem_to_gmem(0)

    def parts_of(x):
        parts_of_sum = blocks if x is v else parts
        return jax.ShapeDtypeStruct((parts_of_sum, *x.shape), jnp.bfloat16)

    kernel = target.kernel(
        body,
        name="wkv7_input_gradients",
        out_type=tuple(map(parts_of, inputs)),
        grid={"multiprocessor": workers},
        warpgroups=2,
        scratch_types={
            "tiles_smem": Tiles(*[tiles_smem(_SLOTS)] * len(Tiles._fields)),
            "rows_smem": tiles_smem(),
            "columns_smem": tiles_smem(2),
            "sums_smem": tiles_smem(),
            "sums_loaded": plgpu.Barrier(),
            "inputs_loaded": plgpu.Barrier(num_arrivals=5, num_barriers=_SLOTS),
            "others_loaded": plgpu.Barrier(num_arrivals=6, num_barriers=_SLOTS),
            "decayed": plgpu.Barrier(num_arrivals=2),
            "summed": plgpu.Barrier(),
        },
    )

    def sum_parts(x):
        return x[0] if len(x) == 1 else jnp.sum(x.astype(jnp.float32), axis=0).astype(x.dtype)

    gradients = kernel(*inputs, do, entries, U, exits, dW, prefix_sums(), *bounds)
    return tuple(map(sum_parts, gradients))
