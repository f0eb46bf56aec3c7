"""WKV7 as a scan over tokens, with a backward of bounded memory."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.operators.wkv7.call import WKVCall, WKVInputs, prepare, tokens_first
from pallas_kernels.operators.wkv7.reference import update
from pallas_kernels.operators.wkv7.segment_states import (
    load_state,
    load_state_backward,
    never_stored,
    store_state,
    store_state_backward,
)
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs, run_forward_in_time
from pallas_kernels.packing import find_segments
from pallas_kernels.types import FloatArray, SegmentIds
from pallas_kernels.validation import is_known

BLOCK = 16
"""Tokens between two states that are kept for the backward."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateTransfers:
    """Which of the N stored states of a row are loaded and stored at each token; N means none.

    Attributes:
      load: `[T, B]` int32, the stored state that replaces the carried one before a token.
      store: `[T, B]` int32, the stored state that the state after a token replaces.
    """

    load: jax.Array
    store: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      tokens: the inputs, each `[T / BLOCK, BLOCK, B, H, _]`.
      transfers: its arrays are `[T / BLOCK, BLOCK, B]`; None if a row is one sequence.
      stored: `[B, N, H, K, V]`, the states that may be loaded; None if a row is one sequence.
      entries: `[T / BLOCK, B, H, K, V]`, the state before each block. The backward computes the
        states within a block again.
    """

    tokens: WKVInputs
    transfers: StateTransfers | None
    stored: jax.Array | None
    entries: jax.Array


def _step_backward(
    state: jax.Array, dstate: jax.Array, token: WKVInputs, do: jax.Array
) -> tuple[jax.Array, WKVInputs]:
    """Transposes `update`.

    Args:
      state: `[B, H, K, V]`, the state before the token.
      dstate: `[B, H, K, V]`, the gradient of the state after the token.
      token: the inputs of the token, each `[B, H, _]`.
      do: `[B, H, V]`, the gradient of `S^T r`.

    Returns:
      The gradient of the state before the token, and the gradients of the inputs.
    """
    r, log_decay, k, v, a, b = token
    new_state, _ = update(state, token)
    dstate = dstate + r[..., None] * do[:, :, None]
    decay = jnp.exp(log_decay)
    dremoved = jnp.einsum("bhkv,bhk->bhv", dstate, b)
    dtoken = WKVInputs(
        r=jnp.einsum("bhkv,bhv->bhk", new_state, do),
        log_decay=decay * jnp.sum(state * dstate, axis=-1),
        k=jnp.einsum("bhkv,bhv->bhk", dstate, v),
        v=jnp.einsum("bhkv,bhk->bhv", dstate, k),
        a=jnp.einsum("bhkv,bhv->bhk", state, dremoved),
        b=jnp.einsum("bhkv,bhv->bhk", dstate, jnp.einsum("bhkv,bhk->bhv", state, a)),
    )
    return decay[..., None] * dstate + a[..., None] * dremoved[:, :, None], dtoken


@jax.custom_vjp
def _recur(
    tokens: WKVInputs, transfers: StateTransfers | None, stored: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns outputs, the state after the last token, and the stored states after it."""
    return _recur_forward(tokens, transfers, stored, state)[0]


def _recur_forward(tokens, transfers, stored, state):
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

    (state, stored), (entries, o) = jax.lax.scan(block, (state, stored), (tokens, transfers))
    return (o, state, stored), Residuals(tokens, transfers, initially_stored, entries)


def _recur_backward(residuals, gradients):
    do, dstate, dstored = gradients
    dtype = dstate.dtype

    def readstate(state, token):
        token, at = token
        if at is not None:
            state = load_state(state, residuals.stored, at.load)
        return update(state, WKVInputs(*(x.astype(dtype) for x in token)))[0], state

    def step(carry, inputs):
        dstate, dloaded = carry
        state, token, at, do = inputs
        if at is not None:
            dstate += store_state_backward(dstored, at.store)
        inputs_of_token = WKVInputs(*(x.astype(dtype) for x in token))
        dstate, dtoken = _step_backward(state, dstate, inputs_of_token, do)
        if at is not None:
            dstate, dloaded = load_state_backward(dstate, dloaded, at.load)
        dtoken = jax.tree.map(lambda d, x: d.astype(x.dtype), dtoken, token)
        return (dstate, dloaded), dtoken

    def block(carry, inputs):
        entry, tokens, at, do = inputs
        _, states = jax.lax.scan(readstate, entry, (tokens, at))
        return jax.lax.scan(step, carry, (states, tokens, at, do), reverse=True)

    at = residuals.transfers
    dloaded = None if at is None else never_stored(dstored, at.store)
    (dstate, dloaded), dtokens = jax.lax.scan(
        block, (dstate, dloaded), (residuals.entries, residuals.tokens, at, do), reverse=True
    )
    return dtokens, None, dloaded, dstate


_recur.defvjp(_recur_forward, _recur_backward)


def _find_transfers(segment_ids: SegmentIds, num_segments: int | None) -> StateTransfers:
    segments = find_segments(segment_ids)
    if num_segments is None:  # one stored state, zero, that later segments start from
        restart = segments.start & (segments.index > 0)
        load, store = jnp.where(restart, 0, 1), jnp.ones_like(segments.index)
    else:
        slot = jnp.where(segments.valid, segment_ids - 1, num_segments)
        load = jnp.where(segments.start, slot, num_segments)
        store = jnp.where(segments.end, slot, num_segments)
    return StateTransfers(tokens_first(load), tokens_first(store))


def _scan_tokens(inputs: WKVInputs, call: WKVCall) -> tuple[FloatArray, FloatArray]:
    """Computes a call whose pairs are a and b, and whose tokens are in the order of reading."""
    T, dtype, num_segments = inputs.r.shape[1], inputs.v.dtype, call.num_segments
    inputs, initial, segment_ids = prepare(inputs, call)
    at = None if segment_ids is None else _find_transfers(segment_ids, num_segments)
    state, stored = initial, None
    if num_segments is not None:
        state, stored = jnp.zeros_like(initial[:, 0]), initial
    elif at is not None:
        stored = jnp.zeros_like(initial[:, None])

    block = min(T, BLOCK) if is_known(T) else BLOCK
    blocks = -(-T // block)

    def in_blocks(x, fill):  # [T, ...] to [T / block, block, ...]
        missing = [(0, blocks * block - T)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, missing, constant_values=fill).reshape(blocks, block, *x.shape[1:])

    tokens = WKVInputs(*(in_blocks(tokens_first(x), 0) for x in inputs))
    if at is not None:
        at = jax.tree.map(lambda x: in_blocks(x, num_segments or 1), at)
    o, state, stored = _recur(tokens, at, stored, state)
    o = call.scale * tokens_first(o.reshape(blocks * block, *o.shape[2:])[:T])
    return o.astype(dtype), state if num_segments is None or stored is None else stored


def wkv7_recurrent_xla(
    inputs: RecurrentInputs, call: WKVCall, *, fused: bool, reverse: bool
) -> tuple[FloatArray, FloatArray]:
    """Scans over tokens; the backward keeps one state per `BLOCK` tokens.

    `pallas_kernels.wkv7_recurrent` documents the arguments.
    """
    return run_forward_in_time(_scan_tokens, inputs, call, fused=fused, reverse=reverse)


__all__ = ["wkv7_recurrent_xla"]
