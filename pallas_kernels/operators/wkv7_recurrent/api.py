"""WKV7 token by token, for decoding and short sequences, with a backward of bounded memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.wkv7.api import check_inputs
from pallas_kernels.operators.wkv7.call import (
    Implementation,
    WKVCall,
    WKVInputs,
    prepare,
    tokens_first,
)
from pallas_kernels.operators.wkv7.reference import update, wkv7_reference
from pallas_kernels.operators.wkv7.segment_states import (
    load_state,
    load_state_backward,
    never_stored,
    store_state,
    store_state_backward,
)
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu import wkv7_recurrent_mosaic_gpu
from pallas_kernels.packing import find_segments
from pallas_kernels.types import FloatArray, SegmentIds

BLOCK = 16
"""Tokens between two states that are kept for the backward."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Where states are loaded and stored; the number N of stored states stands for nowhere.

    Attributes:
      load: `[T, B]` int32, the stored state that replaces the carried one before a token.
      store: `[T, B]` int32, where the state after a token is stored.
    """

    load: jax.Array
    store: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; blocks first, `[T / BLOCK, BLOCK, ...]`, where there are tokens.

    Attributes:
      tokens: r, log_decay, k, v, a, b as they were given.
      boundaries: of the segments, or None.
      stored: `[B, N, H, K, V]`, the states that are loaded at boundaries, or None.
      entries: `[T / BLOCK, B, H, K, V]`, the state before each block; those within it are computed
        again.
    """

    tokens: WKVInputs
    boundaries: Boundaries | None
    stored: jax.Array | None
    entries: jax.Array


def _step_backward(
    state: jax.Array, d_state: jax.Array, token: WKVInputs, do: jax.Array
) -> tuple[jax.Array, WKVInputs]:
    """The transpose of `update`: from the state that the token read and the gradients of what it
    made (`do` is that of `S^T r`), the gradients of that state and of the token.
    """
    r, log_decay, k, v, a, b = token
    new_state, _ = update(state, token)
    d_state = d_state + r[..., None] * do[:, :, None]
    decay = jnp.exp(log_decay)
    d_removed = jnp.einsum("bhkv,bhk->bhv", d_state, b)
    d_token = WKVInputs(
        jnp.einsum("bhkv,bhv->bhk", new_state, do),
        decay * jnp.sum(state * d_state, axis=-1),
        jnp.einsum("bhkv,bhv->bhk", d_state, v),
        jnp.einsum("bhkv,bhk->bhv", d_state, k),
        jnp.einsum("bhkv,bhv->bhk", state, d_removed),
        jnp.einsum("bhkv,bhv->bhk", d_state, jnp.einsum("bhkv,bhk->bhv", state, a)),
    )
    return decay[..., None] * d_state + a[..., None] * d_removed[:, :, None], d_token


