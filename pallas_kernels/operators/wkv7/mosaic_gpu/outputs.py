"""Outputs and states, in one walk over the chunks of each row and head."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place
from pallas_kernels.hopper.registers import load, narrow, store, widen
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.hopper.tiles import anew, products, transposed
from pallas_kernels.operators.wkv7.call import WKVInputs
from pallas_kernels.operators.wkv7.chunk_alignment import Transfers
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import (
    number_of_chunks,
    state_tile,
    tokens_tile,
    values_tile,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.formats import BFLOAT16, FLOAT16, may_be_float16
from pallas_kernels.operators.wkv7.mosaic_gpu.forward_walk import (
    ForwardWalk,
    Operands,
    Results,
    forward_walk,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds


def outputs(
    target: Target,
    inputs: WKVInputs,
    X: jax.Array | None,
    initial_state: jax.Array | None,
    bounds: SegmentBounds | None,
    transfers: Transfers | None,
    *,
    scale: float,
    save: bool,
    pieces: int = 1,
) -> Results:
    """Computes outputs, final states, and what the backward needs of the walk.

    A walk is over the chunks of one row, head and block of 64 values, as `forward_walk` explains.
    Its last warpgroup

        OUTPUT:   computes A_rk and A_rb while CARRY works, then o = r^ S^ + A_rk V + A_rb U

    There is room for three chunks, so the time until a slot is free again matters most: a warpgroup
    that needs little of a chunk begins when that little is there. Shared memory is the busiest
    unit, so X and r^, the first operands of several products, are read to registers once.

    Args:
      target: what the kernel is compiled for.
      inputs: `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: `[B, H, chunks, 64, 64]` bfloat16, of `inverses`. None to compute it here, for K and V of
        64.
      initial_state: `[B, N, H, V, K]` float32; if there are pieces, N is their number. None for
        zeros, if N is 1.
      bounds: of segments that begin within chunks, or None.
      transfers: which of the N states a chunk starts from and which one it ends, `[B, chunks]`
        int32; None if N is 1 or there are pieces.
      scale: factor on the outputs.
      save: whether to return what the backward needs.
      pieces: into how many pieces the chunks of a row are divided, each with a state of its own. If
        more than one, there must be a multiprocessor for each walk.
    """
    B, T, H, K = inputs.r.shape
    V = inputs.v.shape[-1]
    chunks = number_of_chunks(T)
    states = (B, 1, H, V, K) if initial_state is None else initial_state.shape

    formats = jax.ShapeDtypeStruct((B, H, chunks, V // TILE, 2), jnp.int32)

    def saved(*shape):
        return jax.ShapeDtypeStruct((B, H, chunks, *shape), jnp.bfloat16) if save else None

    return forward_walk(
        target,
        "wkv7_outputs",
        Operands(inputs, X, initial_state, None, bounds, transfers, None),
        Results(
            final=jax.ShapeDtypeStruct(states, jnp.float32),
            o=jax.ShapeDtypeStruct((B, T, H, V), jnp.bfloat16),
            entries=saved(V, K),
            U=saved(TILE, V),
            X=saved(TILE, TILE) if X is None else None,
            formats=formats if save and may_be_float16(K) else None,
        ),
        _write_outputs,
        scale=scale,
        pieces=pieces,
    )


def _write_outputs(walk: ForwardWalk, results_gmem: Results) -> None:
    """Does the work of OUTPUT."""

    def write_chunk(step, place, chunk, _):
        row, head, value_block = place
        slot = anew(walk.ring.slot(step))
        plgpu.barrier_wait(walk.barriers.decayed.at[slot])
        masks = walk.masks_of(place, chunk)
        t = walk.chunk_in(slot)
        r = [load(x) for x in walk.r_in(slot)]

        def between_tokens(dtype):
            A_rk, A_rb = products(
                [(x, transposed(k)) for x, k in zip(r, t.y, strict=True)],
                [(x, transposed(b)) for x, b in zip(r, t.z, strict=True)],
                dtype=dtype,
            )
            return narrow(A_rk, dtype), narrow(A_rb, dtype)

        in_bfloat16, in_float16 = (
            functools.partial(between_tokens, dtype) for dtype in (jnp.bfloat16, jnp.float16)
        )
        if not walk.chooses:
            A_rk, A_rb = in_bfloat16()
        else:
            A_rk, A_rb = jax.lax.cond(walk.formats.chosen(slot) == FLOAT16, in_float16, in_bfloat16)
        A_rk, A_rb = masks.lower(A_rk, A_rb)
        plgpu.barrier_wait(walk.barriers.carried.at[slot])
        carried_format = walk.formats.carried(slot) if walk.chooses else BFLOAT16
        reads = [masks.entered(x) for x in r]
        of_state = [(x, transposed(s)) for x, s in zip(reads, t.S_high, strict=True)]
        if results_gmem.entries is not None:
            _save(walk, results_gmem, slot, carried_format, place, chunk)

        def all_in(dtype):
            return products([(A_rk, t.Y), (A_rb, t.U), *of_state], dtype=dtype)[0]

        def all_but_state():
            x, A = (narrow(widen(x, jnp.float16)) for x in (reads[0], A_rb))
            (of_values,) = products([(A_rk, t.Y)], dtype=jnp.float16)
            return products([(A, t.U), (x, of_state[0][1])], start=[of_values])[0]

        in_bfloat16, in_float16 = (
            functools.partial(all_in, dtype) for dtype in (jnp.bfloat16, jnp.float16)
        )
        if not walk.chooses:
            o = in_bfloat16()
        else:
            o = jax.lax.switch(carried_format, (in_bfloat16, in_float16, all_but_state))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()  # so that the slot has been read before it is written
        walk.refill(step)
        o_smem = walk.scratch.o
        store((o_smem, narrow(o)))
        plgpu.copy_smem_to_gmem(o_smem, tokens_tile(results_gmem.o, row, chunk, head, value_block))

    walk.start_copies()
    walk.for_each_walk(lambda index: walk.for_each_chunk(index, write_chunk, None))
    plgpu.wait_smem_to_gmem(0)


def _save(
    walk: ForwardWalk,
    results_gmem: Results,
    slot: jax.Array,
    carried_format: jax.Array | int,
    place: Place,
    chunk: jax.Array,
) -> None:
    """Starts the copies of what the backward needs of a chunk, and writes its format."""
    row, head, value_block = place
    t = walk.chunk_in(slot)
    plgpu.copy_smem_to_gmem(t.U, values_tile(results_gmem.U, row, head, chunk, value_block))
    for j, S in enumerate(t.S_high):
        entry = state_tile(results_gmem.entries, row, head, chunk, value_block, j)
        plgpu.copy_smem_to_gmem(S, entry)
    inverted_here = results_gmem.X is not None
    if inverted_here:
        plgpu.copy_smem_to_gmem(t.X, results_gmem.X.at[row, head, chunk])
    if walk.chooses:
        X_in_float16 = inverted_here & (carried_format != BFLOAT16)
        formats = results_gmem.formats.at[row, head, chunk, value_block]
        formats[0], formats[1] = carried_format, jnp.where(X_in_float16, 1, 0)
