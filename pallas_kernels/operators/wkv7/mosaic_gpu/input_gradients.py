"""Gradients of the inputs, of all chunks at once."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import divide
from pallas_kernels.hopper.registers import (
    begin_branch,
    load,
    narrow,
    power_of_two,
    store,
    uniform,
)
from pallas_kernels.hopper.ring import Ring
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import (
    Operand,
    anew,
    column_sums,
    load32,
    products,
    store_halves,
    tiles_smem,
    transposed,
)
from pallas_kernels.operators.wkv7.call import WKVInputs
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import (
    before_token,
    decays_from_middle,
    number_of_chunks,
    prefix_sums,
    since_token,
    state_tile,
    tokens_tile,
    until_token,
    values_tile,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.formats import A_EXPONENT, FLOAT16, FLOAT16_BUT_STATE
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds, TileMasks, load_masks

_RING = Ring(slots=2)  # a chunk is worked on while the next one is loaded
_ROWS, _COLUMNS = range(2)  # the warpgroups


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
      inputs: r, log_decay, k, v, a, b, `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      do: `[B, T, H, V]` bfloat16, gradients of the outputs.
      entries: `[B, H, chunks, V, K]` 16 bits, S^.
      U: `[B, H, chunks, 64, V]` 16 bits.
      exits: `[B, H, chunks, V, K]` 16 bits, dS^.
      dW: `[B, H, chunks, 64, V]` 16 bits.
      formats: `[all work, 2]` int32, of `state_gradients`, or None.
      prefix_sums: `[64, 64]` bfloat16.
      bounds: of segments that begin within chunks, or None.
    """

    inputs: WKVInputs
    do: Any
    entries: Any
    U: Any
    exits: Any
    dW: Any
    formats: Any
    prefix_sums: Any
    bounds: SegmentBounds | None


class Slots(NamedTuple):
    """The ring in shared memory; each a tile `[slots, 64, 64]`.

    Attributes:
      r: then r^, of ROWS.
      log_decay: as loaded.
      k: then k^, of COLUMNS.
      a: then a^, of ROWS.
      b: then b^, of COLUMNS.
      v: then one half of the sums that COLUMNS adds to dlog_decay.
      do: as loaded.
      U: then the other half of these sums.
      dW: as loaded.
      S: S^; then one half of what ROWS adds to dlog_decay.
      dS: dS^.
      rows: for ROWS to write dr from; then the other half of what it adds to dlog_decay.
    """

    r: Any
    log_decay: Any
    k: Any
    a: Any
    b: Any
    v: Any
    do: Any
    U: Any
    dW: Any
    S: Any
    dS: Any
    rows: Any


class Scratch(NamedTuple):
    """Shared memory beside the ring.

    Attributes:
      rows: a tile for ROWS to write from.
      columns: tiles `[2, 64, 64]` for COLUMNS to write from.
      prefix_sums: a tile.
    """

    rows: Any
    columns: Any
    prefix_sums: Any


class Barriers(NamedTuple):
    """Barriers of a block.

    Attributes:
      sums_loaded: `prefix_sums` has arrived.
      inputs_loaded: of each slot: r, log_decay, k, a, b have arrived.
      others_loaded: of each slot: the other tiles have arrived.
      rows_ready: of each slot: ROWS has decayed its inputs.
      columns_ready: of each slot: COLUMNS has decayed its inputs, and converted others.
      summed: ROWS has written what it adds to dlog_decay.
    """

    sums_loaded: Any
    inputs_loaded: Any
    others_loaded: Any
    rows_ready: Any
    columns_ready: Any
    summed: Any


class Format(NamedTuple):
    """What the numbers of a chunk are, int32 scalars.

    Attributes:
      number: the first one of `state_gradients.Results.formats`.
      exponent: the second one.
    """

    number: jax.Array
    exponent: jax.Array


