"""Outputs and states, in one walk over the chunks of each row and head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place, divide, place_of
from pallas_kernels.hopper.registers import (
    Strip,
    halves_of,
    load,
    narrow,
    store,
    store_strips,
)
from pallas_kernels.hopper.ring import slots_that_fit
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    TILE_BYTES,
    anew,
    load32,
    products,
    tiles_smem,
    transposed,
)
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
from pallas_kernels.operators.wkv7.mosaic_gpu.inverse import invert
from pallas_kernels.operators.wkv7.mosaic_gpu.state import (
    entering_state,
    leaving_state,
    load_state,
    store_state,
    zero_state,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.walk import Chunk, advance, solve

_CARRY, _OUTPUT = 2, 3  # the warpgroups, after two that prepare


@dataclasses.dataclass(frozen=True)
class _Walks:
    """The walks of a block of the grid: every `workers`-th of all, one after another.

    Attributes:
      block: which one it is.
      workers: how many there are.
      count: of the walks of all blocks.
      heads: number of heads.
      parts: blocks of values, or of what else a state has rows of.
      pieces: into how many a row's chunks are divided.
      walked_pieces: in how many of them there are walks.
      chunks: of a row.
    """

    block: jax.Array
    workers: int
    count: int
    heads: int
    parts: int
    pieces: int
    walked_pieces: int
    chunks: int

    def own(self) -> jax.Array:
        """How many are this block's."""
        return jax.lax.div(self.count - 1 - self.block, jnp.int32(self.workers)) + 1

    def place(self, walk: jax.Array) -> tuple[Place, jax.Array]:
        """Where one of them takes place, and in which piece of the row."""
        index = self.block + walk * self.workers
        place, piece = place_of(index, self.heads, self.parts), jnp.int32(0)
        if self.walked_pieces > 1:
            row, piece = divide(place.row, self.walked_pieces)
            place = place._replace(row=row)
        return place, piece

    def first_chunk(self, piece: jax.Array) -> jax.Array:
        """With which chunk of the row a piece begins."""
        return divide(piece * self.chunks, self.pieces)[0] if self.pieces > 1 else jnp.int32(0)

    def length(self, piece: jax.Array) -> jax.Array | int:
        """How many chunks a piece has."""
        if self.pieces == 1:
            return self.chunks
        return self.first_chunk(piece + 1) - self.first_chunk(piece)

    def steps(self, own: jax.Array) -> jax.Array | int:
        """The chunks of all walks of this block; if there are pieces, it has one walk."""
        return own * self.chunks if self.pieces == 1 else self.length(self.place(jnp.int32(0))[1])

    def chunk_at(self, step: jax.Array) -> tuple[Place, jax.Array]:
        """Where a step of `steps` takes place, and which chunk of the row it is about."""
        walk, i = divide(step, self.chunks)
        place, piece = self.place(walk)
        return place, self.first_chunk(piece) + i

    def step(self, walk: jax.Array, i: jax.Array) -> jax.Array:
        """The i-th chunk of a walk."""
        return walk * self.chunks + i


def outputs(
    target: Target,
    inputs: tuple[jax.Array, ...],
    X: jax.Array | None,
    initial_state: jax.Array | None,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
    *,
    scale: float,
    save: bool,
    pieces: int = 1,
) -> tuple[jax.Array, ...]:
    """Outputs, final states, and what the backward needs of the walk.

    A walk is over the chunks of one row, head and block of values; there is one block of the grid
    for each multiprocessor, which makes one walk after another without a pause between them. Of its
    four warpgroups two prepare chunks in turn, the others do the rest for all of them. Chunks lie
    in slots of shared memory:

        global memory -> PREPARE -> CARRY -> OUTPUT -> global memory
              ^           +------(r, k, b)----^  |
              +------ the slot is free again ----+

        PREPARE:  a^, k^, b^, r^;  X, unless it is given
        CARRY:    X a^, X A_ak;  U = (X A_ak) V + (X a^) S^,
                  S' = (S^ + k^^T V + b^^T U) exp(gL - m), the only chain
        OUTPUT:   A_rk, A_rb meanwhile; o = r^ S^ + A_rk V + A_rb U

    There is room for three slots, so what counts is how soon a slot is free again: whoever needs
    little of a chunk begins when that is there. What is busiest is shared memory; so X and r^, the
    first operands of several products, are read to registers once.

    Args:
      target: what the kernel is compiled for.
      inputs: r, log_decay, k, v, a, b, `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: of `inverses`; None to find it here, which a single block of keys, and one of values, have
        room for.
      initial_state: `[B, N, H, V, K]` float32; if there are pieces, N is their number. None for
        zeros, if N is 1.
      bounds: `start` and `end` of `Masks`, each `[B, T]` int32; or nothing.
      transfers: which of the N states a chunk starts from and which it ends, each `[B, chunks]`
        int32, N for none; or nothing if N is 1.
      scale: factor on the outputs.
      save: whether to return the results for the backward.
      pieces: into how many the chunks of a row are divided, each with its own state. If more than
        one, there is a multiprocessor for each walk.

    Returns:
      o `[B, T, H, V]` bfloat16; the final states `[B, N, H, V, K]` float32; the states that enter
      the chunks, `S^ = S exp(m)`, `[B, H, chunks, V, K]` bfloat16; U, `[B, H, chunks, 64, V]`
      bfloat16; X, if it was found here.
    """
    return _walk(
        target, inputs, X, initial_state, bounds, transfers, scale=scale, save=save, pieces=pieces
    )


