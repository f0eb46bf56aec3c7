"""Kernel 2 of 4: outputs and states, in one walk over the chunks of each row and head."""

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
    entering_state,
    grid_place,
    leaving_state,
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

_PREPARE, _CARRY, _OUTPUT = range(3)  # the warpgroups


def outputs(
    plan: Plan,
    inputs: tuple[jax.Array, ...],
    X: jax.Array,
    initial_state: jax.Array,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
    *,
    save_entries: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final states, and what the backward needs of the states between chunks.

    Three warpgroups work on three chunks at a time, which travel through slots of shared memory:

        global memory -> (loaded) -> PREPARE -> (prepared) -> CARRY -> (carried) -> OUTPUT -> o
              ^                                                                        |
              +-------------------------- the slot is free again ----------------------+

        PREPARE, no state needed:   W1 = X a^,  U0 = X (A_ak V)
        CARRY, the only chain:      U = U0 + W1 S^,  S' = (S^ + k^^T V + b^^T U) exp(gL - m)
        OUTPUT:                     o = r^ S^ + A_rk V + A_rb U

    Args:
      plan: how to compile.
      inputs: r, log_decay, k, v, a, b, `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: of `inverses`.
      initial_state: `[B, N, H, V, K]` float32.
      bounds: `start` and `end` of `Masks`, each `[B, T]` int32; or nothing.
      transfers: which of the N states a chunk starts from and which it ends, each `[B, chunks]`
        int32, N for none; or nothing if N is 1.
      save_entries: whether to return the states that enter chunks.

    Returns:
      o `[B, T, H, V]` bfloat16, the final state like `initial_state`, and the entries
      `S^ = S exp(m)`, `[B, H, chunks, V, K]` bfloat16, or None.
    """
    r, _, _, v, _, _ = inputs
    B, T, H, K = r.shape
    V = v.shape[-1]
    chunks, blocks = plan.chunks(T), K // TILE
    # Most tiles are overwritten as a chunk advances; wider heads and segments need a few more.
    extra = (K != TILE) + 2 * bool(bounds)
    slots = plan.slots(5 * blocks + 2 + extra, others=2, most=3)
    product = functools.partial(products, interpret=plan.interpret)

    def body(
        r_gmem, w_gmem, k_gmem, v_gmem, a_gmem, b_gmem, x_gmem, initial_gmem, constants_gmem, *rest,
        r_smem, w_smem, k_smem, v_smem, a_smem, b_smem, x_smem, extra_smem, o_smem,
        before_smem, after_smem, constants_smem, constants_loaded, loaded, prepared, carried,
    ):  # fmt: skip
        bounds_gmem, rest = rest[: len(bounds)], rest[len(bounds) :]
        transfers_gmem, rest = rest[: len(transfers)], rest[len(transfers) :]
        o_gmem, final_gmem, *entries_gmem = rest
        place = row, head, part = grid_place()
        warpgroup = jax.lax.axis_index("warpgroup")

        def slot_of(chunk):
            return jax.lax.rem(chunk, jnp.int32(slots))

        def fetch(chunk):
            slot = slot_of(chunk)

            def copy(source, smem):
                plgpu.copy_gmem_to_smem(source, smem.at[slot], loaded.at[slot])

            for gmem, smem in (
                (w_gmem, w_smem), (a_gmem, a_smem), (k_gmem, k_smem), (b_gmem, b_smem),
                (r_gmem, r_smem),
            ):  # fmt: skip
                for j in range(blocks):
                    copy(chunk_of(gmem, row, chunk, head, j), smem[j])
            copy(chunk_of(v_gmem, row, chunk, head, part), v_smem)
            copy(x_gmem.at[row, head, chunk], x_smem)

        def at(slot, tiles):
            return [tile.at[slot] for tile in tiles]

        def u_and_state(slot):
            if K == TILE:
                return w_smem[0].at[slot], [x_smem.at[slot]]
            return extra_smem[0].at[slot], at(slot, w_smem)

        def written(slot, v, u):
            """Where rows of V and U that change the state are."""
            return at(slot, extra_smem[-2:]) if bounds else (v, u)

        def prepare(chunk, _):
            slot = slot_of(chunk)
            plgpu.barrier_wait(loaded.at[slot])
            masks = load_masks(bounds_gmem, row, chunk)
            r, w, k, a, b = (at(slot, x) for x in (r_smem, w_smem, k_smem, a_smem, b_smem))
            v, X, u = v_smem.at[slot], x_smem.at[slot], u_and_state(slot)[0]
            a_in = []
            for j in range(blocks):
                g, before, after = decays_of_chunk(product, w[j], constants_smem)
                before_smem[j].at[slot][...], after_smem[j].at[slot][...] = before, after
                w_j = load(w[j]).astype(jnp.float32)
                a_in.append((load(a[j]) * jnp.exp2(g - w_j * LOG2E)).astype(jnp.bfloat16))
                a[j][...] = masks.entered(a_in[j])
                from_token = jnp.exp2(-g)
                k[j][...] = (load(k[j]) * from_token).astype(jnp.bfloat16)
                b[j][...] = (load(b[j]) * from_token).astype(jnp.bfloat16)
                r[j][...] = (load(r[j]) * (jnp.exp2(g) * plan.scale)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            (A_ak,) = product([(a_in[j], transposed(k[j])) for j in range(blocks)])
            A_ak = keep(masks.lower(strictly=True), A_ak).astype(jnp.bfloat16)
            (A_ak_v,) = product([(A_ak, v)])
            u[...] = A_ak_v.astype(jnp.bfloat16)
            if bounds:
                written(slot, v, u)[0][...] = masks.leaving(load(v))
            plgpu.commit_smem()
            *W1, U0 = product(*([(X, tile)] for tile in (*a, u)))
            for tile, value in zip((*a, u), (*W1, U0), strict=True):
                tile[...] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(prepared.at[slot])

        def carry(chunk, state):
            slot = slot_of(chunk)
            plgpu.barrier_wait(prepared.at[slot])
            if transfers:
                state = entering_state(state, initial_gmem, transfers_gmem[0], place, chunk)
            u, state_tiles = u_and_state(slot)
            y, u_written = written(slot, v_smem.at[slot], u)
            state = advance(
                product,
                state,
                load_masks(bounds_gmem, row, chunk),
                before=at(slot, before_smem),
                after=at(slot, after_smem),
                R=at(slot, a_smem),
                P=at(slot, k_smem),
                Q=at(slot, b_smem),
                Y=y,
                U=u,
                U_written=u_written,
                state_smem=state_tiles,
            )
            plgpu.barrier_arrive(carried.at[slot])
            if transfers:
                leaving_state(state, final_gmem, transfers_gmem[1], place, chunk)
            return state

        def output(chunk, _):
            slot = slot_of(chunk)
            plgpu.barrier_wait(prepared.at[slot])
            masks = load_masks(bounds_gmem, row, chunk)
            r, k, b = (at(slot, x) for x in (r_smem, k_smem, b_smem))
            r = [load(tile) for tile in r] if bounds or not plan.interpret else r
            A_rk, A_rb = product(
                [(x, transposed(y)) for x, y in zip(r, k, strict=True)],
                [(x, transposed(y)) for x, y in zip(r, b, strict=True)],
            )
            A_rk, A_rb = (keep(masks.lower(), A).astype(jnp.bfloat16) for A in (A_rk, A_rb))
            plgpu.barrier_wait(carried.at[slot])
            u, state = u_and_state(slot)
            if save_entries:
                for j in range(blocks):
                    plgpu.copy_smem_to_gmem(
                        state[j], state_tile_of(entries_gmem[0], row, head, chunk, part, j)
                    )
            of_state = [(masks.entered(x), transposed(s)) for x, s in zip(r, state, strict=True)]
            (o,) = product([*of_state, (A_rk, v_smem.at[slot]), (A_rb, u)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem[...] = o.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, chunk_of(o_gmem, row, chunk, head, part))
            pl.when(chunk + slots < chunks)(lambda: fetch(chunk + slots))

        @pl.when(warpgroup == _PREPARE)
        def _():
            plgpu.barrier_wait(constants_loaded)
            jax.lax.fori_loop(0, chunks, prepare, None)

        @pl.when(warpgroup == _CARRY)
        def _():
            state = load_state(initial_gmem, jnp.int32(0), place)
            state = jax.lax.fori_loop(0, chunks, carry, state)
            if not transfers:
                store_state(state, final_gmem, jnp.int32(0), place)

        @pl.when(warpgroup == _OUTPUT)
        def _():
            plgpu.copy_gmem_to_smem(constants_gmem, constants_smem, constants_loaded)
            for chunk in range(min(slots, chunks)):
                fetch(jnp.int32(chunk))
            jax.lax.fori_loop(0, chunks, output, None)
            plgpu.wait_smem_to_gmem(0)

    types = [
        jax.ShapeDtypeStruct((B, T, H, V), jnp.bfloat16),
        jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
    ]
    if save_entries:
        types.append(jax.ShapeDtypeStruct((B, H, chunks, V, K), jnp.bfloat16))
    barrier = plgpu.Barrier(num_barriers=slots)
    kernel = plan.kernel(
        body,
        name="wkv7_outputs",
        out_type=tuple(types),
        grid={"part": V // TILE, "head": H, "row": B},
        warpgroups=3,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "rwkab"},
            v_smem=tiles_smem(slots),
            x_smem=tiles_smem(slots),
            extra_smem=[tiles_smem(slots)] * extra,
            o_smem=tiles_smem(),
            before_smem=[plgpu.SMEM((slots, TILE), jnp.float32)] * blocks,
            after_smem=[plgpu.SMEM((slots, TILE), jnp.float32)] * blocks,
            constants_smem=tiles_smem(rows=CONSTANTS_ROWS),
            constants_loaded=plgpu.Barrier(),
            loaded=plgpu.Barrier(num_arrivals=5 * blocks + 2, num_barriers=slots),
            prepared=barrier,
            carried=barrier,
        ),
    )
    o, final, *entries = kernel(
        *inputs, X, initial_state, constants(jnp.bfloat16), *bounds, *transfers
    )
    return o, final, entries[0] if save_entries else None
