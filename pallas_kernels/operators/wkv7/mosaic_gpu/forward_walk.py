"""The walk over the chunks of a row from first to last, as a kernel.

`outputs` and `transitions` are such kernels. Each block of the grid makes its walks one after
another, without a pause between them. It has four warpgroups: two PREPARE chunks in turn, one
CARRIES the state, and the kernels differ in what the last one does. Chunks lie in a ring of slots
in shared memory:

    global memory -> PREPARE -> CARRY -> the last warpgroup -> global memory
          ^                                     |
          +------- the slot is free again ------+

    PREPARE:  a^, k^, b^, and r^ if there are outputs;  X, unless it is given
    CARRY:    X a^, X A_ak;  U = (X A_ak) V + (X a^) S^,
              S' = (S^ + k^^T V + b^^T U) exp(gL - m), the only chain

Operands of products have 16 bits: bfloat16, or float16 where a chunk forgets little and its numbers
are within the range of float16. That has eight times the precision, and such chunks need it: what
their tokens write differs little from one to the next, and the state keeps the errors. PREPARE
chooses for each chunk. What CARRY cannot hold in float16, the state and U, it keeps in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place
from pallas_kernels.hopper.registers import (
    Strip,
    are_between,
    begin_branch,
    halves_of,
    load,
    narrow,
    store,
    store_strips,
    widen,
)
from pallas_kernels.hopper.ring import Ring, slots_that_fit
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    TILE_BYTES,
    anew,
    for_each_strip,
    load32,
    products,
    spread_rows,
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
    little_decay,
    prefix_sums,
    since_token,
    store_decays_of_chunk,
    tokens_tile,
    until_token,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT16_BUT_STATE,
    Formats,
    may_be_float16,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.inverse import invert
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds, TileMasks, load_masks
from pallas_kernels.operators.wkv7.mosaic_gpu.walk import (
    Chunk,
    advance,
    advance_in_float16,
    chunk_tiles,
    solve,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.walks import Walks

_PREPARE, _CARRY, _LAST = 2, 2, 3  # warpgroups 0 and 1 prepare

_LEAST = 2.0**-8
"""Where the largest numbers are smaller, float16 has fewer digits than bfloat16 has."""

_MOST = {"r": 8.0, "k": 16.0, "v": 256.0, "a": 1.0, "b": 2.0}
"""With these and `_MOST_ROW`, no product of two operands exceeds float16, but for U."""

_MOST_ROW = 8.0
"""Sum of magnitudes in a row of X. RWKV-7 keeps to 5."""

_MOST_U = _MOST["v"]
"""The gradients multiply U by what they multiply v by."""


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
      inputs: r, log_decay, k, v, a, b, `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: `[B, H, chunks, 64, 64]` bfloat16, of `inverses`. None to compute it here: there is room
        for that if K and V are 64.
      initial_state: `[B, N, H, V, K]` float32; N is the number of pieces that are walked, or the
        number of segments if there are transfers. None for zeros, if N is 1.
      prefix_sums: `[64, 64]` bfloat16.
      bounds: of segments that begin within chunks, or None.
      transfers: of the states of segments, or None if a walk has one initial and one final state.
      zeros: `[64, 64]` bfloat16, if blocks of values that v does not have stand for zeros.
    """

    inputs: WKVInputs
    X: Any
    initial_state: Any
    prefix_sums: Any
    bounds: SegmentBounds | None
    transfers: Transfers | None
    zeros: Any


class Results(NamedTuple):
    """What the kernel writes; only `final` is always asked for.

    Attributes:
      final: `[B, N, H, V, K]` float32, like the initial state.
      o: `[B, T, H, V]` bfloat16, the outputs.
      entries: `[B, H, chunks, V, K]` 16 bits, S^ of each chunk.
      U: `[B, H, chunks, 64, V]` 16 bits.
      X: `[B, H, chunks, 64, 64]` 16 bits, if it is computed here.
      formats: `[B, H, chunks, blocks of 64 values, 2]` int32. The first one is what the chunk's
        numbers are, among these S^ and U: BFLOAT16, FLOAT16 or FLOAT16_BUT_STATE. The second one is
        1 if X is float16, or 0 for bfloat16. None if all numbers are bfloat16.
    """

    final: Any
    o: Any = None
    entries: Any = None
    U: Any = None
    X: Any = None
    formats: Any = None