@jax.custom_vjp
def _recur(
    tokens: WKVInputs, boundaries: Boundaries | None, stored: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, the state after the last token, and the stored states after it."""
    return _recur_forward(tokens, boundaries, stored, state)[0]


def _recur_forward(tokens, boundaries, stored, state):
    dtype, initially_stored = state.dtype, stored

    def step(carry, token):
        state, stored = carry
        token, at = token
        if at is not None:
            state = load_state(state, initially_stored, at.load)
        state, o = update(state, WKVInputs(*(x.astype(dtype) for x in token)))
        if at is not None:
            stored = store_state(stored, at.store, state)
        return (state, stored), o

    def block(carry, block_tokens):
        after, o = jax.lax.scan(step, carry, block_tokens)
        return after, (carry[0], o)

    (state, stored), (entries, o) = jax.lax.scan(block, (state, stored), (tokens, boundaries))
    return (o, state, stored), Residuals(tokens, boundaries, initially_stored, entries)


def _recur_backward(residuals, gradients):
    do, d_state, d_stored = gradients
    dtype = d_state.dtype

    def read_state(state, token):
        token, at = token
        if at is not None:
            state = load_state(state, residuals.stored, at.load)
        return update(state, WKVInputs(*(x.astype(dtype) for x in token)))[0], state

    def step(carry, inputs):
        d_state, d_loaded = carry
        state, token, at, do = inputs
        if at is not None:
            d_state += store_state_backward(d_stored, at.store)
        inputs_of_token = WKVInputs(*(x.astype(dtype) for x in token))
        d_state, d_token = _step_backward(state, d_state, inputs_of_token, do)
        if at is not None:
            d_state, d_loaded = load_state_backward(d_state, d_loaded, at.load)
        d_token = jax.tree.map(lambda d, x: d.astype(x.dtype), d_token, token)
        return (d_state, d_loaded), d_token

    def block(carry, inputs):
        entry, tokens, at, do = inputs
        _, states = jax.lax.scan(read_state, entry, (tokens, at))
        return jax.lax.scan(step, carry, (states, tokens, at, do), reverse=True)

    at = residuals.boundaries
    d_loaded = None if at is None else never_stored(d_stored, at.store)
    (d_state, d_loaded), d_tokens = jax.lax.scan(
        block, (d_state, d_loaded), (residuals.entries, residuals.tokens, at, do), reverse=True
    )
    return d_tokens, None, d_loaded, d_state


_recur.defvjp(_recur_forward, _recur_backward)


def _find_boundaries(segment_ids: SegmentIds, num_segments: int | None) -> Boundaries:
    segments = find_segments(segment_ids)
    if num_segments is None:  # one stored state, zero, that later segments start from
        restart = segments.start & (segments.index > 0)
        load, store = jnp.where(restart, 0, 1), jnp.ones_like(segments.index)
    else:
        slot = jnp.where(segments.valid, segment_ids - 1, num_segments)
        load = jnp.where(segments.start, slot, num_segments)
        store = jnp.where(segments.end, slot, num_segments)
    return Boundaries(tokens_first(load), tokens_first(store))


def wkv7_recurrent_xla(inputs: WKVInputs, call: WKVCall) -> tuple[FloatArray, FloatArray]:
    """Scans over tokens, with a backward that keeps one state per `BLOCK` tokens."""
    T, dtype, num_segments = inputs.r.shape[1], inputs.v.dtype, call.num_segments
    inputs, initial, segment_ids = prepare(inputs, call)
    at = None if segment_ids is None else _find_boundaries(segment_ids, num_segments)
    state, stored = initial, None
    if num_segments is not None:
        state, stored = jnp.zeros_like(initial[:, 0]), initial
    elif at is not None:
        stored = jnp.zeros_like(initial[:, None])

    block = min(T, BLOCK)

    def in_blocks(x, fill):  # [T, ...] to [T / block, block, ...]
        x = jnp.pad(x, [(0, -T % block)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(-1, block, *x.shape[1:])

    tokens = WKVInputs(*(in_blocks(tokens_first(x), 0) for x in inputs))
    if at is not None:
        at = jax.tree.map(lambda x: in_blocks(x, num_segments or 1), at)
    o, state, stored = _recur(tokens, at, stored, state)
    o = call.scale * tokens_first(o.reshape(-1, *o.shape[2:])[:T])
    return o.astype(dtype), state if num_segments is None or stored is None else stored


def _through(
    implementation: Implementation,
    arrays: tuple[FloatArray, ...],
    call: WKVCall,
    *,
    fused: bool,
    reverse: bool,
) -> tuple[FloatArray, FloatArray]:
    """Calls an implementation that knows neither kk and alpha nor another order of reading.

    Args:
      implementation: of the operator.
      arrays: r, log_decay, k, v, then a and b, or kk and alpha.
      call: whatever else the call asks for.
      fused: whether kk and alpha are given.
      reverse: whether to read from the last token to the first.
    """
    r, log_decay, k, v, a, b = arrays
    if fused:
        kk, alpha = a, b
        a, b = -kk, kk * alpha
    inputs = WKVInputs(r, log_decay, k, v, a, b)
    if not reverse:
        return implementation(inputs, call)
    inputs, segment_ids = jax.tree.map(lambda x: jnp.flip(x, 1), (inputs, call.segment_ids))
    o, final_state = implementation(inputs, dataclasses.replace(call, segment_ids=segment_ids))
    return jnp.flip(o, 1), final_state


IMPLEMENTATIONS: dict[str, Callable[..., tuple[FloatArray, FloatArray]]] = {
    "mosaic_gpu": wkv7_recurrent_mosaic_gpu,
    "xla": functools.partial(_through, wkv7_recurrent_xla),
    "reference": functools.partial(_through, wkv7_reference),
}


def wkv7_recurrent(
    r: FloatArray,
    log_decay: FloatArray,
    k: FloatArray,
    v: FloatArray,
    a: FloatArray | None = None,
    b: FloatArray | None = None,
    *,
    kk: FloatArray | None = None,
    alpha: FloatArray | None = None,
    scale: float = 1.0,
    initial_state: FloatArray | None = None,
    segment_ids: SegmentIds | None = None,
    num_segments: int | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[FloatArray, FloatArray]:
    """The WKV operator of RWKV-7 token by token, for decoding and short sequences.

    Computes what `pallas_kernels.wkv7` computes, and takes its arguments as documented there, with
    these differences:

    Args:
      r: `[B, T, H, K]`.
      log_decay: `[B, T, H, K]`, <= 0.
      k: `[B, T, H, K]`.
      v: `[B, T, H, V]`.
      a: `[B, T, H, K]`. Give `a` and `b`, or `kk` and `alpha`.
      b: `[B, T, H, K]`.
      kk: `[B, T, H, K]`, the normalised removal key of RWKV-7; `a = -kk`.
      alpha: `[B, T, H, K]`, its in-context learning rate; `b = kk * alpha`.
      scale: a factor on the outputs, known at trace time.
      initial_state: `[B, H, K, V]`, or `[B, N, H, K, V]` with `num_segments`.
      segment_ids: `[B, T]` integers.
      num_segments: N, known at trace time.
      reverse: read the tokens from the last to the first. The initial state is then the one after
        the last token, the final state the one after reading the first.
      implementation: "mosaic_gpu" (kernels for Hopper GPUs that keep one state per 8 tokens for
        the backward: K of 64 or 128, V a multiple of 64, no float64), "xla" (a scan that keeps one
        per 16 tokens), "reference" (a scan that JAX differentiates), or None, which takes the first
        of these that serves the call.

    Returns:
      o: `[B, T, H, V]`, in the dtype of `v`.
      final_state: `[B, H, K, V]` or `[B, N, H, K, V]`, float32 (float64 for float64 inputs).

    Raises:
      ValueError: for wrong shapes, sizes, segment ids or names, and unless exactly one of the pairs
        `a`, `b` and `kk`, `alpha` is given.
      TypeError: for wrong dtypes.
      NotServed: if a named implementation does not serve these arguments.
    """
    pairs: dict[str, Any] = {"a": a, "b": b, "kk": kk, "alpha": alpha}
    given = {name: x for name, x in pairs.items() if x is not None}
    if [*given] not in (["a", "b"], ["kk", "alpha"]):
        raise ValueError(f"give a and b, or kk and alpha, got {' and '.join(given) or 'none'}")
    inputs = {"r": r, "log_decay": log_decay, "k": k, "v": v} | given
    call = WKVCall(
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    check_inputs(inputs, call)
    return dispatch(
        "wkv7_recurrent",
        IMPLEMENTATIONS,
        implementation,
        tuple(inputs.values()),
        call,
        fused="kk" in given,
        reverse=reverse,
    )
