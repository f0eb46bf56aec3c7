"""Kernel 3 of 4: gradients of the states, in one walk over the chunks from last to first."""

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
    decays_of_chunk,
    load_masks,
    state_tile_of,
)
from pallas_kernels.wkv7.mosaic_gpu.state import (
    advance,
    entered_state_backward,
    grid_place,
    left_state_backward,
    load_state,
    store_state,
)
from pallas_kernels.wkv7.mosaic_gpu.tiles import (
    TILE,
    keep,
    load,
    products,
    tiles_smem,
    transposed,
)

_PREPARE, _CARRY = range(2)  # the warpgroups


def state_gradients(
    plan: Plan,
    inputs: tuple[jax.Array, ...],
    X: jax.Array,
    do: jax.Array,
    d_final: jax.Array,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the states between chunks, and of the initial states.

    Two warpgroups; chunks travel through slots of shared memory as in `forward`:

        PREPARE, no state needed:   W1 = X a^,  dU0 = A_rb^T dO
        CARRY, the only chain:      dU = dU0 + b^ dS^,  dS = (dS^ + r^^T dO + W1^T dU) exp(m)

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
      The exits dS^, `[B, H, chunks, V, K]` bfloat16, and the gradient of the initial states, like
      `d_final`. With transfers it is only defined for states that were loaded.
    """
    r = inputs[0]
    B, T, H, K = r.shape
    V = do.shape[-1]
    chunks, blocks = plan.chunks(T), K // TILE
    extra = K != TILE
    slots = plan.slots(4 * blocks + 2 + extra, others=1, most=4)
    product = functools.partial(products, interpret=plan.interpret)

    def body(
        r_gmem, w_gmem, a_gmem, b_gmem, x_gmem, do_gmem, d_final_gmem, constants_gmem, *rest,
        r_smem, w_smem, a_smem, b_smem, x_smem, do_smem, extra_smem,
        before_smem, after_smem, constants_smem, constants_loaded, loaded, prepared,
    ):  # fmt: skip
        bounds_gmem, rest = rest[: len(bounds)], rest[len(bounds) :]
        transfers_gmem, (exits_gmem, d_initial_gmem) = rest[:-2], rest[-2:]
        place = row, head, part = grid_place()
        warpgroup = jax.lax.axis_index("warpgroup")

        def slot_of(step):
            return jax.lax.rem(step, jnp.int32(slots))

        def chunk_at(step):
            return chunks - 1 - step

        def fetch(step):
            slot, chunk = slot_of(step), chunk_at(step)

            def copy(source, smem):
                plgpu.copy_gmem_to_smem(source, smem.at[slot], loaded.at[slot])

            for gmem, smem in (
                (w_gmem, w_smem), (b_gmem, b_smem), (r_gmem, r_smem), (a_gmem, a_smem)
            ):  # fmt: skip
                for j in range(blocks):
                    copy(chunk_of(gmem, row, chunk, head, j), smem[j])
            copy(chunk_of(do_gmem, row, chunk, head, part), do_smem)
            copy(x_gmem.at[row, head, chunk], x_smem)

        def at(slot, tiles):
            return [tile.at[slot] for tile in tiles]

        def u_and_state(slot):
            if K == TILE:
                return w_smem[0].at[slot], [x_smem.at[slot]]
            return extra_smem[0].at[slot], at(slot, w_smem)

        def prepare(step, _):
            slot, chunk = slot_of(step), chunk_at(step)
            plgpu.barrier_wait(loaded.at[slot])
            masks = load_masks(bounds_gmem, row, chunk)
            r, w, a, b = (at(slot, x) for x in (r_smem, w_smem, a_smem, b_smem))
            do, X, du = do_smem.at[slot], x_smem.at[slot], u_and_state(slot)[0]
            r_read, b_written = [], []
            for j in range(blocks):
                g, after, before = decays_of_chunk(product, w[j], constants_smem)
                before_smem[j].at[slot][...], after_smem[j].at[slot][...] = before, after
                w_j = load(w[j]).astype(jnp.float32)
                a_in = (load(a[j]) * jnp.exp2(g - w_j * LOG2E)).astype(jnp.bfloat16)
                a[j][...] = masks.entered(a_in)
                b_written.append((load(b[j]) * jnp.exp2(-g)).astype(jnp.bfloat16))
                b[j][...] = masks.leaving(b_written[j])
                r_read.append((load(r[j]) * (jnp.exp2(g) * plan.scale)).astype(jnp.bfloat16))
                r[j][...] = r_read[j]
            plgpu.commit_smem()
            A_rb_transposed, *W1 = product(
                [(b_written[j], transposed(r[j])) for j in range(blocks)],
                *([(X, tile)] for tile in a),
            )
            A_rb_transposed = keep(masks.upper(), A_rb_transposed).astype(jnp.bfloat16)
            (du_from_o,) = product([(A_rb_transposed, do)])
            for j in range(blocks):
                a[j][...] = W1[j].astype(jnp.bfloat16)
                if bounds:
                    r[j][...] = masks.entered(r_read[j])
            du[...] = du_from_o.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(prepared.at[slot])

        def carry(step, d_state):
            slot, chunk = slot_of(step), chunk_at(step)
            plgpu.barrier_wait(prepared.at[slot])
            if transfers:
                d_state = left_state_backward(
                    d_state, d_final_gmem, transfers_gmem[1], place, chunk
                )
            du, exits = u_and_state(slot)
            d_state = advance(
                product,
                d_state,
                load_masks(bounds_gmem, row, chunk),
                before=at(slot, before_smem),
                after=at(slot, after_smem),
                R=at(slot, b_smem),
                P=at(slot, r_smem),
                Q=at(slot, a_smem),
                Y=do_smem.at[slot],
                U=du,
                U_written=du,
                state_smem=exits,
            )
            for j in range(blocks):
                plgpu.copy_smem_to_gmem(
                    exits[j], state_tile_of(exits_gmem, row, head, chunk, part, j)
                )
            if transfers:
                d_state = entered_state_backward(
                    d_state, d_initial_gmem, transfers_gmem[0], place, chunk
                )
            # The slot of the step before is free when what it holds has been written.
            plgpu.wait_smem_to_gmem(blocks, wait_read_only=True)
            refill = step - 1 + slots
            pl.when((step > 0) & (refill < chunks))(lambda: fetch(refill))
            return d_state

        @pl.when(warpgroup == _PREPARE)
        def _():
            plgpu.barrier_wait(constants_loaded)
            jax.lax.fori_loop(0, chunks, prepare, None)

        @pl.when(warpgroup == _CARRY)
        def _():
            plgpu.copy_gmem_to_smem(constants_gmem, constants_smem, constants_loaded)
            for step in range(min(slots, chunks)):
                fetch(jnp.int32(step))
            d_state = load_state(d_final_gmem, jnp.int32(0), place)
            if transfers:  # each segment's comes with its last chunk
                d_state = tuple(jnp.zeros_like(x) for x in d_state)
            d_state = jax.lax.fori_loop(0, chunks, carry, d_state)
            if not transfers:
                store_state(d_state, d_initial_gmem, jnp.int32(0), place)
            plgpu.wait_smem_to_gmem(0)

    kernel = plan.kernel(
        body,
        name="wkv7_state_gradients",
        out_type=(
            jax.ShapeDtypeStruct((B, H, chunks, V, K), jnp.bfloat16),
            jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        ),
        grid={"part": V // TILE, "head": H, "row": B},
        warpgroups=2,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "rwab"},
            x_smem=tiles_smem(slots),
            do_smem=tiles_smem(slots),
            extra_smem=[tiles_smem(slots)] * extra,
            before_smem=[plgpu.SMEM((slots, TILE), jnp.float32)] * blocks,
            after_smem=[plgpu.SMEM((slots, TILE), jnp.float32)] * blocks,
            constants_smem=tiles_smem(rows=CONSTANTS_ROWS),
            constants_loaded=plgpu.Barrier(),
            loaded=plgpu.Barrier(num_arrivals=4 * blocks + 2, num_barriers=slots),
            prepared=plgpu.Barrier(num_barriers=slots),
        ),
    )
    return kernel(*inputs, X, do, d_final, constants(jnp.bfloat16), *bounds, *transfers)
