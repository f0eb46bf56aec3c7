"""WKV7 in chunks of matrix products, for every backend of XLA.

A chunk of L tokens with entry state S0 is read at once (`docs/rwkv7.md` derives all of it):

    O  = rows_r S0 + A_rk V + A_rb U
    U  = (I - A_ab)^-1 (rows_a S0 + A_ak V)
    S1 = onward * (decay * S0 + columns_k^T V + columns_b^T U)

where `A_xy[i, j] = sum_c x[i, c] y[j, c] exp(sum of log decays between j and i)` for j before i.
The rows are r and a, decayed from the chunk's beginning; the columns are k and b, which `onward`
decays to its end. `chunk_products` computes all that depends on decays, in two ways: a fast one if
no decay is strong, and one for any decay down to clearing a channel. Where the caller promises no
bound, each group of chunks takes the fast way if its decays allow it.

A loop runs over groups of G chunks. Within a group, everything that does not need the state is
done for all chunks at once, and a short scan carries the state from chunk to chunk. The backward
keeps the entry state of each chunk and computes the rest again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.devices import device_in_context
from pallas_kernels.differentiation import KEPT
from pallas_kernels.operators.wkv7.call import Results, WKVCall, WKVInputs, prepare
from pallas_kernels.operators.wkv7.chunk_alignment import (
    Transfers,
    align_segments,
    aligned_length,
)
from pallas_kernels.operators.wkv7.chunk_products import (
    Masks,
    Products,
    bounded_products,
    from_chunks,
    inverse,
    mask_products,
    to_chunks,
    transpose,
    unbounded_products,
)
from pallas_kernels.operators.wkv7.segment_states import (
    load_state,
    load_state_backward,
    never_stored,
    store_state,
    store_state_backward,
)
from pallas_kernels.packing import find_segments
from pallas_kernels.precision import full_products
from pallas_kernels.types import SegmentIds, Size
from pallas_kernels.validation import is_known

MAX_CHUNK = {"cpu": 32}
MAX_CHUNK_ELSEWHERE = 64
MAX_CHUNK_UNPROMISED = 32
"""Tokens in a chunk, at most. Long chunks fill the units of an accelerator, short ones need fewer
operations. Without a promise about decays, a pair of tokens may cost more."""

MIN_CHUNK_BOUNDED = 8
"""A bound that allows fewer tokens in a chunk is not used."""

MATRICES = {"cpu": 32}
MATRICES_ELSEWHERE = 2048
"""Chunks times rows times heads in a group, at least, where there are as many: enough to fill an
accelerator, few enough to stay in the caches of a CPU."""

GROUP_OF_UNKNOWN = 4
"""Chunks in a group, where the number of rows or of tokens is a symbol."""

UNROLL = 4
"""Chunks in one step of the scan that carries the state, so that their work overlaps."""

MAX_EXPONENT = 40.0
"""Largest exponent of a factor: a product of two factors is still finite in float32."""


class Plan(NamedTuple):
    """How a call is cut up, known at trace time.

    Attributes:
      chunk: L, a power of two.
      group: G.
      scale: factor on the outputs.
      bounded: whether decays are promised to be weak enough for `bounded_products`.
      lossless: whether products of float32 lose no digits, whatever JAX's setting: for inputs of
        32 bits or more, and where a call asks for high precision.
    """

    chunk: int
    group: int
    scale: float
    bounded: bool
    lossless: bool


type ChunkSegments = Masks | Transfers | None
"""Masks where segments share chunks, transfers where each segment begins a chunk."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      inputs: `[B, T, H, _]`, padded to whole groups; the products of chunks are computed again.
      segments: where segments begin and end, or None.
      entries: `[T / (G L), G, B, H, K, V]`, the state that enters each chunk.
    """

    inputs: WKVInputs
    segments: ChunkSegments
    entries: jax.Array


def _read(x: jax.Array, group: jax.Array, plan: Plan, dtype: np.dtype) -> jax.Array:
    """Returns the tokens of a group, `[B, G, L, H, _]`, of `[B, T, H, _]`."""
    tokens = plan.group * plan.chunk
    x = jax.lax.dynamic_slice_in_dim(x, group * tokens, tokens, axis=1)
    return x.reshape(x.shape[0], plan.group, plan.chunk, *x.shape[2:]).astype(dtype)


def _write(x: jax.Array, group: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `[B, T, H, _]` with the tokens of a group replaced by `[B, G, L, H, _]`."""
    B, G, L, *rest = values.shape
    values = values.astype(x.dtype).reshape(B, G * L, *rest)
    return jax.lax.dynamic_update_slice_in_dim(x, values, group * G * L, axis=1)


def _read_segments(segments: ChunkSegments, group: jax.Array, plan: Plan) -> ChunkSegments:
    def of_chunks(x):
        return jax.lax.dynamic_slice_in_dim(x, group * plan.group, plan.group, axis=1)

    return jax.tree.map(of_chunks, segments)


