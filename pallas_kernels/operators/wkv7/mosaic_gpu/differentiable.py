"""WKV7 on Hopper GPUs: which calls are served, segments, and the gradient.

    outputs                                in the forward
    state_gradients -> input_gradients     in the backward

The first two kernels walk over the chunks of each row and head, the last one works on all chunks at
once. Few long rows are divided into `pieces` in the forward; then, and where there is more than one
block of keys or values, `inverses` does what can be done for all chunks at once before. `chunk`
explains what the kernels share.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import TILE, Target, target_in_context
from pallas_kernels.operators.wkv7.common import prepare
from pallas_kernels.operators.wkv7.mosaic_gpu.backward import state_gradients
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import number_of_chunks
from pallas_kernels.operators.wkv7.mosaic_gpu.gradients import input_gradients
from pallas_kernels.operators.wkv7.mosaic_gpu.pieces import outputs_in_pieces
from pallas_kernels.operators.wkv7.segments import align_segments, aligned_length
from pallas_kernels.packing import find_segments
from pallas_kernels.types import FloatArray, SegmentIds

MIN_LOG_DECAY = -1.0
"""Decays of half a chunk, exp(32), and their products still fit bfloat16 and float32."""

MAX_K = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      inputs: r, log_decay, k, v, a, b, `[B, T, H, _]`.
      X: `[B, H, chunks, 64, 64]` bfloat16, the triangular inverses: they are needed twice, and
        computing them takes longer than reading them.
      entries: `[B, H, chunks, V, K]` bfloat16, the states that enter the chunks.
      U: `[B, H, chunks, 64, V]` bfloat16, what the tokens write with b: computed with states of
        twice the digits, which are on the chip only during the walk.
      bounds: of the segments within chunks.
      transfers: of the states between chunks.
      from_zero: whether no initial state was given.
    """

    inputs: tuple[jax.Array, ...]
    X: jax.Array
    entries: jax.Array
    U: jax.Array
    bounds: tuple[jax.Array, ...]
    transfers: tuple[jax.Array, ...]
    from_zero: bool = dataclasses.field(metadata={"static": True})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    target: Target,
    scale: float,
    inputs: tuple[jax.Array, ...],
    initial: jax.Array | None,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, H, V]` and final states, like `initial`, `[B, N, H, V, K]`."""
    o, final = outputs_in_pieces(
        target, inputs, initial, bounds, transfers, scale=scale, save=False
    )
    return o, final


def _chunked_forward(target, scale, inputs, initial, bounds, transfers):
    o, final, entries, U, X = outputs_in_pieces(
        target, inputs, initial, bounds, transfers, scale=scale, save=True
    )
    # In a loop over layers XLA (of jax 0.11.2) lets the kernel write what is kept for the backward
    # into the stacks of all layers. If o went there too, it would call the kernel again for the
    # o that the rest of the layer reads.
    o = jax.lax.optimization_barrier(o)
    return (o, final), Residuals(inputs, X, entries, U, bounds, transfers, initial is None)


def _chunked_backward(target, scale, residuals, gradients):
    do, d_final = gradients
    r, log_decay, _, _, a, b = residuals.inputs
    X, bounds, transfers = residuals.X, residuals.bounds, residuals.transfers
    exits, dW, d_initial = state_gradients(
        target, (r, log_decay, a, b), X, do, d_final, bounds, transfers, scale=scale
    )
    d_inputs = input_gradients(
        target, residuals.inputs, do, residuals.entries, residuals.U, exits, dW, bounds, scale=scale
    )
    if transfers:  # gradients of states that no chunk loaded were not written
        segments = jnp.arange(d_final.shape[1])
        loaded = (transfers[0][:, :, None] == segments[None, None]).any(axis=1)
        d_initial = jnp.where(loaded[:, :, None, None, None], d_initial, 0)
    return d_inputs, None if residuals.from_zero else d_initial, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _bounds(segment_ids: SegmentIds) -> tuple[jax.Array, jax.Array]:
    """`start` and `end` of `chunk.Masks` for rows `[B, T]`, T a multiple of 64."""
    index = find_segments(segment_ids).index.reshape(len(segment_ids), -1, TILE)
    entered = jnp.pad(index[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))  # a row begins with segment 0
    changes = jnp.diff(jnp.concatenate([entered, index], axis=-1), axis=-1) != 0
    position = jnp.arange(TILE, dtype=jnp.int32)[None, None]
    start = jax.lax.cummax(jnp.where(changes, position, -1), axis=2)
    last = jnp.pad(changes[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    end = jax.lax.cummin(jnp.where(last, position, TILE), axis=2, reverse=True)
    return start.reshape(segment_ids.shape), end.reshape(segment_ids.shape)


def _pad(x: jax.Array, T: int) -> jax.Array:
    """Rows `[B, _, ...]` made T long with zeros, which as tokens change nothing."""
    return jnp.pad(x, ((0, 0), (0, T - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def wkv7_in_chunks(
    target: Target,
    inputs: tuple[FloatArray, ...],
    initial_state: FloatArray | None,
    segment_ids: SegmentIds | None,
    num_segments: int | None,
    *,
    scale: float,
) -> tuple[FloatArray, FloatArray]:
    """The operator, on calls that the kernels serve; arguments as of `pallas_kernels.wkv7`."""
    dtype, (B, T) = inputs[3].dtype, inputs[3].shape[:2]
    arrays, initial, segment_ids = prepare(inputs, initial_state, segment_ids, num_segments)
    inputs = tuple(x.astype(jnp.bfloat16) for x in arrays)
    initial = jnp.swapaxes(initial, -1, -2)
    if segment_ids is None or num_segments is None:
        length = number_of_chunks(T) * TILE
        bounds: tuple[jax.Array, ...] = ()
        if segment_ids is not None:
            padding = ((0, 0), (0, length - T))
            bounds = _bounds(jnp.pad(segment_ids, padding))
        inputs = tuple(_pad(x, length) for x in inputs)
        begin = None if initial_state is None else initial[:, None]
        o, final = _chunked(target, scale, inputs, begin, bounds, ())
        return o[:, :T].astype(dtype), jnp.swapaxes(final[:, 0], -1, -2)
    length = aligned_length(T, num_segments, TILE)
    position, transfers = align_segments(segment_ids, num_segments, TILE, length)
    row = jnp.arange(B)[:, None]
    inputs = tuple(
        jnp.zeros_like(x, shape=(B, length, *x.shape[2:])).at[row, position].set(x, mode="drop")
        for x in inputs
    )
    o, final = _chunked(target, scale, inputs, initial, (), (transfers.load, transfers.store))
    occurs = (transfers.store[:, :, None] == jnp.arange(num_segments)[None, None]).any(axis=1)
    final = jnp.where(occurs[:, :, None, None, None], final, initial)
    o = o.at[row, position].get(mode="fill", fill_value=0)
    return o.astype(dtype), jnp.swapaxes(final, -1, -2)


def wkv7_mosaic_gpu(
    r: FloatArray,
    log_decay: FloatArray,
    k: FloatArray,
    v: FloatArray,
    a: FloatArray,
    b: FloatArray,
    *,
    scale: float,
    initial_state: FloatArray | None,
    segment_ids: SegmentIds | None,
    num_segments: int | None,
    min_log_decay: float | None,
) -> tuple[FloatArray, FloatArray]:
    """The operator of `pallas_kernels.wkv7`, which documents the arguments, on Hopper GPUs.

    Operands of the matrix products are bfloat16, also for float16 inputs and for a log_decay of
    another dtype; sums and the state are float32.

    Raises:
      NotServed: for other dtypes and head sizes, and without a bound on the
        decay.
    """
    check_served(k, v, min_log_decay)
    target = target_in_context()
    inputs = (r, log_decay, k, v, a, b)
    return wkv7_in_chunks(target, inputs, initial_state, segment_ids, num_segments, scale=scale)


def check_served(k: FloatArray, v: FloatArray, min_log_decay: float | None) -> None:
    """Raises NotServed for calls that the kernels do not serve on any device."""
    if k.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotServed(f"mosaic_gpu needs inputs of 16 bits, got {k.dtype=}")
    K, V = k.shape[-1], v.shape[-1]
    if K % TILE or K > MAX_K or V % TILE:
        raise NotServed(f"mosaic_gpu needs K of 64 or 128, V of 64 n, got {K=}, {V=}")
    if min_log_decay is None or min_log_decay < MIN_LOG_DECAY:
        raise NotServed(
            f"mosaic_gpu needs min_log_decay of at least {MIN_LOG_DECAY}, got {min_log_decay}"
        )


__all__ = ["check_served", "wkv7_in_chunks", "wkv7_mosaic_gpu"]
