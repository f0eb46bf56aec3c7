"""Gradients of the states, in one walk over the chunks from last to first."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import grid_place
from pallas_kernels.hopper.registers import Strip, halves_of, narrow, store, store_strips
from pallas_kernels.hopper.ring import slots_that_fit
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import TILE_BYTES, anew, load32, tiles_smem, transposed
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import (
    before_token,
    chunk_of,
    decays_from_middle,
    for_each_strip,
    load_masks,
    number_of_chunks,
    prefix_sums,
    since_token,
    state_tile_of,
    store_decays_of_chunk,
    until_token,
    values_tile_of,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.state import (
    entered_state_backward,
    left_state_backward,
    load_state,
    store_state,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.walk import Chunk, advance, solve

_CARRY, _STORE = 2, 3  # the warpgroups, after two that prepare


def state_gradients(
    target: Target,
    inputs: tuple[jax.Array, ...],
    X: jax.Array,
    do: jax.Array,
    d_final: jax.Array,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the states between chunks, of the initial states, and of `W = a^ S^ + A_ak V`.

    Four warpgroups; chunks travel through slots of shared memory as in `forward`:

        PREPARE:  b^, r^, a^,  X^T b^,  X^T A_rb^T
        CARRY:    dW = X^T dU = (X^T A_rb^T) dO + (X^T b^) dS^,
                  dS = (dS^ + r^^T dO + a^^T dW) exp(m), the only chain
        STORE:    dS^ and dW to global memory

    where `dS^ = dS1 exp(gL - m)`, dS1 the gradient of the state that leaves the chunk.

    Args:
      target: what the kernel is compiled for.
      inputs: r, log_decay, a, b, `[B, T, H, K]` bfloat16, T a multiple of 64.
      X: of `inverses`.
      do: `[B, T, H, V]` bfloat16.
      d_final: `[B, N, H, V, K]` float32, gradients of the final states.
      bounds: as for `forward.outputs`.
      transfers: likewise.
      scale: factor on the outputs.

    Returns:
      The exits dS^, `[B, H, chunks, V, K]` bfloat16; dW, `[B, H, chunks, 64, V]` bfloat16; the
      gradient of the initial states, like `d_final`, with transfers only defined for states that
      were loaded.
    """
    r = inputs[0]
    B, T, H, K = r.shape
    V = do.shape[-1]
    chunks, blocks = number_of_chunks(T), K // TILE
    slots = slots_that_fit((4 * blocks + 2) * TILE_BYTES, others=(3 + blocks) * TILE_BYTES, most=3)

    def body(
        r_gmem, w_gmem, a_gmem, b_gmem, x_gmem, do_gmem, d_final_gmem, sums_gmem, *rest,
        r_smem, w_smem, a_smem, b_smem, x_smem, do_smem, A_smem, low_smem,
        factors_smem, sums_smem,
        sums_loaded, loaded, solved, carried,
    ):  # fmt: skip
        bounds_gmem, rest = rest[: len(bounds)], rest[len(bounds) :]
        transfers_gmem, rest = rest[: len(transfers)], rest[len(transfers) :]
        exits_gmem, dw_gmem, d_initial_gmem = rest
        place = row, head, part = grid_place()
        warpgroup = jax.lax.axis_index("warpgroup")

        def slot_of(step):
            return jax.lax.rem(step, jnp.int32(slots))

        def loading(step):
            """The barriers of a slot are two, since a warpgroup that waits must do so each time."""
            return jax.lax.rem(step, jnp.int32(2 * slots))

        def chunk_at(step):
            return chunks - 1 - step

        def fetch(step):
            slot, chunk = slot_of(step), chunk_at(step)
            barrier = loaded.at[loading(step)]

            def copy(gmem, smem):
                for j in range(blocks):
                    source = chunk_of(gmem, row, chunk, head, j)
                    plgpu.copy_gmem_to_smem(source, smem[j].at[slot], barrier)

            for gmem, smem in (
                (w_gmem, w_smem), (b_gmem, b_smem), (r_gmem, r_smem), (a_gmem, a_smem)
            ):  # fmt: skip
                copy(gmem, smem)
            X, do = x_gmem.at[row, head, chunk], chunk_of(do_gmem, row, chunk, head, part)
            plgpu.copy_gmem_to_smem(X, x_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(do, do_smem.at[slot], barrier)

        def tiles_of(slot):
            def at(tiles):
                return [tile.at[slot] for tile in tiles]

            return Chunk(
                x=at(b_smem),
                low=at(w_smem),
                y=at(r_smem),
                z=at(a_smem),
                Y=do_smem.at[slot],
                X=x_smem.at[slot],
                U=w_smem[0].at[slot],
                before=[factors.at[slot, 0] for factors in factors_smem],
                after=[factors.at[slot, 1] for factors in factors_smem],
            )

        def prepare(turn, _):
            step = 2 * turn + warpgroup
            slot = slot_of(step)
            t, masks = tiles_of(slot), load_masks(bounds_gmem, row, chunk_at(step))
            plgpu.barrier_wait(loaded.at[loading(step)])
            for j in range(blocks):

                def decay(strip, j=j):
                    t = tiles_of(anew(slot))
                    w, b, r, a = (Strip(x[j], strip) for x in (t.low, t.x, t.y, t.z))
                    g = decays_from_middle(w, sums_smem)
                    store_decays_of_chunk(w, g, t.after[j], t.before[j])
                    high, low = halves_of(load32(b) * since_token(g))
                    of_r = narrow(load32(r) * (until_token(g) * scale))
                    of_a = masks.entered(narrow(load32(a) * before_token(g, w)))
                    values = ((t.x[j], high), (t.low[j], low), (t.y[j], of_r), (t.z[j], of_a))
                    store_strips(strip, *values)

                for_each_strip(decay)
            selections = [(masks.leaving, [*t.x, *t.low]), (masks.entered, t.y)] if bounds else []
            A_tiles = A_smem.at[warpgroup], t.x[0]
            store((t.X, solve(t, transposed(t.X), masks.upper, selections, A_tiles)))
            plgpu.barrier_arrive(solved.at[slot])

        def carry(step, d_state):
            slot, chunk = slot_of(step), chunk_at(step)
            plgpu.barrier_wait(solved.at[slot])
            if transfers:
                d_state = left_state_backward(
                    d_state, d_final_gmem, transfers_gmem[1], place, chunk
                )
            masks = load_masks(bounds_gmem, row, chunk)
            t = tiles_of(slot)
            d_state = advance(t, d_state, masks, low_smem, t.X)
            plgpu.barrier_arrive(carried.at[slot])
            if transfers:
                d_state = entered_state_backward(
                    d_state, d_initial_gmem, transfers_gmem[0], place, chunk
                )
            return d_state

        def write_out(step, _):
            slot, chunk = slot_of(step), chunk_at(step)
            plgpu.barrier_wait(carried.at[slot])
            t = tiles_of(slot)
            for j in range(blocks):
                exit_ = state_tile_of(exits_gmem, row, head, chunk, part, j)
                plgpu.copy_smem_to_gmem(t.x[j], exit_)
            plgpu.copy_smem_to_gmem(t.U, values_tile_of(dw_gmem, row, head, chunk, part))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # so that the slot has been read before it is written
            pl.when(step + slots < chunks)(lambda: fetch(step + slots))

        @pl.when(warpgroup < _CARRY)
        def _():
            plgpu.barrier_wait(sums_loaded)
            turns = jax.lax.div(chunks + 1 - warpgroup, jnp.int32(2))
            jax.lax.fori_loop(0, turns, prepare, None)

        @pl.when(warpgroup == _CARRY)
        def _():
            d_state = load_state(d_final_gmem, jnp.int32(0), place)
            if transfers:  # each segment's comes with its last chunk
                d_state = tuple(jnp.zeros_like(x) for x in d_state)
            d_state = jax.lax.fori_loop(0, chunks, carry, d_state)
            if not transfers:
                store_state(d_state, d_initial_gmem, jnp.int32(0), place)

        @pl.when(warpgroup == _STORE)
        def _():
            plgpu.copy_gmem_to_smem(sums_gmem, sums_smem, sums_loaded)
            for step in range(min(slots, chunks)):
                fetch(jnp.int32(step))
            jax.lax.fori_loop(0, chunks, write_out, None)
            plgpu.wait_smem_to_gmem(0)

    types = (
        jax.ShapeDtypeStruct((B, H, chunks, V, K), jnp.bfloat16),
        jax.ShapeDtypeStruct((B, H, chunks, TILE, V), jnp.bfloat16),
        jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
    )
    barrier = plgpu.Barrier(num_barriers=slots)
    kernel = target.kernel(
        body,
        name="wkv7_state_gradients",
        out_type=types,
        grid={"value_block": V // TILE, "head": H, "row": B},
        warpgroups=4,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "rwab"},
            x_smem=tiles_smem(slots),
            do_smem=tiles_smem(slots),
            A_smem=tiles_smem(2),
            low_smem=[tiles_smem()] * blocks,
            factors_smem=[plgpu.SMEM((slots, 2, TILE), jnp.float32)] * blocks,
            sums_smem=tiles_smem(),
            sums_loaded=plgpu.Barrier(),
            loaded=plgpu.Barrier(num_arrivals=4 * blocks + 2, num_barriers=2 * slots),
            solved=barrier,
            carried=barrier,
        ),
    )
    return kernel(*inputs, X, do, d_final, prefix_sums(), *bounds, *transfers)