def _of_chunks(at: ChunkSegments) -> Transfers | None:
    """Returns transfers with the axis of chunks first, `[G, B]`, for a scan; None for masks."""
    return jax.tree.map(jnp.transpose, at) if isinstance(at, Transfers) else None


def _with_products(plan: Plan, log_decay: jax.Array, run: Callable[[Callable], Any]) -> Any:
    """Runs with `bounded_products` if the log decays of a group allow it."""
    if plan.bounded:
        return run(bounded_products)
    mild = jnp.min(log_decay) >= -MAX_EXPONENT / plan.chunk
    return jax.lax.cond(mild, lambda: run(bounded_products), lambda: run(unbounded_products))


def _forward_chunks(products, v, at, initially_stored, carry):
    """Reads the chunks of a group: returns the carry, the entry states and the outputs."""
    (A_rk, A_rb), (A_ak, A_ab), (r_in, a_in), (k_out, b_out), decay, onward = products
    X = inverse(A_ab)
    u_from_state = X @ a_in
    u_from_v = X @ (A_ak @ v)

    def chunk(carry, x):
        state, stored = carry
        u_from_state, u_from_v, k_out, b_out, v, decay, onward, at = x
        if stored is not None:
            state = load_state(state, initially_stored, at.load)
        u = u_from_state @ state + u_from_v
        after = decay[..., None] * state + transpose(k_out) @ v + transpose(b_out) @ u
        after = onward[..., None] * after
        if stored is not None:
            stored = store_state(stored, at.store, after)
        return (after, stored), (state, u)

    of_chunks = (u_from_state, u_from_v, k_out, b_out, v, decay, onward, at)
    carry, (entries, u) = jax.lax.scan(chunk, carry, of_chunks, unroll=UNROLL)
    return carry, entries, r_in @ entries + A_rk @ v + A_rb @ u


def _backward_chunks(products, v, entries, do, at, dstored, carry):
    """Transposes `_forward_chunks`: returns the carry, and gradients of products and values."""
    (A_rk, A_rb), (A_ak, A_ab), (r_in, a_in), (k_out, b_out), decay, onward = products
    X = inverse(A_ab)
    u_from_state = X @ a_in
    u = u_from_state @ entries + X @ (A_ak @ v)
    du_from_o = transpose(A_rb) @ do

    def chunk(carry, x):
        dafter, dloaded = carry
        u_from_state, r_in, b_out, decay, onward, do, du_from_o, at = x
        if dloaded is not None:
            dafter += store_state_backward(dstored, at.store)
        dsum = onward[..., None] * dafter
        du = du_from_o + b_out @ dsum
        dstate = decay[..., None] * dsum
        dstate += transpose(r_in) @ do + transpose(u_from_state) @ du
        if dloaded is not None:
            dstate, dloaded = load_state_backward(dstate, dloaded, at.load)
        return (dstate, dloaded), (dsum, du)

    of_chunks = (u_from_state, r_in, b_out, decay, onward, do, du_from_o, at)
    carry, (dsum, du) = jax.lax.scan(chunk, carry, of_chunks, reverse=True, unroll=UNROLL)
    dW = transpose(X) @ du  # of W = a_in S0 + A_ak V
    dv = transpose(A_rk) @ do + transpose(A_ak) @ dW + k_out @ dsum
    dproducts = Products(
        A_r=(do @ transpose(v), do @ transpose(u)),
        A_a=(dW @ transpose(v), dW @ transpose(u)),
        rows=(do @ transpose(entries), dW @ transpose(entries)),
        columns=(v @ transpose(dsum), u @ transpose(dsum)),
        decay=jnp.sum(entries * dsum, axis=-1),
        onward=jnp.zeros_like(onward),
    )
    return carry, dproducts, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    plan: Plan,
    inputs: WKVInputs,
    segments: ChunkSegments,
    stored: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """Computes outputs `[B, T, H, V]`, the state after the last token, and the stored states."""
    return _chunked_forward(plan, inputs, segments, stored, state)[0]