class Slots(NamedTuple):
    """The ring in shared memory. Lists have an entry for each 64 key channels.

    Attributes:
      r: tiles `[slots, 64, 64]`; then r^. Empty if there are no outputs.
      log_decay: tiles; then the low half of a^, R and U of `Chunk`.
      k: tiles; then k^.
      v: tiles, of 64 value channels.
      a: tiles; then the high half of a^, and S^.
      b: tiles; then b^.
      X: tiles.
      decays: float32 `[2 slots + 1, 64]`, exp(m) and exp(gL - m) of each slot, and in the last row,
        if there is a choice, `Formats`. They have no array of their own because memory for an array
        is a multiple of 1 KiB, and all the rest is taken.
    """

    r: list[Any]
    log_decay: list[Any]
    k: list[Any]
    v: Any
    a: list[Any]
    b: list[Any]
    X: Any
    decays: list[Any]


class Scratch(NamedTuple):
    """Shared memory beside the ring.

    Attributes:
      S_low: tiles `[1, 64, 64]` for each 64 key channels, the low half of S^.
      for_inverse: two tiles `[2, 64, 64]`, an entry for each warpgroup that prepares, where X is
        computed; else empty.
      o: a tile, if there are outputs.
      prefix_sums: a tile.
    """

    S_low: list[Any]
    for_inverse: list[Any]
    o: Any
    prefix_sums: Any


class Barriers(NamedTuple):
    """Barriers of a block; all but the first one are of slots.

    Attributes:
      sums_loaded: `prefix_sums` has arrived.
      loaded: a chunk has arrived.
      decayed: r^, k^, b^ are ready; if there are outputs.
      prepared: X and a^ are ready too.
      carried: S^ and U are ready.
    """

    sums_loaded: Any
    loaded: Any
    decayed: Any
    prepared: Any
    carried: Any