class Work[Number](NamedTuple):
    """What a step works on, int32 scalars in a kernel; or the number of each, Python numbers.

    Attributes:
      key_block: which 64 key channels.
      value_block: which 64 value channels.
      head: head of the row.
      chunk: chunk of the row.
      row: row of the batch.
    """

    key_block: Number
    value_block: Number
    head: Number
    chunk: Number
    row: Number


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The chunks of a block: its references, and what its warpgroups do.

    Attributes:
      sizes: of all work.
      workers: number of blocks of the grid; each takes every `workers`-th of all work.
      block: which block this one is.
      steps: number of steps of this block.
      scale: factor on r.
      gmem: references to the operands.
      d_inputs_gmem: references to the gradients, with a leading axis of partial sums.
      slots: references to shared memory.
      scratch: references to shared memory.
      barriers: references.
    """

    sizes: Work[int]
    workers: int
    block: jax.Array
    steps: jax.Array
    scale: float
    gmem: Operands
    d_inputs_gmem: WKVInputs
    slots: Slots
    scratch: Scratch
    barriers: Barriers

    def work_of(self, step: jax.Array) -> Work[jax.Array]:
        """Returns what a step works on."""
        index, work = self.block + step * self.workers, []
        for size in self.sizes:
            index, remainder = divide(index, size)
            work.append(remainder)
        return Work(*work)

    def tiles_of(self, step: jax.Array) -> Slots:
        """Returns the tiles of a step, with addresses that are computed anew."""
        slot = anew(_RING.slot(step))
        return Slots(*(tile.at[slot] for tile in self.slots))

    def masks_of(self, work: Work[jax.Array]) -> TileMasks:
        """Loads the masks of a chunk, at each use: there are no registers to keep them."""
        return load_masks(self.gmem.bounds, work.row, work.chunk)

    def first_operand(self, tile: Any) -> Operand:
        """Loads a tile that is the first operand of several products.

        Where there are masks, they need the registers, and the tile stays in shared memory.
        """
        return load(tile) if self.gmem.bounds is None else tile

    def d_input_tile(self, gmem: Any, work: Work[jax.Array]) -> Any:
        """Returns a tile of the gradient of r, log_decay, k, a or b."""
        gmem = gmem.at[work.value_block]
        return tokens_tile(gmem, work.row, work.chunk, work.head, work.key_block)

    def fetch(self, step: jax.Array) -> None:
        """Starts the copies of a step into its slot."""
        key_block, value_block, head, chunk, row = self.work_of(step)
        t, gmem, inputs = self.tiles_of(step), self.gmem, self.gmem.inputs
        for source, smem in (
            (inputs.log_decay, t.log_decay),
            (inputs.r, t.r),
            (inputs.a, t.a),
            (inputs.k, t.k),
            (inputs.b, t.b),
        ):
            barrier = _RING.loaded(self.barriers.inputs_loaded, step)
            tile = tokens_tile(source, row, chunk, head, key_block)
            plgpu.copy_gmem_to_smem(tile, smem, barrier)
        for source, smem in (
            (tokens_tile(gmem.do, row, chunk, head, value_block), t.do),
            (tokens_tile(inputs.v, row, chunk, head, value_block), t.v),
            (values_tile(gmem.U, row, head, chunk, value_block), t.U),
            (values_tile(gmem.dW, row, head, chunk, value_block), t.dW),
            (state_tile(gmem.entries, row, head, chunk, value_block, key_block), t.S),
            (state_tile(gmem.exits, row, head, chunk, value_block, key_block), t.dS),
        ):
            barrier = _RING.loaded(self.barriers.others_loaded, step)
            plgpu.copy_gmem_to_smem(source, smem, barrier)

    def wait_for_inputs(self, step: jax.Array) -> None:
        """Waits for r, log_decay, k, a, b."""
        plgpu.barrier_wait(_RING.loaded(self.barriers.inputs_loaded, step))

    def wait_for_others(self, step: jax.Array) -> None:
        """Waits for the other tiles."""
        plgpu.barrier_wait(_RING.loaded(self.barriers.others_loaded, step))

    def decays(self, tiles: Slots) -> jax.Array:
        """Returns `decays_from_middle` of a chunk."""
        return decays_from_middle(tiles.log_decay, self.scratch.prefix_sums)

    def format_of(self, step: jax.Array) -> Format | None:
        """Loads what the numbers of a step's chunk are; None if all are bfloat16 in all chunks."""
        if self.gmem.formats is None:
            return None
        index = self.block + jnp.minimum(step, self.steps - 1) * self.workers
        return Format(self.gmem.formats[index, 0], self.gmem.formats[index, 1])

    def in_format[Result](
        self, known: Format | None, work: Callable[[Any, jax.Array | None], Result]
    ) -> Result:
        """Calls a function with a dtype and an exponent, or None in bfloat16."""
        if known is None:
            return work(jnp.bfloat16, None)

        def in_float16():
            begin_branch()
            return work(jnp.float16, known.exponent)

        is_float16 = uniform(known.number) == FLOAT16
        return jax.lax.cond(is_float16, in_float16, lambda: work(jnp.bfloat16, None))

    def rows(self) -> None:
        """Does the work of ROWS."""
        plgpu.barrier_wait(self.barriers.sums_loaded)
        jax.lax.fori_loop(0, self.steps, self._rows, self.format_of(jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)

    def _rows(self, step: jax.Array, known: Format | None) -> Format | None:
        """Does a step, given its format; returns that of the next step."""
        following = self.format_of(step + 1)
        self.in_format(known, functools.partial(self._rows_in, step))
        return following

    def _rows_in(self, step: jax.Array, dtype: Any, exponent: jax.Array | None) -> None:
        work = self.work_of(step)
        self._decay_rows(step, dtype)
        dr, da = self._dr_and_da(step, work, dtype)
        exclusive, inclusive = self._write_dr_and_da(step, work, dr, da, dtype, exponent)
        self._sum_rows(step, work, exclusive, inclusive, dtype)

    def _decay_rows(self, step: jax.Array, dtype: Any) -> None:
        """Writes r^ and a^."""
        t = self.tiles_of(step)
        self.wait_for_inputs(step)
        g = self.decays(t)
        of_r = narrow(load32(t.r) * (until_token(g) * self.scale), dtype)
        of_a = narrow(load32(t.a) * (before_token(g, t.log_decay) * _factor_of_a(dtype)), dtype)
        store((t.r, of_r), (t.a, of_a))
        plgpu.barrier_arrive(self.barriers.rows_ready.at[_RING.slot(step)])

    def _dr_and_da(
        self, step: jax.Array, work: Work[jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns dr^ and da^."""
        t, rounded = self.tiles_of(step), functools.partial(narrow, dtype=dtype)
        self.wait_for_others(step)
        plgpu.barrier_wait(self.barriers.columns_ready.at[_RING.slot(step)])
        do, dW = self.first_operand(t.do), self.first_operand(t.dW)
        sums = ([(x, transposed(y))] for x in (do, dW) for y in (t.v, t.U))
        dA_rk, dA_rb, dA_ak, dA_ab = map(rounded, products(*sums, dtype=dtype))
        dA_rk, dA_rb = self.masks_of(work).lower(dA_rk, dA_rb)
        dA_ak, dA_ab = self.masks_of(work).lower(dA_ak, dA_ab, strictly=True)
        dr, da = products(
            [(self.masks_of(work).entered(do), t.S), (dA_rk, t.k), (dA_rb, t.b)],
            [(self.masks_of(work).entered(dW), t.S), (dA_ak, t.k), (dA_ab, t.b)],
            dtype=dtype,
        )
        return dr, da

    def _write_dr_and_da(
        self,
        step: jax.Array,
        work: Work[jax.Array],
        dr: jax.Array,
        da: jax.Array,
        dtype: Any,
        exponent: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Writes dr and da, and returns `a^ da^` and `r^ dr^ + a^ da^`."""
        t = self.tiles_of(step)
        g = self.decays(t)  # again: there are no registers to keep it
        factor = _without_exponent(exponent)
        dr_gmem = self.d_input_tile(self.d_inputs_gmem.r, work)
        _write(t.rows, dr * (until_token(g) * (self.scale * factor)), dr_gmem)
        of_a = before_token(g, t.log_decay) * (_factor_of_a(dtype) * factor)
        da_gmem = self.d_input_tile(self.d_inputs_gmem.a, work)
        _write(self.scratch.rows, da * of_a, da_gmem)
        exclusive = load32(t.a, dtype) * da
        return exclusive, load32(t.r, dtype) * dr + exclusive

    def _sum_rows(
        self,
        step: jax.Array,
        work: Work[jax.Array],
        exclusive: jax.Array,
        inclusive: jax.Array,
        dtype: Any,
    ) -> None:
        """Writes what r, a and the state that leaves the chunk add to dlog_decay."""
        t, masks = self.tiles_of(step), lambda: self.masks_of(work)
        state, V, U = masks().passing(load32(t.S, dtype)), t.v, t.U
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        if self.gmem.bounds is not None:
            store((t.rows, masks().leaving(load(V))), (t.S, masks().leaving(load(U))))
            V, U = t.rows, t.S
        sums = [(transposed(V), t.k), (transposed(U), t.b)]
        (state,) = products(sums, start=[state], dtype=dtype)
        of_state = state * load32(t.dS, dtype)
        halves = t.rows, t.S
        total = column_sums(masks().upper, store_halves(inclusive, *halves), -exclusive)
        total = column_sums(lambda x: [masks().leaving(x)], store_halves(of_state, *halves), total)
        store_halves(total, *halves)
        plgpu.barrier_arrive(self.barriers.summed)

    def columns(self) -> None:
        """Does the work of COLUMNS, and fetches the chunks."""
        sums_smem, sums_loaded = self.scratch.prefix_sums, self.barriers.sums_loaded
        plgpu.copy_gmem_to_smem(self.gmem.prefix_sums, sums_smem, sums_loaded)
        first = jnp.int32(0)
        self.fetch(first)
        plgpu.barrier_wait(sums_loaded)
        known = self.format_of(first)
        self._decay_columns(first, known)
        jax.lax.fori_loop(0, self.steps, self._columns, known)
        plgpu.wait_smem_to_gmem(0)

    def _columns(self, step: jax.Array, known: Format | None) -> Format | None:
        """Does a step, given its format; returns that of the next step."""
        # The other slot is free: ROWS was done with it before the last sums of the step before.
        _RING.refill(self.fetch, step - 1, self.steps)
        following = self.format_of(step + 1)
        inclusive = self.in_format(known, functools.partial(self._columns_in, step))
        # So that ROWS need not wait for it in the next step.
        pl.when(step + 1 < self.steps)(lambda: self._decay_columns(step + 1, following))
        self._write_dlog_decay(step, inclusive, known)
        return following

    def _columns_in(self, step: jax.Array, dtype: Any, exponent: jax.Array | None) -> jax.Array:
        """Writes dk, db and dv, and returns `k^ dk^ + b^ db^`."""
        work = self.work_of(step)
        dk, db = self._dk_and_db(step, work, dtype)
        inclusive = self._write_dk_and_db(step, work, dk, db, dtype, exponent)
        self._write_dv(step, work, dtype, exponent)
        return inclusive

    def _decay_columns(self, step: jax.Array, known: Format | None) -> None:
        """Writes k^ and b^, and converts what has another format."""
        self.wait_for_inputs(step)
        self.in_format(known, lambda dtype, _: self._write_k_and_b(step, dtype))
        self.wait_for_others(step)
        if known is not None:
            number = uniform(known.number)
            pl.when(number == FLOAT16)(lambda: self._to_float16(step, known.exponent))
            pl.when(number == FLOAT16_BUT_STATE)(lambda: self._to_bfloat16(step))
        plgpu.barrier_arrive(self.barriers.columns_ready.at[_RING.slot(step)])

    def _write_k_and_b(self, step: jax.Array, dtype: Any) -> None:
        t = self.tiles_of(step)
        since = since_token(self.decays(t))
        store(*((tile, narrow(load32(tile) * since, dtype)) for tile in (t.k, t.b)))

    def _to_float16(self, step: jax.Array, exponent: jax.Array) -> None:
        """Converts v and dO."""
        t = self.tiles_of(step)
        do = load32(t.do) * power_of_two(exponent)
        store((t.v, narrow(load32(t.v), jnp.float16)), (t.do, narrow(do, jnp.float16)))

    def _to_bfloat16(self, step: jax.Array) -> None:
        """Converts U and S^."""
        t = self.tiles_of(step)
        store(*((tile, narrow(load32(tile, jnp.float16))) for tile in (t.U, t.S)))

    def _dk_and_db(
        self, step: jax.Array, work: Work[jax.Array], dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns dk^ and db^."""
        t, rounded = self.tiles_of(step), functools.partial(narrow, dtype=dtype)
        v, U = self.first_operand(t.v), self.first_operand(t.U)
        sums = ([(x, transposed(y))] for y in (t.do, t.dW) for x in (v, U))
        dA_rk, dA_rb, dA_ak, dA_ab = map(rounded, products(*sums, dtype=dtype))  # transposed
        dA_rk, dA_rb = self.masks_of(work).upper(dA_rk, dA_rb)
        dA_ak, dA_ab = self.masks_of(work).upper(dA_ak, dA_ab, strictly=True)
        plgpu.barrier_wait(self.barriers.rows_ready.at[_RING.slot(step)])
        dk, db = products(
            [(self.masks_of(work).leaving(v), t.dS), (dA_rk, t.r), (dA_ak, t.a)],
            [(self.masks_of(work).leaving(U), t.dS), (dA_rb, t.r), (dA_ab, t.a)],
            dtype=dtype,
        )
        return dk, db

    def _write_dk_and_db(
        self,
        step: jax.Array,
        work: Work[jax.Array],
        dk: jax.Array,
        db: jax.Array,
        dtype: Any,
        exponent: jax.Array | None,
    ) -> jax.Array:
        """Writes dk and db, and returns `k^ dk^ + b^ db^`."""
        t = self.tiles_of(step)
        since = since_token(self.decays(t)) * _without_exponent(exponent)
        dk_gmem = self.d_input_tile(self.d_inputs_gmem.k, work)
        _write(self.scratch.columns.at[0], dk * since, dk_gmem)
        db_gmem = self.d_input_tile(self.d_inputs_gmem.b, work)
        _write(self.scratch.columns.at[1], db * since, db_gmem)
        return load32(t.k, dtype) * dk + load32(t.b, dtype) * db

    def _write_dv(
        self, step: jax.Array, work: Work[jax.Array], dtype: Any, exponent: jax.Array | None
    ) -> None:
        t, masks = self.tiles_of(step), lambda: self.masks_of(work)
        k = self.first_operand(t.k)
        # Transposed:
        A_rk, A_ak = products([(k, transposed(t.r))], [(k, transposed(t.a))], dtype=dtype)
        (A_rk,) = masks().upper(narrow(A_rk, dtype))
        (A_ak,) = masks().upper(narrow(A_ak, dtype), strictly=True)
        sums = [(masks().leaving(k), transposed(t.dS)), (A_rk, t.do), (A_ak, t.dW)]
        (dv,) = products(sums, dtype=dtype)
        dv_gmem = self.d_inputs_gmem.v.at[work.key_block]
        dv_tile = tokens_tile(dv_gmem, work.row, work.chunk, work.head, work.value_block)
        _write(self.scratch.columns.at[0], dv * _without_exponent(exponent), dv_tile)

    def _write_dlog_decay(
        self, step: jax.Array, inclusive: jax.Array, known: Format | None
    ) -> None:
        work = self.work_of(step)
        t, masks = self.tiles_of(step), lambda: self.masks_of(work)
        plgpu.barrier_wait(self.barriers.summed)
        of_rows = load32(t.rows) + load32(t.S)
        total = column_sums(masks().upper, store_halves(-inclusive, t.v, t.U), of_rows)
        if known is not None:
            is_float16 = uniform(known.number) == FLOAT16
            total *= jnp.where(is_float16, power_of_two(-known.exponent), jnp.float32(1))
        dlog_decay_gmem = self.d_input_tile(self.d_inputs_gmem.log_decay, work)
        _write(self.scratch.columns.at[1], total, dlog_decay_gmem)


def _factor_of_a(dtype: Any) -> float:
    """Returns what a is multiplied by, and dW divided by."""
    return 2.0**A_EXPONENT if dtype == jnp.float16 else 1.0


def _without_exponent(exponent: jax.Array | None) -> jax.Array | float:
    """Returns what gradients are multiplied by to make up for the exponent."""
    return 1.0 if exponent is None else power_of_two(-exponent)


def _write(smem: Any, gradient: jax.Array, gmem: Any) -> None:
    """Writes a gradient to global memory through a tile of shared memory.

    A warpgroup uses two tiles in turn: it waits until the copy from this one has been read.
    """
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    store((smem, narrow(gradient)))
    plgpu.copy_smem_to_gmem(smem, gmem)


def input_gradients(
    target: Target,
    inputs: WKVInputs,
    do: jax.Array,
    entries: jax.Array,
    U: jax.Array,
    exits: jax.Array,
    dW: jax.Array,
    formats: jax.Array | None,
    bounds: SegmentBounds | None,
    *,
    scale: float,
) -> WKVInputs:
    """Computes the gradients of the inputs, given what the two walks have computed.

    With everything decayed to the middle of the chunk, as in `chunk`, and the matrices A masked:

        dA_rk = dO V^T    dA_rb = dO U^T           dA_ak = dW V^T                  dA_ab = dW U^T
        dr^  = dO S^^T + dA_rk k^ + dA_rb b^       da^ = dW S^^T + dA_ak k^ + dA_ab b^
        dk^  = V dS^^T + dA_rk^T r^ + dA_ak^T a^   db^ = U dS^^T + dA_rb^T r^ + dA_ab^T a^
        dV   = k^ dS^ + A_rk^T dO + A_ak^T dW

    The log decay of token j takes part in `r^_i` and `a^_i` of later tokens, in `k^_i` and `b^_i`
    of earlier ones, and in the state S1 that leaves the chunk:

        dlog_decay_j = sum_{i >= j} (r^ dr^ - k^ dk^ - b^ db^)_i + sum_{i > j} (a^ da^)_i
                       + sum_V S1 dS1

    Where `state_gradients` left a chunk in float16, all this is computed in float16. dO is then
    multiplied by the same power of two as dS^ and dW, and gradients are divided by it at the end.

    A step works on a chunk of one head, 64 key channels and 64 value channels. There is a block of
    the grid for each multiprocessor, which has two warpgroups:

        ROWS:     dr and da, with a row for each reading token; what they, and S1, add to dlog_decay
        COLUMNS:  dk, db and dv, with a row for each writing token; dlog_decay

    Each warpgroup decays the inputs whose gradients it computes. Each block of value channels gives
    a partial sum of dr, dlog_decay, dk, da, db, and each block of key channels one of dv.

    Args:
      target: what the kernel is compiled for.
      inputs: `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      do: `[B, T, H, V]` bfloat16, gradients of the outputs.
      entries: `[B, H, chunks, V, K]` 16 bits, S^ of each chunk, of `outputs`.
      U: `[B, H, chunks, 64, V]` 16 bits, of `outputs`.
      exits: `[B, H, chunks, V, K]` 16 bits, dS^ of each chunk, of `state_gradients`.
      dW: `[B, H, chunks, 64, V]` 16 bits, of `state_gradients`.
      formats: what the numbers of each chunk are, of `state_gradients`; None if all are bfloat16.
      bounds: of segments that begin within chunks, or None.
      scale: factor on the outputs.

    Returns:
      The gradients, in bfloat16 and the shapes of the inputs.
    """
    B, T, H, K = inputs.r.shape
    key_blocks, value_blocks = K // TILE, inputs.v.shape[-1] // TILE
    sizes = Work(key_blocks, value_blocks, H, number_of_chunks(T), B)
    total = math.prod(sizes)
    workers = min(target.multiprocessors, total)

    def body(gmem, *d_inputs_gmem, slots, scratch, barriers):
        block = jax.lax.axis_index("block")
        chunks = _Gradients(
            sizes=sizes,
            workers=workers,
            block=block,
            steps=jax.lax.div(total - 1 - block + workers, workers),
            scale=scale,
            gmem=gmem,
            d_inputs_gmem=WKVInputs(*d_inputs_gmem),
            slots=slots,
            scratch=scratch,
            barriers=barriers,
        )
        warpgroup = jax.lax.axis_index("warpgroup")
        pl.when(warpgroup == _ROWS)(chunks.rows)
        pl.when(warpgroup == _COLUMNS)(chunks.columns)

    partial_sums = WKVInputs(*[value_blocks] * 6)._replace(v=key_blocks)
    kernel = target.kernel(
        body,
        name="wkv7_input_gradients",
        out_type=WKVInputs(
            *(
                jax.ShapeDtypeStruct((count, *x.shape), jnp.bfloat16)
                for count, x in zip(partial_sums, inputs, strict=True)
            )
        ),
        grid={"block": workers},
        warpgroups=2,
        scratch_types={
            "slots": Slots(*[tiles_smem(_RING.slots)] * len(Slots._fields)),
            "scratch": Scratch(tiles_smem(), tiles_smem(2), tiles_smem()),
            "barriers": Barriers(
                sums_loaded=plgpu.Barrier(),
                inputs_loaded=_RING.loaded_type(copies=5),
                others_loaded=_RING.loaded_type(copies=6),
                rows_ready=_RING.barrier_type(),
                columns_ready=_RING.barrier_type(),
                summed=plgpu.Barrier(),
            ),
        },
    )
    if formats is not None:
        formats = formats.reshape(total, 2)
    operands = Operands(inputs, do, entries, U, exits, dW, formats, prefix_sums(), bounds)
    return WKVInputs(*map(_sum, kernel(operands)))


def _sum(partial_sums: jax.Array) -> jax.Array:
    """Adds up partial sums `[n, ...]` in float32, and returns them in their dtype."""
    if len(partial_sums) == 1:
        return partial_sums[0]
    return jnp.sum(partial_sums.astype(jnp.float32), axis=0).astype(partial_sums.dtype)
