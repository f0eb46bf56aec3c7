"""WKV7 on Hopper GPUs: which calls are served, segments, and the gradient.

    outputs                                in the forward
    state_gradients -> input_gradients     in the backward

The first two kernels walk over the chunks of each row and head, the last one works on all chunks at
once. Few long rows are divided into `pieces` in the forward. For these, and for more than 64 keys
or values, `inverses` first computes the inverse of each chunk. `chunk` and `walk` give the
formulas.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.differentiation import KEPT
from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import TILE, Target, target_in_context
from pallas_kernels.operators.wkv7.call import WKVCall, WKVInputs, prepare
from pallas_kernels.operators.wkv7.chunk_alignment import (
    Transfers,
    align_segments,
    aligned_length,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import number_of_chunks
from pallas_kernels.operators.wkv7.mosaic_gpu.forward_walk import Results
from pallas_kernels.operators.wkv7.mosaic_gpu.input_gradients import input_gradients
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds
from pallas_kernels.operators.wkv7.mosaic_gpu.pieces import outputs_in_pieces
from pallas_kernels.operators.wkv7.mosaic_gpu.state_gradients import state_gradients
from pallas_kernels.packing import find_segments
from pallas_kernels.partitioning import partitioned
from pallas_kernels.sharding import Layout, vary_alike
from pallas_kernels.types import FloatArray, Precision, SegmentIds

LOWEST_LOG_DECAY_SERVED = -1.0
"""With it, the decay of half a chunk is exp(-32): its inverse, and products of these, still fit
bfloat16 and float32."""

MAX_K = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      inputs: `[B, T, H, K or V]` bfloat16.
      X: `[B, H, chunks, 64, 64]` 16 bits, the triangular inverses. The backward could compute them
        again, but that takes longer than to read them.
      entries: `[B, H, chunks, V, K]` 16 bits, S^ of each chunk.
      U: `[B, H, chunks, 64, V]` 16 bits, what the tokens write with b. The forward computes it
        with states of twice the digits, which it does not keep.
      formats: what `entries`, U and X are, of `outputs`; None if they are bfloat16.
      bounds: of segments that begin within chunks, or None.
      transfers: of the states of segments, or None.
      from_zero: whether no initial state was given.
    """

    inputs: WKVInputs
    X: jax.Array
    entries: jax.Array
    U: jax.Array
    formats: jax.Array | None
    bounds: SegmentBounds | None
    transfers: Transfers | None
    from_zero: bool = dataclasses.field(metadata={"static": True})


_INPUTS = WKVInputs(*("B T H K",) * 3, "B T H V", *("B T H K",) * 2)
_SEGMENTS = ("B T", "B chunks")  # bounds, transfers
_STATES = "B N H V K"
_KEPT = Results(
    final=_STATES,
    o="B T H V",
    entries="B H chunks V K",
    U="B H chunks token V",
    X="B H chunks token token",
    formats="B H chunks value_block format",
)
_outputs = partitioned(
    outputs_in_pieces, Layout((_INPUTS, _STATES, *_SEGMENTS), _KEPT, independent="B H")
)


def _gradients(
    inputs: WKVInputs,
    X: jax.Array,
    entries: jax.Array,
    U: jax.Array,
    formats: jax.Array | None,
    bounds: SegmentBounds | None,
    transfers: Transfers | None,
    do: jax.Array,
    d_final: jax.Array | None,
    *,
    target: Target,
    scale: float,
    from_zero: bool,
) -> tuple[WKVInputs, jax.Array | None]:
    """Returns the gradients of the inputs and, unless rows start from zeros, of initial states.

    `d_final` may be None for zeros, if N is 1.
    """
    found = state_gradients(
        target, inputs, X, formats, do, d_final, bounds, transfers, scale=scale, from_zero=from_zero
    )
    of_states = found.exits, found.dW, found.formats
    d_inputs = input_gradients(target, inputs, do, entries, U, *of_states, bounds, scale=scale)
    return d_inputs, found.d_initial


