"""Gradients of the states, in one walk over the chunks of each row and head from last to first."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place, grid_place
from pallas_kernels.hopper.registers import (
    Strip,
    begin_branch,
    halves_of,
    largest_exponent,
    load,
    narrow,
    power_of_two,
    store,
    store_strips,
    uniform,
)
from pallas_kernels.hopper.ring import Ring, slots_that_fit
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    TILE_BYTES,
    anew,
    for_each_strip,
    load32,
    tiles_smem,
    transposed,
)
from pallas_kernels.operators.wkv7.call import WKVInputs
from pallas_kernels.operators.wkv7.chunk_alignment import Transfers
from pallas_kernels.operators.wkv7.mosaic_gpu import carried_state
from pallas_kernels.operators.wkv7.mosaic_gpu.carried_state import State
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import (
    before_token,
    decays_from_middle,
    number_of_chunks,
    prefix_sums,
    since_token,
    state_tile,
    store_decays_of_chunk,
    tokens_tile,
    until_token,
    values_tile,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.formats import (
    A_EXPONENT,
    BFLOAT16,
    FLOAT16,
    FLOAT16_BUT_STATE,
    Formats,
    may_be_float16,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds, TileMasks, load_masks
from pallas_kernels.operators.wkv7.mosaic_gpu.walk import (
    Chunk,
    advance,
    advance_in_float16,
    chunk_tiles,
    solve,
)

_PREPARE, _CARRY, _STORE = 2, 2, 3  # warpgroups 0 and 1 prepare

_DO_EXPONENT = 0
"""In float16, the largest magnitude of dO is between 2 to this power and twice as much.

That leaves room for the gradients of states, which are sums over many tokens.
"""

_MOST_EXPONENT = 48
"""Gradients whose exponents are larger, or smaller than its negative, are left in bfloat16."""

_MOST_DW = 2.0
"""Products of dW with U and v, of which none exceeds 256, stay in the range of float16."""


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
      r: `[B, T, H, K]` bfloat16, T a multiple of 64.
      log_decay: `[B, T, H, K]` bfloat16.
      a: `[B, T, H, K]` bfloat16.
      b: `[B, T, H, K]` bfloat16.
      X: `[B, H, chunks, 64, 64]` 16 bits.
      formats: `[B, H, chunks, blocks of 64 values, 2]` int32, of `outputs`, or None.
      do: `[B, T, H, V]` bfloat16.
      d_final: `[B, N, H, V, K]` float32, or None for zeros.
      prefix_sums: `[64, 64]` bfloat16.
      bounds: of segments that begin within chunks, or None.
      transfers: of the states of segments, or None if a row has one initial and one final state.
    """

    r: Any
    log_decay: Any
    a: Any
    b: Any
    X: Any
    formats: Any
    do: Any
    d_final: Any
    prefix_sums: Any
    bounds: SegmentBounds | None
    transfers: Transfers | None


class Results(NamedTuple):
    """What the kernel writes.

    Attributes:
      exits: `[B, H, chunks, V, K]` 16 bits, dS^ of each chunk.
      dW: `[B, H, chunks, 64, V]` 16 bits.
      formats: `[B, chunks, H, blocks of 64 values, 2]` int32, or None if all numbers are bfloat16.
        The first one is what a chunk's numbers are: BFLOAT16, FLOAT16, or FLOAT16_BUT_STATE, which
        means here that S^ and U are float16, dS^ and dW bfloat16. The second one is an exponent:
        in FLOAT16, dS^ is multiplied by 2 to this power, and dW, too, after `A_EXPONENT`.
      d_initial: `[B, N, H, V, K]` float32; with transfers, only where a chunk starts from a state.
        None if there are no initial states.
    """

    exits: Any
    dW: Any
    formats: Any
    d_initial: Any


class Slots(NamedTuple):
    """The ring in shared memory. Lists have an entry for each 64 key channels.

    Attributes:
      r: tiles `[slots, 64, 64]`; then r^.
      log_decay: tiles; then the low half of b^, R and U of `Chunk`.
      a: tiles; then a^.
      b: tiles; then the high half of b^, and dS^.
      X: tiles.
      do: tiles, of 64 value channels.
      decays: float32 `[2 slots + 1, 64]`, exp(gL - m) and exp(m) of each slot, and in the last row,
        if there is a choice, `Formats`.
    """

    r: list[Any]
    log_decay: list[Any]
    a: list[Any]
    b: list[Any]
    X: Any
    do: Any
    decays: list[Any]


