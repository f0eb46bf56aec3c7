"""Kernel 3 of 4: gradients of the states, in one walk over the chunks from last to first."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TILE
from pallas_kernels.wkv7.mosaic_gpu.chunk import (
    CONSTANTS_ROWS,
    Plan,
    before_token,
    chunk_of,
    constants,
    decays_of_chunk,
    load_masks,
    since_token,
    state_tile_of,
    until_token,
    values_tile_of,
)
from pallas_kernels.wkv7.mosaic_gpu.registers import halves_of, narrow, store, widen
from pallas_kernels.wkv7.mosaic_gpu.state import (
    entered_state_backward,
    grid_place,
    left_state_backward,
    load_state,
    store_state,
)
from pallas_kernels.wkv7.mosaic_gpu.tiles import load, load32, tiles_smem, transposed
from pallas_kernels.wkv7.mosaic_gpu.walk import Chunk, advance, solve

_CARRY, _STORE = 2, 3  # the warpgroups, after two that prepare


def state_gradients(
    plan: Plan,
    inputs: tuple[jax.Array, ...],
    X: jax.Array,
    do: jax.Array,
    d_final: jax.Array,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the states between chunks, of the initial states, and of `W = a^ S^ + A_ak V`.

    Four warpgroups; chunks travel through slots of shared memory as in `forward`:

        PREPARE:  b^, r^, a^,  X^T b^,  X^T (A_rb^T dO)
        CARRY:    dW = X^T dU = X^T (A_rb^T dO) + (X^T b^) dS^,
                  dS = (dS^ + r^^T dO + a^^T dW) exp(m), the only chain
        STORE:    dS^ and dW to global memory

    where `dS^ = dS1 exp(gL - m)`, dS1 the gradient of the state that leaves the chunk.

    Args:
      plan: how to compile.
      inputs: r, log_decay, a, b, `[B, T, H, K]` bfloat16, T a multiple of 64.
      X: of `inverses`.
      do: `[B, T, H, V]` bfloat16.
      d_final: `[B, N, H, V, K]` float32, gradients of the final states.
      bounds: as for `forward.outputs`.
      transfers: likewise.

    Returns:
      The exits dS^, `[B, H, chunks, V, K]` bfloat16; dW, `[B, H, chunks, 64, V]` bfloat16; the
      gradient of the initial states, like `d_final`, with transfers only defined for states that
      were loaded.
    """
    r = inputs[0]
    B, T, H, K = r.shape
    V = do.shape[-1]
    chunks, blocks = plan.chunks(T), K // TILE
    slots = plan.slots(4 * blocks + 2, others=2 + blocks, most=3)

    def body(
        r_gmem, w_gmem, a_gmem, b_gmem, x_gmem, do_gmem, d_final_gmem, constants_gmem, *rest,
        r_smem, w_smem, a_smem, b_smem, x_smem, do_smem, A_smem, low_smem,
        factors_smem, constants_smem,
        constants_loaded, loaded_first, loaded, solved, carried,
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
            first, then = (x.at[loading(step)] for x in (loaded_first, loaded))

            def copy(gmem, smem, barrier):
                for j in range(blocks):
                    source = chunk_of(gmem, row, chunk, head, j)
                    plgpu.copy_gmem_to_smem(source, smem[j].at[slot], barrier)

            for gmem, smem in ((w_gmem, w_smem), (b_gmem, b_smem), (r_gmem, r_smem)):
                copy(gmem, smem, first)
            copy(a_gmem, a_smem, then)
            X, do = x_gmem.at[row, head, chunk], chunk_of(do_gmem, row, chunk, head, part)
            plgpu.copy_gmem_to_smem(X, x_smem.at[slot], then)
            plgpu.copy_gmem_to_smem(do, do_smem.at[slot], then)

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
                before=[factors.at[slot, 0] for factors in factors_smem],
                after=[factors.at[slot, 1] for factors in factors_smem],
            )

        def prepare(turn, _):
            step = 2 * turn + warpgroup
            slot = slot_of(step)
            t, masks = tiles_of(slot), load_masks(bounds_gmem, row, chunk_at(step))
            plgpu.barrier_wait(loaded_first.at[loading(step)])
            for j in range(blocks):
                b, w, r, a = t.x[j], t.low[j], t.y[j], t.z[j]
                of_w, of_b, of_r = load(w), load(b), load(r)
                g, after, before = decays_of_chunk(w, constants_smem)
                high, low = halves_of(widen(of_b) * since_token(g))
                of_r = narrow(widen(of_r) * (until_token(g) * plan.scale))
                until_before = before_token(g, of_w)
                store((b, high), (w, low), (r, of_r))
                t.after[j][...], t.before[j][...] = after, before
                if j == 0:
                    plgpu.barrier_wait(loaded.at[loading(step)])
                store((a, masks.entered(narrow(load32(a) * until_before))))
            selections = [(masks.leaving, [*t.x, *t.low]), (masks.entered, t.y)] if bounds else []
            solve(t, transposed(t.X), masks.upper, A_smem.at[warpgroup], selections)
            plgpu.barrier_arrive(solved.at[slot])

        def carry(step, d_state):
            slot, chunk = slot_of(step), chunk_at(step)
            plgpu.barrier_wait(solved.at[slot])
            if transfers:
                d_state = left_state_backward(
                    d_state, d_final_gmem, transfers_gmem[1], place, chunk
                )
            masks = load_masks(bounds_gmem, row, chunk)
            d_state = advance(tiles_of(slot), d_state, masks, low_smem)
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
                plgpu.copy_smem_to_gmem(t.low[j], exit_)
            plgpu.copy_smem_to_gmem(t.X, values_tile_of(dw_gmem, row, head, chunk, part))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # so that the slot has been read before it is written
            pl.when(step + slots < chunks)(lambda: fetch(step + slots))

        @pl.when(warpgroup < _CARRY)
        def _():
            plgpu.barrier_wait(constants_loaded)
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
            plgpu.copy_gmem_to_smem(constants_gmem, constants_smem, constants_loaded)
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
    kernel = plan.kernel(
        body,
        name="wkv7_state_gradients",
        out_type=types,
        grid={"part": V // TILE, "head": H, "row": B},
        warpgroups=4,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "rwab"},
            x_smem=tiles_smem(slots),
            do_smem=tiles_smem(slots),
            A_smem=tiles_smem(2),
            low_smem=[tiles_smem()] * blocks,
            factors_smem=[plgpu.SMEM((slots, 2, TILE), jnp.float32)] * blocks,
            constants_smem=tiles_smem(rows=CONSTANTS_ROWS),
            constants_loaded=plgpu.Barrier(),
            loaded_first=plgpu.Barrier(num_arrivals=3 * blocks, num_barriers=2 * slots),
            loaded=plgpu.Barrier(num_arrivals=blocks + 2, num_barriers=2 * slots),
            solved=barrier,
            carried=barrier,
        ),
    )
    return kernel(*inputs, X, do, d_final, constants(), *bounds, *transfers)