def _groups(inputs: WKVInputs, plan: Plan) -> jax.Array:
    return jnp.arange(inputs.r.shape[1] // (plan.group * plan.chunk))


def _chunked_forward(plan, inputs, segments, stored, state):
    dtype, initially_stored = state.dtype, stored

    def group(carry, index):
        o, *states = carry
        r, log_decay, k, v, a, b = (_read(x, index, plan, dtype) for x in inputs)
        at = _read_segments(segments, index, plan)
        masks = at if isinstance(at, Masks) else None

        def run(make_products):
            products, _ = make_products(log_decay, (r, a), (k, b), masks)
            products = mask_products(products, masks)
            return _forward_chunks(
                products, to_chunks(v), _of_chunks(at), initially_stored, tuple(states)
            )

        states, entries, o_here = _with_products(plan, log_decay, run)
        return (_write(o, index, plan.scale * from_chunks(o_here)), *states), entries

    with full_products(plan.lossless):
        carry = (jnp.zeros_like(inputs.v), state, stored)
        (o, *states), entries = jax.lax.scan(group, carry, _groups(inputs, plan))
    o, entries = checkpoint_name((o, entries), KEPT)
    return (o, *states), Residuals(inputs, segments, entries)


def _chunked_backward(plan, residuals, gradients):
    do, dstate, dstored = gradients
    dtype = dstate.dtype
    inputs, segments = residuals.inputs, residuals.segments

    def group(carry, x):
        index, entries = x
        dinputs, *dstates = carry
        r, log_decay, k, v, a, b, do_here = (_read(x, index, plan, dtype) for x in (*inputs, do))
        at = _read_segments(segments, index, plan)
        masks = at if isinstance(at, Masks) else None

        def run(make_products):
            products, backward = make_products(log_decay, (r, a), (k, b), masks)
            dstates_before, dproducts, dv = _backward_chunks(
                mask_products(products, masks),
                to_chunks(v),
                entries,
                plan.scale * to_chunks(do_here),
                _of_chunks(at),
                dstored,
                tuple(dstates),
            )
            dlog_decay, (dr, da), (dk, db) = backward(mask_products(dproducts, masks))
            return dstates_before, WKVInputs(dr, dlog_decay, dk, from_chunks(dv), da, db)

        dstates, dhere = _with_products(plan, log_decay, run)
        dinputs = jax.tree.map(lambda d, x: _write(d, index, x), dinputs, dhere)
        return (dinputs, *dstates), None

    dloaded = None
    if dstored is not None:
        dloaded = never_stored(dstored, segments.store.T)
    with full_products(plan.lossless):
        carry = (jax.tree.map(jnp.zeros_like, inputs), dstate, dloaded)
        groups = (_groups(inputs, plan), residuals.entries)
        (dinputs, dstate, dloaded), _ = jax.lax.scan(group, carry, groups, reverse=True)
    return dinputs, None, dloaded, dstate


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _plan(inputs: WKVInputs, segment_length: Size, call: WKVCall) -> tuple[Plan, Size]:
    """Returns how to cut rows into chunks, and the length of a row that fits."""
    B, T, H, _ = inputs.r.shape
    min_log_decay = call.min_log_decay
    platform = device_in_context().platform
    longest = MAX_CHUNK.get(platform, MAX_CHUNK_ELSEWHERE)
    if min_log_decay is not None:
        while longest > 1 and -min_log_decay * longest > MAX_EXPONENT:
            longest //= 2
    bounded = min_log_decay is not None and longest >= MIN_CHUNK_BOUNDED
    if not bounded:
        longest = min(MAX_CHUNK.get(platform, MAX_CHUNK_ELSEWHERE), MAX_CHUNK_UNPROMISED)
    chunk = longest
    if is_known(T):
        chunk = min(longest, 1 << (segment_length - 1).bit_length())  # a power of two
    chunks = aligned_length(T, call.num_segments or 1, chunk) // chunk
    group = GROUP_OF_UNKNOWN
    if is_known(B, T):
        wanted = MATRICES.get(platform, MATRICES_ELSEWHERE)
        group = min(chunks, -(-wanted // (B * H)))
    groups = -(-chunks // group)
    lossless = call.precision == "high" or jnp.result_type(*inputs).itemsize >= 4
    return Plan(chunk, group, call.scale, bounded, lossless), groups * (group * chunk)


def _mask_segments(segment_ids: SegmentIds, plan: Plan, T: Size) -> Masks:
    """Returns the masks of rows that are padded to T tokens."""
    index = find_segments(segment_ids).index
    index = jnp.pad(index, ((0, 0), (0, T - index.shape[1])), mode="edge")
    index = index.reshape(index.shape[0], T // plan.chunk, plan.chunk)
    entry = jnp.pad(index[:, :-1, -1], ((0, 0), (1, 0)))  # the row's first segment has index 0
    return Masks(index, entry)


def wkv7_xla(inputs: WKVInputs, call: WKVCall) -> Results:
    """Computes `pallas_kernels.wkv7`, which documents it, in chunks."""
    B, T = inputs.r.shape[:2]
    num_segments = call.num_segments
    inputs, initial, segment_ids = prepare(inputs, call)
    if segment_ids is None or num_segments is None:
        plan, length = _plan(inputs, T, call)
        inputs = WKVInputs(*(jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0))) for x in inputs))
        masks = None if segment_ids is None else _mask_segments(segment_ids, plan, length)
        o, final, _ = _chunked(plan, inputs, masks, None, initial)
        return o[:, :T], final
    segment_length = -(-T // num_segments)  # on average
    plan, length = _plan(inputs, segment_length, call)
    position, transfers = align_segments(segment_ids, num_segments, plan.chunk, length)
    row = jnp.arange(B)[:, None]

    def move(x):
        empty = jnp.zeros_like(x, shape=(B, length, *x.shape[2:]))
        return empty.at[row, position].set(x, mode="drop")

    no_state = jnp.zeros_like(initial[:, 0])
    o, _, final = _chunked(plan, WKVInputs(*map(move, inputs)), transfers, initial, no_state)
    return o.at[row, position].get(mode="fill", fill_value=0), final


__all__ = ["wkv7_xla"]