@dataclasses.dataclass(frozen=True)
class ForwardWalk:
    """The walks of a block: its references, and what its warpgroups do.

    Attributes:
      walks: which walks there are.
      own_walks: number of walks of this block.
      steps: number of their chunks.
      ring: of `slots`.
      scale: factor on r.
      gmem: references to the operands.
      final_gmem: reference to the final states.
      slots: references to shared memory.
      scratch: references to shared memory.
      barriers: references.
    """

    walks: Walks
    own_walks: jax.Array
    steps: jax.Array
    ring: Ring
    scale: float
    gmem: Operands
    final_gmem: Any
    slots: Slots
    scratch: Scratch
    barriers: Barriers

    def fetch(self, step: jax.Array) -> None:
        """Starts the copies of a step's chunk into its slot."""
        (row, head, value_block), chunk = self.walks.chunk_at(step)
        inputs, slots = self.gmem.inputs, self.slots

        def copy(*pairs):
            self.ring.copy(step, self.barriers.loaded, pairs)

        for gmem, tiles in (
            (inputs.log_decay, slots.log_decay),
            (inputs.b, slots.b),
            (inputs.k, slots.k),
            (inputs.a, slots.a),
            (inputs.r, slots.r),
        ):
            for j, tile in enumerate(tiles):
                copy((tokens_tile(gmem, row, chunk, head, j), tile))
        values = (tokens_tile(inputs.v, row, chunk, head, value_block), slots.v)
        if self.gmem.zeros is None:
            copy(values)
        else:
            in_v = value_block < inputs.v.shape[-1] // TILE
            pl.when(in_v)(lambda: copy(values))
            pl.when(~in_v)(lambda: copy((self.gmem.zeros, slots.v)))
        if self.gmem.X is not None:
            copy((self.gmem.X.at[row, head, chunk], slots.X))

    def refill(self, step: jax.Array) -> None:
        """Fetches the next chunk into a step's slot, which nobody needs any more."""
        self.ring.refill(self.fetch, step, self.steps)

    def r_in(self, slot: jax.Array) -> list[Any]:
        """Returns the tiles of r in a slot."""
        return [tile.at[slot] for tile in self.slots.r]

    def chunk_in(self, slot: jax.Array) -> Chunk:
        """Returns the tiles of a slot with the names they have in `walk`."""

        def at(tiles):
            return [tile.at[slot] for tile in tiles]

        slots = self.slots
        return chunk_tiles(
            x_high=at(slots.a),
            x_low=at(slots.log_decay),
            y=at(slots.k),
            z=at(slots.b),
            Y=slots.v.at[slot],
            X=slots.X.at[slot],
            before=[decays.at[2 * slot] for decays in slots.decays],
            after=[decays.at[2 * slot + 1] for decays in slots.decays],
        )

    @property
    def chooses(self) -> bool:
        """Whether a chunk's numbers may be float16."""
        return may_be_float16(TILE * len(self.slots.k))

    @property
    def formats(self) -> Formats:
        """What the numbers in the slots are, if they may be float16."""
        (decays,) = self.slots.decays
        return Formats(decays.at[2 * self.ring.slots], self.ring.slots)

    def masks_of(self, place: Place, chunk: jax.Array) -> TileMasks:
        """Loads the masks of a chunk."""
        return load_masks(self.gmem.bounds, place.row, chunk)

    def for_each_walk(self, work: Callable[[jax.Array], None]) -> None:
        """Calls a function for each walk of this block."""
        jax.lax.fori_loop(0, self.own_walks, lambda walk, _: work(walk), None)

    def for_each_chunk[Carry](
        self,
        walk: jax.Array,
        work: Callable[[jax.Array, Place, jax.Array, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Calls a function for each chunk of a walk.

        Args:
          walk: number of the walk.
          work: from the step, where it takes place, the chunk, and the carry, to the next carry.
          carry: for the first chunk.

        Returns:
          The carry after the last chunk.
        """

        def step(i, carry):
            place, piece = self.walks.place(walk)
            chunk = self.walks.first_chunk(piece) + i
            return work(self.walks.step(walk, i), place, chunk, carry)

        _, piece = self.walks.place(walk)
        return jax.lax.fori_loop(0, self.walks.length(piece), step, carry)

    def prepare(self, warpgroup: jax.Array) -> None:
        """Prepares every second step, as one of two warpgroups."""
        plgpu.barrier_wait(self.barriers.sums_loaded)
        prepare = functools.partial(self._prepare, warpgroup)
        self.ring.for_each_in_turn(warpgroup, self.steps, prepare)

    def _prepare(self, warpgroup: jax.Array, step: jax.Array) -> None:
        slot = anew(self.ring.slot(step))
        plgpu.barrier_wait(self.ring.loaded(self.barriers.loaded, step))
        in_bfloat16, in_float16 = (
            functools.partial(prepare, warpgroup, step, slot)
            for prepare in (self._prepare_bfloat16, self._prepare_float16)
        )
        if not self.chooses:
            in_bfloat16()
        else:
            jax.lax.cond(self._fits_float16(slot), in_float16, in_bfloat16)

    def _fits_float16(self, slot: jax.Array) -> jax.Array:
        """Returns whether a chunk is to be prepared in float16."""

        def log_decay(strip):
            return little_decay(self.chunk_in(anew(slot)).x_low[0], strip)

        def in_range():
            t = self.chunk_in(anew(slot))
            tiles = {"k": t.y[0], "v": t.Y, "a": t.x_high[0], "b": t.z[0]}
            bounds = [(load(tile), _LEAST, _MOST[name]) for name, tile in tiles.items()]
            bounds.append(log_decay(0))
            for r in self.r_in(anew(slot)):
                by_scale = 1 / max(abs(self.scale), _LEAST)
                bounds.append((load(r), _LEAST * by_scale, _MOST["r"] * by_scale))
            within = are_between(*bounds)
            if self.gmem.X is None:
                return within
            return within & self._rows_fit(load32(t.X))

        # Half of the channels show it where a chunk forgets much. As RWKV-7 begins to train, the
        # last channels of a head forget most.
        forgets_little = are_between(log_decay(1))
        return jax.lax.cond(forgets_little, in_range, lambda: jnp.bool_(False))

    def _rows_fit(self, X: jax.Array) -> jax.Array:
        """Returns whether products with X, float32, stay within the range of float16."""
        sums = jnp.sum(jnp.abs(X), axis=1)
        return are_between((spread_rows(sums, 8), 0.0, _MOST_ROW))

    def _prepare_bfloat16(self, warpgroup: jax.Array, step: jax.Array, slot: jax.Array) -> None:
        for j in range(len(self.slots.k)):
            for_each_strip(functools.partial(self._decay, slot, j, warpgroup, jnp.bfloat16))
        if self.chooses:
            self.formats.choose(slot, BFLOAT16)
        self._arrive_decayed(slot)
        if self.gmem.X is None:
            self._invert(step, slot, warpgroup)
        plgpu.barrier_arrive(self.barriers.prepared.at[slot])

    def _prepare_float16(self, warpgroup: jax.Array, step: jax.Array, slot: jax.Array) -> None:
        for_each_strip(functools.partial(self._decay, slot, 0, warpgroup, jnp.float16))
        t = self.chunk_in(anew(slot))
        store((t.Y, narrow(load32(t.Y), jnp.float16)))
        self.formats.choose(slot, FLOAT16)
        if self.gmem.X is None:
            fits = self._invert(step, slot, warpgroup, in_float16=True)
            pl.when(~fits)(lambda: self._return_to_bfloat16(slot))
        self._arrive_decayed(slot)
        plgpu.barrier_arrive(self.barriers.prepared.at[slot])

    def _arrive_decayed(self, slot: jax.Array) -> None:
        if self.slots.r:  # else nobody waits for it
            plgpu.barrier_arrive(self.barriers.decayed.at[slot])

    def _return_to_bfloat16(self, slot: jax.Array) -> None:
        """Converts a chunk that is prepared in float16, all but X."""
        t = self.chunk_in(anew(slot))
        tiles = (*t.x_high, *t.x_low, *t.y, *t.z, t.Y, *self.r_in(anew(slot)))
        for tile in tiles:
            store((tile, narrow(load32(tile, jnp.float16))))
        self.formats.choose(slot, BFLOAT16)

    def _decay(
        self, slot: jax.Array, j: int, warpgroup: jax.Array, dtype: Any, strip: jax.Array
    ) -> None:
        """Writes r^, k^, a^, b^ for a strip of 32 key channels, among the j-th 64."""
        slot = anew(slot)
        r, t = self.r_in(slot), self.chunk_in(slot)
        log_decay, a, k, b = (Strip(x[j], strip) for x in (t.x_low, t.x_high, t.y, t.z))
        g = decays_from_middle(log_decay, self.scratch.prefix_sums)
        store_decays_of_chunk(log_decay, g, t.before[j], t.after[j])
        since = since_token(g)
        b_high, b_low = halves_of(load32(b) * since, dtype)
        of_k = narrow(load32(k) * since, dtype)
        a_high, a_low = halves_of(load32(a) * before_token(g, log_decay), dtype)
        values = [(t.x_high[j], a_high), (t.x_low[j], a_low), (t.y[j], of_k), (t.z[j], b_high)]
        if self.gmem.X is None:
            values.append((self.scratch.for_inverse[0].at[anew(warpgroup)], b_low))
        if r:
            of_r = load32(Strip(r[j], strip)) * (until_token(g) * self.scale)
            values.append((r[j], narrow(of_r, dtype)))
        store_strips(strip, *values)

    def _invert(
        self, step: jax.Array, slot: jax.Array, warpgroup: jax.Array, *, in_float16: bool = False
    ) -> Any:
        """Writes X; K is 64.

        Args:
          step: which chunk.
          slot: where it is.
          warpgroup: which one this is.
          in_float16: whether the other tiles are float16, and X, too, if it fits.

        Returns:
          Whether X fits, a boolean scalar, if `in_float16`.
        """
        dtype = jnp.float16 if in_float16 else jnp.bfloat16
        masks = self.masks_of(*self.walks.chunk_at(step))
        t = self.chunk_in(anew(slot))
        (a,), (a_low,), (b,) = t.x_high, t.x_low, t.z
        b_low, second = (x.at[anew(warpgroup)] for x in self.scratch.for_inverse)
        pairs = ((a, b), (a_low, b), (a, b_low))
        (A,) = products([(x, transposed(y)) for x, y in pairs], dtype=dtype)
        A_high, A_low = masks.lower(*halves_of(A), strictly=True)
        packed, fits = self.gmem.bounds is not None, self._rows_fit if in_float16 else None
        return invert(A_high, A_low, b_low, second, t.X, packed=packed, fits_float16=fits)

    def carry(self) -> None:
        """Carries the state through all walks of this block."""

        def work(walk):
            place, piece = self.walks.place(walk)
            if self.gmem.initial_state is None:
                state = carried_state.zero_state(len(self.slots.k))
            else:
                state = carried_state.load_state_tiles(self.gmem.initial_state, piece, place)
            state = self.for_each_chunk(walk, self._carry, state)
            if self.gmem.transfers is None:
                carried_state.store_state_tiles(state, self.final_gmem, piece, place)

        self.for_each_walk(work)

    def _carry(self, step: jax.Array, place: Place, chunk: jax.Array, state: State) -> State:
        slot, transfers = anew(self.ring.slot(step)), self.gmem.transfers
        plgpu.barrier_wait(self.barriers.prepared.at[slot])
        in_bfloat16, in_float16 = (
            functools.partial(advance, slot, place, chunk, state)
            for advance in (self._advance_bfloat16, self._advance_float16)
        )
        if not self.chooses:
            state = in_bfloat16()
        else:
            chosen = self.formats.chosen(slot)
            state = jax.lax.cond(chosen == FLOAT16, in_float16, in_bfloat16)
        plgpu.barrier_arrive(self.barriers.carried.at[slot])
        if transfers is not None:
            carried_state.leave(state, self.final_gmem, transfers, place, chunk)
        return state

    def _entering(self, state: State, place: Place, chunk: jax.Array) -> State:
        """Returns the state that a chunk starts from, given the one after the chunk before."""
        if self.gmem.transfers is None:
            return state
        return carried_state.enter(
            state, self.gmem.initial_state, self.gmem.transfers, place, chunk
        )

    def _low_tiles(self) -> list[Any]:
        return [tile.at[anew(0)] for tile in self.scratch.S_low]

    def _solve(self, slot: jax.Array, masks: TileMasks, dtype: Any) -> jax.Array:
        """Writes R of a chunk, and returns XA."""
        t = self.chunk_in(anew(slot))
        selects = self.gmem.bounds is not None
        selections = [(masks.entered, [*t.x_high, *t.x_low])] if selects else []
        lower = functools.partial(masks.lower, strictly=True)
        X = load(t.X)
        if dtype == jnp.float16 and self.gmem.X is not None:
            X = narrow(widen(X), dtype)
        return solve(t, X, lower, selections, (t.x_high[0], self._low_tiles()[0]), dtype)

    def _advance_bfloat16(
        self, slot: jax.Array, place: Place, chunk: jax.Array, state: State
    ) -> State:
        masks, selecting = self.masks_of(place, chunk), self.gmem.bounds is not None
        XA = self._solve(slot, masks, jnp.bfloat16)
        t = self.chunk_in(anew(slot))
        state = self._entering(state, place, chunk)
        return advance(t, state, masks, self._low_tiles(), XA, selecting=selecting)

    def _advance_float16(
        self, slot: jax.Array, place: Place, chunk: jax.Array, state: State
    ) -> State:
        begin_branch()
        masks, selecting = self.masks_of(place, chunk), self.gmem.bounds is not None
        XA = self._solve(slot, masks, jnp.float16)
        return advance_in_float16(
            lambda: self.chunk_in(anew(slot)),
            self._entering(state, place, chunk),
            masks,
            self._low_tiles,
            XA,
            _MOST_U,
            lambda: self.formats.change(slot, FLOAT16_BUT_STATE),
            selecting=selecting,
        )

    def start_copies(self) -> None:
        """Fetches the constants and the first chunks."""
        sums_smem, loaded = self.scratch.prefix_sums, self.barriers.sums_loaded
        plgpu.copy_gmem_to_smem(self.gmem.prefix_sums, sums_smem, loaded)
        self.ring.fill(self.fetch, self.steps)


def forward_walk(
    target: Target,
    name: str,
    operands: Operands,
    results: Results,
    last_warpgroup: Callable[[ForwardWalk, Results], None],
    *,
    scale: float,
    pieces: int,
) -> Results:
    """Runs the kernel.

    Args:
      target: what the kernel is compiled for.
      name: of the kernel.
      operands: all but the prefix sums.
      results: shapes and dtypes.
      last_warpgroup: does the work of the last warpgroup, given references to the results. It
        calls `start_copies`, waits for each chunk to be carried, and calls `refill` after it.
      scale: factor on r.
      pieces: into how many pieces the chunks of a row are divided.

    Raises:
      ValueError: if there are pieces, and more walks than multiprocessors.
    """
    B, T, H, K = operands.inputs.r.shape
    _, N, _, values, _ = results.final.shape
    outputs, inverting = results.o is not None, operands.X is None
    walks = Walks(
        rows=B,
        heads=H,
        value_blocks=values // TILE,
        chunks=T // TILE,
        pieces=pieces,
        walked_pieces=N if operands.transfers is None else 1,
        multiprocessors=target.multiprocessors,
    )
    if pieces > 1 and (walks.workers < walks.count or operands.transfers is not None):
        raise ValueError(f"{walks.count} walks in {pieces=} need as many multiprocessors")
    blocks = K // TILE
    slots = slots_that_fit(
        ((4 + outputs) * blocks + 2) * TILE_BYTES,
        others=(1 + 4 * inverting + outputs + blocks) * TILE_BYTES,
        most=3 + (not outputs),
    )
    ring = Ring(slots, in_turn=_PREPARE)

    def body(gmem, *results_gmem, slots, scratch, barriers):
        walk = ForwardWalk(
            walks=walks,
            own_walks=walks.own(),
            steps=walks.steps(),
            ring=ring,
            scale=scale,
            gmem=gmem,
            final_gmem=Results(*results_gmem).final,
            slots=slots,
            scratch=scratch,
            barriers=barriers,
        )
        warpgroup = jax.lax.axis_index("warpgroup")
        pl.when(warpgroup < _PREPARE)(lambda: walk.prepare(warpgroup))
        pl.when(warpgroup == _CARRY)(walk.carry)
        pl.when(warpgroup == _LAST)(lambda: last_warpgroup(walk, Results(*results_gmem)))

    kernel = target.kernel(
        body,
        name=name,
        out_type=results,
        grid={"block": walks.workers},
        warpgroups=4,
        scratch_types=_scratch_types(ring, blocks, outputs=outputs, inverting=inverting),
    )
    return kernel(operands._replace(prefix_sums=prefix_sums()))


def _scratch_types(ring: Ring, blocks: int, *, outputs: bool, inverting: bool) -> dict[str, Any]:
    def tiles():
        return [tiles_smem(ring.slots)] * blocks

    copies = (4 + outputs) * blocks + 1 + (not inverting)
    return {
        "slots": Slots(
            r=tiles() if outputs else [],
            log_decay=tiles(),
            k=tiles(),
            v=tiles_smem(ring.slots),
            a=tiles(),
            b=tiles(),
            X=tiles_smem(ring.slots),
            decays=[plgpu.SMEM((2 * ring.slots + (blocks == 1), TILE), jnp.float32)] * blocks,
        ),
        "scratch": Scratch(
            S_low=[tiles_smem(1)] * blocks,
            for_inverse=[tiles_smem(_PREPARE)] * 2 if inverting else [],
            o=tiles_smem() if outputs else None,
            prefix_sums=tiles_smem(),
        ),
        "barriers": Barriers(
            sums_loaded=plgpu.Barrier(),
            loaded=ring.loaded_type(copies),
            decayed=ring.barrier_type(),
            prepared=ring.barrier_type(),
            carried=ring.barrier_type(),
        ),
    }