class Scratch(NamedTuple):
    """Shared memory beside the ring.

    Attributes:
      A: tiles `[2, 64, 64]`, one for each warpgroup that prepares.
      S_low: a tile for each 64 key channels, the low half of dS^.
      prefix_sums: a tile.
    """

    A: Any
    S_low: list[Any]
    prefix_sums: Any


class Barriers(NamedTuple):
    """Barriers of a block; all but the first one are of slots.

    Attributes:
      sums_loaded: `prefix_sums` has arrived.
      loaded: a chunk has arrived.
      solved: r^, a^, X^T b^ and X^T A_rb^T are ready.
      carried: dS^ and dW are ready.
    """

    sums_loaded: Any
    loaded: Any
    solved: Any
    carried: Any


@dataclasses.dataclass(frozen=True)
class _BackwardWalk:
    """The walk of a block: its references, and what its warpgroups do.

    Attributes:
      place: row, head and 64 value channels of the walk.
      chunks: number of chunks in a row.
      ring: of `slots`; step s works on chunk `chunks - 1 - s`.
      scale: factor on r.
      gmem: references to the operands.
      results_gmem: references to the results.
      slots: references to shared memory.
      scratch: references to shared memory.
      barriers: references.
    """

    place: Place
    chunks: int
    ring: Ring
    scale: float
    gmem: Operands
    results_gmem: Results
    slots: Slots
    scratch: Scratch
    barriers: Barriers

    def chunk_at(self, step: jax.Array) -> jax.Array:
        """Returns the chunk that a step works on."""
        return self.chunks - 1 - step

    def fetch(self, step: jax.Array) -> None:
        """Starts the copies of a step's chunk into its slot."""
        (row, head, value_block), chunk = self.place, self.chunk_at(step)
        gmem, slots = self.gmem, self.slots
        pairs = [
            (tokens_tile(of_keys, row, chunk, head, j), tile)
            for of_keys, tiles in (
                (gmem.log_decay, slots.log_decay),
                (gmem.b, slots.b),
                (gmem.r, slots.r),
                (gmem.a, slots.a),
            )
            for j, tile in enumerate(tiles)
        ]
        pairs.append((gmem.X.at[row, head, chunk], slots.X))
        pairs.append((tokens_tile(gmem.do, row, chunk, head, value_block), slots.do))
        self.ring.copy(step, self.barriers.loaded, pairs)

    def chunk_in(self, slot: jax.Array) -> Chunk:
        """Returns the tiles of a slot with the names they have in `walk`."""

        def at(tiles):
            return [tile.at[slot] for tile in tiles]

        slots = self.slots
        return chunk_tiles(
            x_high=at(slots.b),
            x_low=at(slots.log_decay),
            y=at(slots.r),
            z=at(slots.a),
            Y=slots.do.at[slot],
            X=slots.X.at[slot],
            before=[decays.at[2 * slot] for decays in slots.decays],
            after=[decays.at[2 * slot + 1] for decays in slots.decays],
        )

    @property
    def chooses(self) -> bool:
        """Whether a chunk's numbers may be float16."""
        return self.gmem.formats is not None

    @property
    def formats(self) -> Formats:
        """What the numbers in the slots are, if they may be float16."""
        (decays,) = self.slots.decays
        return Formats(decays.at[2 * self.ring.slots], self.ring.slots)

    def formats_of_outputs(self, step: jax.Array) -> Any:
        """Returns a reference to the formats in which `outputs` left a step's chunk."""
        row, head, value_block = self.place
        return self.gmem.formats.at[row, head, self.chunk_at(step), value_block]

    def masks_at(self, step: jax.Array) -> TileMasks:
        """Loads the masks of a step's chunk."""
        return load_masks(self.gmem.bounds, self.place.row, self.chunk_at(step))

    def prepare(self, warpgroup: jax.Array) -> None:
        """Prepares every second step, as one of two warpgroups."""
        plgpu.barrier_wait(self.barriers.sums_loaded)
        prepare = functools.partial(self._prepare, warpgroup)
        self.ring.for_each_in_turn(warpgroup, self.chunks, prepare)

    def _prepare(self, warpgroup: jax.Array, step: jax.Array) -> None:
        slot = self.ring.slot(step)
        if not self.chooses:
            plgpu.barrier_wait(self.ring.loaded(self.barriers.loaded, step))
            self._prepare_bfloat16(warpgroup, step, slot, None)
        else:
            formats = self.formats_of_outputs(step)
            of_all, of_inverse = formats[0], formats[1]
            plgpu.barrier_wait(self.ring.loaded(self.barriers.loaded, step))
            jax.lax.cond(
                uniform(of_all) == FLOAT16,
                lambda: self._prepare_float16(warpgroup, step, slot, of_inverse),
                lambda: self._prepare_bfloat16(warpgroup, step, slot, of_inverse),
            )
        plgpu.barrier_arrive(self.barriers.solved.at[slot])

    def _prepare_bfloat16(
        self, warpgroup: jax.Array, step: jax.Array, slot: jax.Array, of_inverse: jax.Array | None
    ) -> None:
        def convert_inverse():
            t = self.chunk_in(anew(slot))
            store((t.X, narrow(load32(t.X, jnp.float16))))

        if of_inverse is not None:
            pl.when(uniform(of_inverse) == 1)(convert_inverse)
        masks = self.masks_at(step)
        for j in range(len(self.slots.r)):
            for_each_strip(functools.partial(self._decay, slot, j, masks, jnp.bfloat16, None))
        self._solve(warpgroup, slot, masks, jnp.bfloat16)
        if self.chooses:
            self.formats.choose(slot, BFLOAT16)

    def _prepare_float16(
        self, warpgroup: jax.Array, step: jax.Array, slot: jax.Array, of_inverse: jax.Array
    ) -> None:
        begin_branch()
        largest = largest_exponent(
            load(self.slots.do.at[anew(slot)]),
            self.formats.vector,
            self.formats.free_entries(warpgroup),
        )

        def in_float16():
            begin_branch()
            masks, exponent = self.masks_at(step), _DO_EXPONENT - largest
            t = self.chunk_in(anew(slot))
            do = load32(t.Y) * power_of_two(exponent)
            X = jax.lax.cond(
                uniform(of_inverse) == 1,
                lambda: load32(t.X, jnp.float16),
                lambda: load32(t.X),
            )
            X = X * 2.0**-A_EXPONENT
            store((t.Y, narrow(do, jnp.float16)), (t.X, narrow(X, jnp.float16)))
            exponent = exponent.astype(jnp.float32)
            self.formats.choose(slot, FLOAT16)
            self.formats.choose_exponent(slot, exponent)
            for_each_strip(functools.partial(self._decay, slot, 0, masks, jnp.float16, exponent))
            self._solve(warpgroup, slot, masks, jnp.float16)

        jax.lax.cond(
            jnp.abs(largest) <= _MOST_EXPONENT,
            in_float16,
            lambda: self._prepare_bfloat16(warpgroup, step, slot, of_inverse),
        )

    def _solve(self, warpgroup: jax.Array, slot: jax.Array, masks: TileMasks, dtype: Any) -> None:
        """Writes R, and XA to the tile of X."""
        t, selections = self.chunk_in(anew(slot)), []
        if self.gmem.bounds is not None:
            selections = [(masks.leaving, [*t.x_high, *t.x_low]), (masks.entered, t.y)]
        A_tiles = self.scratch.A.at[warpgroup], t.x_high[0]
        store((t.X, solve(t, transposed(t.X), masks.upper, selections, A_tiles, dtype)))

    def _decay(
        self,
        slot: jax.Array,
        j: int,
        masks: TileMasks,
        dtype: Any,
        exponent: jax.Array | None,
        strip: jax.Array,
    ) -> None:
        """Writes b^, r^, a^ for a strip of 32 key channels, among the j-th 64."""
        t = self.chunk_in(anew(slot))
        log_decay, b, r, a = (Strip(x[j], strip) for x in (t.x_low, t.x_high, t.y, t.z))
        g = decays_from_middle(log_decay, self.scratch.prefix_sums)
        store_decays_of_chunk(log_decay, g, t.after[j], t.before[j], exponent)
        b_high, b_low = halves_of(load32(b) * since_token(g), dtype)
        of_r = narrow(load32(r) * (until_token(g) * self.scale), dtype)
        factor = before_token(g, log_decay)
        if dtype == jnp.float16:
            factor *= 2.0**A_EXPONENT
        of_a = masks.entered(narrow(load32(a) * factor, dtype))
        values = ((t.x_high[j], b_high), (t.x_low[j], b_low), (t.y[j], of_r), (t.z[j], of_a))
        store_strips(strip, *values)

    def carry(self) -> None:
        """Carries the gradient of the state from the last chunk to the first."""
        per_segment, first = self.gmem.transfers is not None, jnp.int32(0)
        if per_segment or self.gmem.d_final is None:
            # With segments, the gradient of each final state is added at its last chunk.
            d_state = carried_state.zero_state(len(self.slots.r))
        else:
            d_state = carried_state.load_state_tiles(self.gmem.d_final, first, self.place)
        d_state = jax.lax.fori_loop(0, self.chunks, self._carry, d_state)
        d_initial_gmem = self.results_gmem.d_initial
        if d_initial_gmem is not None and not per_segment:
            carried_state.store_state_tiles(d_state, d_initial_gmem, first, self.place)

    def _carry(self, step: jax.Array, d_state: State) -> State:
        slot, chunk, transfers = self.ring.slot(step), self.chunk_at(step), self.gmem.transfers
        plgpu.barrier_wait(self.barriers.solved.at[slot])
        if transfers is not None:
            d_state = carried_state.leave_backward(
                d_state, self.gmem.d_final, transfers, self.place, chunk
            )
        if not self.chooses:
            d_state = self._advance_bfloat16(step, slot, d_state)
        else:
            d_state = jax.lax.cond(
                self.formats.chosen(slot) == FLOAT16,
                lambda: self._advance_float16(step, slot, d_state),
                lambda: self._advance_bfloat16(step, slot, d_state),
            )
        plgpu.barrier_arrive(self.barriers.carried.at[slot])
        if transfers is not None:
            d_state = carried_state.enter_backward(
                d_state, self.results_gmem.d_initial, transfers, self.place, chunk
            )
        return d_state

    def _advance_bfloat16(self, step: jax.Array, slot: jax.Array, d_state: State) -> State:
        t = self.chunk_in(anew(slot))
        return advance(t, d_state, self.masks_at(step), self.scratch.S_low, t.X)

    def _advance_float16(self, step: jax.Array, slot: jax.Array, d_state: State) -> State:
        begin_branch()
        return advance_in_float16(
            lambda: self.chunk_in(anew(slot)),
            d_state,
            self.masks_at(step),
            lambda: self.scratch.S_low,
            self.chunk_in(anew(slot)).X,
            _MOST_DW,
            lambda: self.formats.change(slot, FLOAT16_BUT_STATE),
            selecting=False,
        )

    def store(self) -> None:
        """Fetches the chunks, and writes dS^ and dW of each one."""
        sums_smem, sums_loaded = self.scratch.prefix_sums, self.barriers.sums_loaded
        plgpu.copy_gmem_to_smem(self.gmem.prefix_sums, sums_smem, sums_loaded)
        self.ring.fill(self.fetch, self.chunks)
        jax.lax.fori_loop(0, self.chunks, lambda step, _: self._store(step), None)
        plgpu.wait_smem_to_gmem(0)

    def _store(self, step: jax.Array) -> None:
        (row, head, value_block), chunk = self.place, self.chunk_at(step)
        slot = self.ring.slot(step)
        plgpu.barrier_wait(self.barriers.carried.at[slot])
        t = self.chunk_in(slot)
        if self.chooses:
            self._store_format(step, slot)
        for j, dS in enumerate(t.S_high):
            exit_ = state_tile(self.results_gmem.exits, row, head, chunk, value_block, j)
            plgpu.copy_smem_to_gmem(dS, exit_)
        dW_gmem = values_tile(self.results_gmem.dW, row, head, chunk, value_block)
        plgpu.copy_smem_to_gmem(t.U, dW_gmem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # so that the slot has been read before it is written
        self.ring.refill(self.fetch, step, self.chunks)

    def _store_format(self, step: jax.Array, slot: jax.Array) -> None:
        """Writes the format of a chunk, and makes dS^ and dW bfloat16 unless all is float16."""
        (row, head, value_block), chunk = self.place, self.chunk_at(step)
        carried, of_outputs = self.formats.carried(slot), self.formats_of_outputs(step)[0]
        exponent = self.formats.exponent(slot)

        def without_exponents():
            t, factor = self.chunk_in(anew(slot)), power_of_two(-exponent)
            (S,) = t.S_high
            dW = load32(t.U) * (factor * 2.0**A_EXPONENT)
            store((S, narrow(load32(S) * factor)), (t.U, narrow(dW)))

        pl.when(carried == FLOAT16_BUT_STATE)(without_exponents)
        mixed = jnp.where(of_outputs == FLOAT16, FLOAT16_BUT_STATE, BFLOAT16)
        formats = self.results_gmem.formats.at[row, chunk, head, value_block]
        formats[0] = jnp.where(carried == FLOAT16, FLOAT16, mixed)
        formats[1] = jnp.where(carried == FLOAT16, exponent, 0)


def state_gradients(
    target: Target,
    inputs: WKVInputs,
    X: jax.Array,
    formats: jax.Array | None,
    do: jax.Array,
    d_final: jax.Array | None,
    bounds: SegmentBounds | None,
    transfers: Transfers | None,
    *,
    scale: float,
    from_zero: bool,
) -> Results:
    """Computes gradients of the states between chunks, of the initial states, and of W.

    With `W = a^ S^ + A_ak V`, and dS1 the gradient of the state that leaves a chunk,

        dS^ = dS1 exp(gL - m)
        dW  = X^T dU = (X^T A_rb^T) dO + (X^T b^) dS^
        dS  = (dS^ + r^^T dO + a^^T dW) exp(m)

    There are four warpgroups, and chunks travel through slots of shared memory:

        global memory -> PREPARE -> CARRY -> STORE -> global memory
              ^                                |
              +----- the slot is free again ---+

        PREPARE:  b^, r^, a^,  X^T b^,  X^T A_rb^T; two warpgroups, in turn
        CARRY:    dW and dS, the only chain
        STORE:    dS^ and dW to global memory

    A chunk that `outputs` left in float16 is computed in float16 here, too. dO, dS^ and dW are then
    multiplied by a power of two, which differs from chunk to chunk; the state that CARRY has is
    not. What leaves the range of float16 becomes bfloat16, without that factor.

    Args:
      target: what the kernel is compiled for.
      inputs: `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: `[B, H, chunks, 64, 64]` 16 bits, the inverses of the forward.
      formats: `[B, H, chunks, blocks of 64 values, 2]` int32, of `outputs`, or None.
      do: `[B, T, H, V]` bfloat16, gradients of the outputs.
      d_final: `[B, N, H, V, K]` float32, gradients of the final states; None for zeros, if N is 1.
      bounds: of segments that begin within chunks, or None.
      transfers: which of the N states a chunk starts from and which one it ends, `[B, chunks]`
        int32; None if N is 1.
      scale: factor on the outputs.
      from_zero: whether there are no initial states, and so no gradients of them. N is 1 then.
    """
    B, T, H, K = inputs.r.shape
    V = do.shape[-1]
    chunks, blocks = number_of_chunks(T), K // TILE
    states = (B, 1, H, V, K) if d_final is None else d_final.shape
    slot_bytes, others = (4 * blocks + 2) * TILE_BYTES, (3 + blocks) * TILE_BYTES
    ring = Ring(slots_that_fit(slot_bytes, others=others, most=3), in_turn=_PREPARE)

    def body(gmem, *results_gmem, slots, scratch, barriers):
        walk = _BackwardWalk(
            place=grid_place(),
            chunks=chunks,
            ring=ring,
            scale=scale,
            gmem=gmem,
            results_gmem=Results(*results_gmem),
            slots=slots,
            scratch=scratch,
            barriers=barriers,
        )
        warpgroup = jax.lax.axis_index("warpgroup")
        pl.when(warpgroup < _PREPARE)(lambda: walk.prepare(warpgroup))
        pl.when(warpgroup == _CARRY)(walk.carry)
        pl.when(warpgroup == _STORE)(walk.store)

    kernel = target.kernel(
        body,
        name="wkv7_state_gradients",
        out_type=Results(
            exits=jax.ShapeDtypeStruct((B, H, chunks, V, K), jnp.bfloat16),
            dW=jax.ShapeDtypeStruct((B, H, chunks, TILE, V), jnp.bfloat16),
            formats=(
                jax.ShapeDtypeStruct((B, chunks, H, V // TILE, 2), jnp.int32)
                if may_be_float16(K)
                else None
            ),
            d_initial=None if from_zero else jax.ShapeDtypeStruct(states, jnp.float32),
        ),
        grid={"value_block": V // TILE, "head": H, "row": B},
        warpgroups=4,
        scratch_types=_scratch_types(ring, blocks),
    )
    r, log_decay, a, b = inputs.r, inputs.log_decay, inputs.a, inputs.b
    return kernel(
        Operands(r, log_decay, a, b, X, formats, do, d_final, prefix_sums(), bounds, transfers)
    )


def _scratch_types(ring: Ring, blocks: int) -> dict[str, Any]:
    def tiles():
        return [tiles_smem(ring.slots)] * blocks

    return {
        "slots": Slots(
            r=tiles(),
            log_decay=tiles(),
            a=tiles(),
            b=tiles(),
            X=tiles_smem(ring.slots),
            do=tiles_smem(ring.slots),
            decays=[plgpu.SMEM((2 * ring.slots + (blocks == 1), TILE), jnp.float32)] * blocks,
        ),
        "scratch": Scratch(
            A=tiles_smem(_PREPARE),
            S_low=[tiles_smem()] * blocks,
            prefix_sums=tiles_smem(),
        ),
        "barriers": Barriers(
            sums_loaded=plgpu.Barrier(),
            loaded=ring.loaded_type(copies=4 * blocks + 2),
            solved=ring.barrier_type(),
            carried=ring.barrier_type(),
        ),
    }