def transitions(
    target: Target,
    inputs: tuple[jax.Array, ...],
    X: jax.Array,
    bounds: tuple[jax.Array, ...],
    pieces: int,
) -> tuple[jax.Array, jax.Array]:
    """What pieces of a row make of any state S: `S' = S P + N`.

    These are walks as those of `outputs`, but without outputs: one begins with zero, another, whose
    values are zero, with the identity.

    Args:
      target: what the kernel is compiled for.
      inputs: see there.
      X: see there.
      bounds: see there.
      pieces: see there; for the last one nothing is computed.

    Returns:
      N, `[B, pieces - 1, H, V, K]`, and P, `[B, pieces - 1, H, K, K]`, float32.
    """
    B, _, H, K = inputs[0].shape
    V = inputs[3].shape[-1]
    begin = jnp.concatenate([jnp.zeros((V, K), jnp.float32), jnp.eye(K, dtype=jnp.float32)])
    begin = jnp.broadcast_to(begin, (B, pieces - 1, H, V + K, K))
    (ends,) = _walk(
        target,
        inputs,
        X,
        begin,
        bounds,
        (),
        scale=1.0,
        save=False,
        pieces=pieces,
        outputs=False,
    )
    return ends[..., :V, :], ends[..., V:, :]


def _walk(
    target: Target,
    inputs: tuple[jax.Array, ...],
    X: jax.Array | None,
    initial_state: jax.Array | None,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
    *,
    scale: float,
    save: bool,
    pieces: int,
    outputs: bool = True,
) -> tuple[jax.Array, ...]:
    """The kernel of `outputs` and `transitions`."""
    r, _, _, v, _, _ = inputs
    B, T, H, K = r.shape
    V = v.shape[-1]
    chunks, blocks = number_of_chunks(T), K // TILE
    inverting = X is None
    slots = slots_that_fit(
        ((4 + outputs) * blocks + 2) * TILE_BYTES,
        others=(1 + 4 * inverting + outputs + blocks) * TILE_BYTES,
        most=3 + (not outputs),
    )
    states = (B, 1, H, V, K) if initial_state is None else initial_state.shape
    walked_pieces = 1 if transfers else states[1]
    parts = states[-2] // TILE
    count = B * walked_pieces * H * parts
    workers = min(target.multiprocessors, count)
    if pieces > 1 and (workers < count or transfers):
        raise ValueError(f"{count} walks through {pieces} pieces need as many multiprocessors")
    zeros = () if outputs else (jnp.zeros((TILE, TILE), jnp.bfloat16),)

    def body(
        r_gmem, w_gmem, k_gmem, v_gmem, a_gmem, b_gmem, x_gmem, initial_gmem, sums_gmem, *rest,
        r_smem, w_smem, k_smem, v_smem, a_smem, b_smem, x_smem, scratch_smem, low_smem, o_smem,
        factors_smem, sums_smem,
        sums_loaded, loaded, decayed, prepared, carried,
    ):  # fmt: skip
        bounds_gmem, rest = rest[: len(bounds)], rest[len(bounds) :]
        transfers_gmem, rest = rest[: len(transfers)], rest[len(transfers) :]
        zeros_gmem, rest = rest[: len(zeros)], rest[len(zeros) :]
        final_gmem, *outputs_gmem = rest
        warpgroup, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        walks = _Walks(block, workers, count, H, parts, pieces, walked_pieces, chunks)
        own_walks = walks.own()
        steps = walks.steps(own_walks)

        def slot_of(step):
            return jax.lax.rem(step, jnp.int32(slots))

        def loading(step):
            """The barriers of a slot are two, since a warpgroup that waits must do so each time."""
            return jax.lax.rem(step, jnp.int32(2 * slots))

        def fetch(step):
            ((row, head, part), chunk), slot = walks.chunk_at(step), slot_of(step)
            barrier = loaded.at[loading(step)]

            def copy(gmem, smem):
                for j in range(blocks):
                    source = chunk_of(gmem, row, chunk, head, j)
                    plgpu.copy_gmem_to_smem(source, smem[j].at[slot], barrier)

            def copy_values(source):
                plgpu.copy_gmem_to_smem(source, v_smem.at[slot], barrier)

            for gmem, smem in (
                (w_gmem, w_smem), (b_gmem, b_smem), (k_gmem, k_smem), (a_gmem, a_smem)
            ):  # fmt: skip
                copy(gmem, smem)
            if outputs:
                copy(r_gmem, r_smem)
                copy_values(chunk_of(v_gmem, row, chunk, head, part))
            else:
                own = part < V // TILE
                pl.when(own)(lambda: copy_values(chunk_of(v_gmem, row, chunk, head, part)))
                pl.when(~own)(lambda: copy_values(zeros_gmem[0]))
            if not inverting:
                plgpu.copy_gmem_to_smem(x_gmem.at[row, head, chunk], x_smem.at[slot], barrier)

        def tiles_of(slot):
            def at(tiles):
                return [tile.at[slot] for tile in tiles]

            return at(r_smem), Chunk(
                x=at(a_smem),
                low=at(w_smem),
                y=at(k_smem),
                z=at(b_smem),
                Y=v_smem.at[slot],
                X=x_smem.at[slot],
                U=w_smem[0].at[slot],
                before=[factors.at[slot, 0] for factors in factors_smem],
                after=[factors.at[slot, 1] for factors in factors_smem],
            )

        def prepare(turn, _):
            step = 2 * turn + warpgroup
            ((row, _, _), chunk), slot = walks.chunk_at(step), slot_of(step)
            masks = load_masks(bounds_gmem, row, chunk)
            plgpu.barrier_wait(loaded.at[loading(step)])
            for j in range(blocks):

                def decay(strip, j=j):
                    r, t = tiles_of(anew(slot))
                    w, a, k, b = (Strip(x[j], strip) for x in (t.low, t.x, t.y, t.z))
                    g = decays_from_middle(w, sums_smem)
                    store_decays_of_chunk(w, g, t.before[j], t.after[j])
                    since = since_token(g)
                    of_b = halves_of(load32(b) * since)
                    of_k = narrow(load32(k) * since)
                    high, low = halves_of(load32(a) * before_token(g, w))
                    values = [(t.x[j], high), (t.low[j], low), (t.y[j], of_k), (t.z[j], of_b[0])]
                    if inverting:
                        values.append((scratch_smem[0].at[anew(warpgroup)], of_b[1]))
                    if outputs:
                        of_r = load32(Strip(r[j], strip)) * (until_token(g) * scale)
                        values.append((r[j], narrow(of_r)))
                    store_strips(strip, *values)

                for_each_strip(decay)
            plgpu.barrier_arrive(decayed.at[slot])
            if inverting:
                _, t = tiles_of(anew(slot))
                (a,), (a_low,), (b,) = t.x, t.low, t.z
                b_low, second = (x.at[anew(warpgroup)] for x in scratch_smem)
                pairs = ((a, b), (a_low, b), (a, b_low))
                (A,) = products([(x, transposed(y)) for x, y in pairs])
                A_high, A_low = masks.lower(*halves_of(A), strictly=True)
                invert(A_high, A_low, b_low, second, t.X)
            plgpu.barrier_arrive(prepared.at[slot])

        def lows():
            return [tile.at[anew(0)] for tile in low_smem]

        def carry(walk, i, state):
            slot, (place, piece) = slot_of(walks.step(walk, i)), walks.place(walk)
            chunk = walks.first_chunk(piece) + i
            masks = load_masks(bounds_gmem, place[0], chunk)
            lower = functools.partial(masks.lower, strictly=True)
            _, t = tiles_of(anew(slot))
            selections = [(masks.entered, [*t.x, *t.low])] if bounds else []
            plgpu.barrier_wait(prepared.at[slot])
            XA = solve(t, load(t.X), lower, selections, (t.x[0], lows()[0]))
            _, t = tiles_of(anew(slot))
            if transfers:
                state = entering_state(state, initial_gmem, transfers_gmem[0], place, chunk)
            state = advance(t, state, masks, lows(), XA, selecting=bool(bounds))
            plgpu.barrier_arrive(carried.at[slot])
            if transfers:
                leaving_state(state, final_gmem, transfers_gmem[1], place, chunk)
            return state

        def fetch_next(walk, i):
            step = walks.step(walk, i) + slots
            pl.when(step < steps)(lambda: fetch(step))

        def release(walk, i, _):
            plgpu.barrier_wait(carried.at[slot_of(walks.step(walk, i))])
            plgpu.commit_smem()
            fetch_next(walk, i)

        def output(walk, i, _):
            slot, ((row, head, part), piece) = slot_of(walks.step(walk, i)), walks.place(walk)
            o_gmem, *saved_gmem = outputs_gmem
            chunk = walks.first_chunk(piece) + i
            plgpu.barrier_wait(decayed.at[slot])
            masks = load_masks(bounds_gmem, row, chunk)
            r, t = tiles_of(slot)
            r = [load(x) for x in r]
            A_rk, A_rb = products(
                [(x, transposed(k)) for x, k in zip(r, t.y, strict=True)],
                [(x, transposed(b)) for x, b in zip(r, t.z, strict=True)],
            )
            A_rk, A_rb = masks.lower(narrow(A_rk), narrow(A_rb))
            plgpu.barrier_wait(carried.at[slot])
            reads = [masks.entered(x) for x in r]
            of_state = [(x, transposed(s)) for x, s in zip(reads, t.x, strict=True)]
            if save:
                entries_gmem, u_gmem, *x_gmems = saved_gmem
                for j in range(blocks):
                    entry = state_tile_of(entries_gmem, row, head, chunk, part, j)
                    plgpu.copy_smem_to_gmem(t.x[j], entry)
                plgpu.copy_smem_to_gmem(t.U, values_tile_of(u_gmem, row, head, chunk, part))
                for gmem in x_gmems:
                    plgpu.copy_smem_to_gmem(t.X, gmem.at[row, head, chunk])
            (o,) = products([(A_rk, t.Y), (A_rb, t.U), *of_state])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # so that the slot has been read before it is written
            fetch_next(walk, i)
            store((o_smem, narrow(o)))
            plgpu.copy_smem_to_gmem(o_smem, chunk_of(o_gmem, row, chunk, head, part))

        def for_each_walk(work):
            jax.lax.fori_loop(0, own_walks, lambda walk, _: work(walk), None)

        def for_each_chunk(work, walk, carried=None):
            length = walks.length(walks.place(walk)[1])
            return jax.lax.fori_loop(0, length, functools.partial(work, walk), carried)

        @pl.when(warpgroup < _CARRY)
        def _():
            plgpu.barrier_wait(sums_loaded)
            turns = jax.lax.div(steps + 1 - warpgroup, jnp.int32(2))
            jax.lax.fori_loop(0, turns, prepare, None)

        @pl.when(warpgroup == _CARRY)
        def _():
            def work(walk):
                place, piece = walks.place(walk)
                if initial_gmem is None:
                    state = zero_state(blocks)
                else:
                    state = load_state(initial_gmem, piece, place)
                state = for_each_chunk(carry, walk, state)
                if not transfers:
                    store_state(state, final_gmem, piece, place)

            for_each_walk(work)

        @pl.when(warpgroup == _OUTPUT)
        def _():
            plgpu.copy_gmem_to_smem(sums_gmem, sums_smem, sums_loaded)
            first_steps = jnp.minimum(slots, steps)
            jax.lax.fori_loop(0, first_steps, lambda step, _: fetch(step), None)
            for_each_walk(functools.partial(for_each_chunk, output if outputs else release))
            plgpu.wait_smem_to_gmem(0)

    types = [jax.ShapeDtypeStruct(states, jnp.float32)]
    if outputs:
        types.append(jax.ShapeDtypeStruct((B, T, H, V), jnp.bfloat16))
    if save:
        types.append(jax.ShapeDtypeStruct((B, H, chunks, V, K), jnp.bfloat16))
        types.append(jax.ShapeDtypeStruct((B, H, chunks, TILE, V), jnp.bfloat16))
        if inverting:
            types.append(jax.ShapeDtypeStruct((B, H, chunks, TILE, TILE), jnp.bfloat16))
    barrier = plgpu.Barrier(num_barriers=slots)
    kernel = target.kernel(
        body,
        name="wkv7_outputs" if outputs else "wkv7_transitions",
        out_type=tuple(types),
        grid={"block": workers},
        warpgroups=4,
        scratch_types=dict(
            {f"{name}_smem": [tiles_smem(slots)] * blocks for name in "wkab"},
            r_smem=[tiles_smem(slots)] * blocks if outputs else [],
            v_smem=tiles_smem(slots),
            x_smem=tiles_smem(slots),
            scratch_smem=[tiles_smem(2)] * 2 if inverting else [],
            low_smem=[tiles_smem(1)] * blocks,
            o_smem=tiles_smem() if outputs else None,
            factors_smem=[plgpu.SMEM((slots, 2, TILE), jnp.float32)] * blocks,
            sums_smem=tiles_smem(),
            sums_loaded=plgpu.Barrier(),
            loaded=plgpu.Barrier(
                num_arrivals=(4 + outputs) * blocks + 2 - inverting, num_barriers=2 * slots
            ),
            decayed=barrier,
            prepared=barrier,
            carried=barrier,
        ),
    )
    operands = (*inputs, X, initial_state, prefix_sums(), *bounds, *transfers, *zeros)
    final, *others = kernel(*operands)
    return (others[0], final, *others[1:]) if outputs else (final,)