_partitioned_gradients = partitioned(
    _gradients,
    Layout(
        (_INPUTS, _KEPT.X, _KEPT.entries, _KEPT.U, _KEPT.formats, *_SEGMENTS, _KEPT.o, _STATES),
        (_INPUTS, _STATES),
        independent="B H",
    ),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    target: Target,
    scale: float,
    inputs: WKVInputs,
    initial: jax.Array | None,
    bounds: SegmentBounds | None,
    transfers: Transfers | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns outputs `[B, T, H, V]` and final states `[B, N, H, V, K]`, like `initial`."""
    results = _outputs(inputs, initial, bounds, transfers, target=target, scale=scale, save=False)
    return results.o, results.final


def _chunked_forward(target, scale, *primals):
    inputs, initial, bounds, transfers = jax.tree.map(lambda x: x.value, primals)
    results = _outputs(inputs, initial, bounds, transfers, target=target, scale=scale, save=True)
    # In a loop over layers XLA (of jax 0.11.2) lets the kernel write what is kept for the backward
    # into the stacks of all layers. If o went there too, it would call the kernel again for the
    # o that the rest of the layer reads.
    o = checkpoint_name(jax.lax.optimization_barrier(results.o), KEPT)
    residuals = Residuals(
        inputs=inputs,
        X=checkpoint_name(results.X, KEPT),
        entries=checkpoint_name(results.entries, KEPT),
        U=checkpoint_name(results.U, KEPT),
        formats=None if results.formats is None else checkpoint_name(results.formats, KEPT),
        bounds=bounds,
        transfers=transfers,
        from_zero=initial is None,
    )
    return (o, results.final), residuals


def _chunked_backward(target, scale, residuals, gradients):
    do, d_final = gradients
    inputs, bounds, transfers = residuals.inputs, residuals.bounds, residuals.transfers
    # Final states are often of no use. Then there need not be zeros for the kernel to read.
    if isinstance(d_final, SymbolicZero):
        d_final = None if transfers is None else _zeros(d_final, inputs)
    if isinstance(do, SymbolicZero):
        do = _zeros(do, inputs)
    d_inputs, d_initial = _partitioned_gradients(
        inputs,
        residuals.X,
        residuals.entries,
        residuals.U,
        residuals.formats,
        bounds,
        transfers,
        do,
        d_final,
        target=target,
        scale=scale,
        from_zero=residuals.from_zero,
    )
    # The kernel did not write gradients of states that no chunk loaded.
    if d_initial is not None and transfers is not None:
        segments = jnp.arange(d_initial.shape[1])
        loaded = (transfers.load[:, :, None] == segments[None, None]).any(axis=1)
        d_initial = jnp.where(loaded[:, :, None, None, None], d_initial, 0)
    return d_inputs, d_initial, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def _zeros(gradient: SymbolicZero, inputs: WKVInputs) -> jax.Array:
    """Returns the zeros that a gradient stands for, which vary over mesh axes as the inputs do."""
    _, zeros = vary_alike(inputs.r, jnp.zeros(gradient.shape, gradient.dtype))
    return zeros


def _find_bounds(segment_ids: SegmentIds) -> SegmentBounds:
    """Returns the bounds of segments in rows `[B, T]`, T a multiple of 64."""
    index = find_segments(segment_ids).index.reshape(len(segment_ids), -1, TILE)
    entered = jnp.pad(index[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))  # a row begins with segment 0
    changes = jnp.diff(jnp.concatenate([entered, index], axis=-1), axis=-1) != 0
    position = jnp.arange(TILE, dtype=jnp.int32)[None, None]
    first = jax.lax.cummax(jnp.where(changes, position, -1), axis=2)
    ends = jnp.pad(changes[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    last = jax.lax.cummin(jnp.where(ends, position, TILE), axis=2, reverse=True)
    return SegmentBounds(first.reshape(segment_ids.shape), last.reshape(segment_ids.shape))


def _pad(x: jax.Array, T: int) -> jax.Array:
    """Pads rows `[B, _, ...]` to T tokens with zeros, which as tokens change nothing."""
    return jnp.pad(x, ((0, 0), (0, T - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def wkv7_in_chunks(
    target: Target, inputs: WKVInputs, call: WKVCall
) -> tuple[FloatArray, FloatArray]:
    """Computes `pallas_kernels.wkv7`, for a call that the kernels serve."""
    dtype = inputs.v.dtype
    inputs, initial, segment_ids = prepare(inputs, call)
    inputs = WKVInputs(*(x.astype(jnp.bfloat16) for x in inputs))
    initial = jnp.swapaxes(initial, -1, -2)
    if segment_ids is not None and call.num_segments is not None:
        states, N = initial, call.num_segments
        o, final = _with_states_of_segments(target, call.scale, inputs, states, segment_ids, N)
    else:
        state = None if call.initial_state is None else initial
        o, final = _with_states_of_rows(target, call.scale, inputs, state, segment_ids)
    return o.astype(dtype), jnp.swapaxes(final, -1, -2)


def _with_states_of_rows(
    target: Target,
    scale: float,
    inputs: WKVInputs,
    initial: jax.Array | None,
    segment_ids: SegmentIds | None,
) -> tuple[jax.Array, jax.Array]:
    """Computes outputs and final states `[B, H, V, K]`; segments may begin within chunks."""
    T = inputs.r.shape[1]
    length = number_of_chunks(T) * TILE
    bounds = None
    if segment_ids is not None:
        bounds = _find_bounds(jnp.pad(segment_ids, ((0, 0), (0, length - T))))
    padded = WKVInputs(*(_pad(x, length) for x in inputs))
    begin = None if initial is None else initial[:, None]
    o, final = _chunked(target, scale, padded, begin, bounds, None)
    return o[:, :T], final[:, 0]


def _with_states_of_segments(
    target: Target,
    scale: float,
    inputs: WKVInputs,
    initial: jax.Array,
    segment_ids: SegmentIds,
    num_segments: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes outputs and final states `[B, N, H, V, K]`, on rows whose segments begin chunks."""
    B, T = segment_ids.shape
    length = aligned_length(T, num_segments, TILE)
    position, transfers = align_segments(segment_ids, num_segments, TILE, length)
    row = jnp.arange(B)[:, None]
    aligned = (
        jnp.zeros_like(x, shape=(B, length, *x.shape[2:])).at[row, position].set(x, mode="drop")
        for x in inputs
    )
    o, final = _chunked(target, scale, WKVInputs(*aligned), initial, None, transfers)
    occurs = (transfers.store[:, :, None] == jnp.arange(num_segments)[None, None]).any(axis=1)
    final = jnp.where(occurs[:, :, None, None, None], final, initial)
    return o.at[row, position].get(mode="fill", fill_value=0), final


def wkv7_mosaic_gpu(inputs: WKVInputs, call: WKVCall) -> tuple[FloatArray, FloatArray]:
    """Computes `pallas_kernels.wkv7`, which documents it, on Hopper GPUs.

    Float16 inputs, and a log_decay of another dtype, are rounded to bfloat16. Operands of matrix
    products are bfloat16 or, in the forward of chunks that forget little, float16. Sums and the
    state are float32.

    Raises:
      NotServed: for other dtypes and head sizes, without a bound on the decay, and for high
        precision.
    """
    check_served(inputs.k, inputs.v, call.min_log_decay, call.precision)
    return wkv7_in_chunks(target_in_context(), inputs, call)


def check_served(
    k: FloatArray,
    v: FloatArray,
    min_log_decay: float | None,
    precision: Precision = None,
) -> None:
    """Raises NotServed for calls that the kernels do not serve on any device."""
    if k.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotServed(f"mosaic_gpu needs inputs of 16 bits, got {k.dtype=}")
    K, V = k.shape[-1], v.shape[-1]
    if K % TILE or K > MAX_K or V % TILE:
        raise NotServed(f"mosaic_gpu needs K of 64 or 128, V of 64 n, got {K=}, {V=}")
    if min_log_decay is None or min_log_decay < LOWEST_LOG_DECAY_SERVED:
        raise NotServed(
            f"mosaic_gpu needs min_log_decay of at least {LOWEST_LOG_DECAY_SERVED}, "
            f"got {min_log_decay}"
        )
    if precision is not None:
        raise NotServed(f"mosaic_gpu rounds operands to 16 bits, got {precision=}")


__all__ = ["check_served", "wkv7_in_chunks", "wkv7_mosaic_gpu"]
