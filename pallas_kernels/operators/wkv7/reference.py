"""WKV7 by its definition: one token after the other.

    S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale * S_t^T r_t

Every other implementation must equal this one. JAX differentiates it, at the price of keeping the
state of every token.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.operators.wkv7.common import prepare, tokens_first
from pallas_kernels.packing import find_segments
from pallas_kernels.types import FloatArray, SegmentIds

type Token = Sequence[jax.Array]
"""r, log_decay, k, v, a, b of one token, each `[B, H, _]`."""


def update(state: jax.Array, token: Token) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence: the new state `[B, H, K, V]` and `S^T r` `[B, H, V]`."""
    r, log_decay, k, v, a, b = token
    removed = jnp.einsum("bhkv,bhk->bhv", state, a)
    state = jnp.exp(log_decay)[..., None] * state
    state += b[..., None] * removed[:, :, None] + k[..., None] * v[:, :, None]
    return state, jnp.einsum("bhkv,bhk->bhv", state, r)


def wkv7_reference(
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
    min_log_decay: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """The operator of `pallas_kernels.wkv7`, which documents the arguments, token by token."""
    del min_log_decay  # any decay is exact here
    inputs, initial, segment_ids = prepare(
        (r, log_decay, k, v, a, b), initial_state, segment_ids, num_segments
    )
    tokens = tuple(tokens_first(x).astype(initial.dtype) for x in inputs)

    if segment_ids is None:
        final, o = jax.lax.scan(update, initial, tokens)
    elif num_segments is None:
        segments = find_segments(segment_ids)

        def update_or_restart(state, token):
            restart, *token = token
            return update(jnp.where(restart[:, None, None, None], 0, state), token)

        restart = tokens_first(segments.start & (segments.index > 0))
        final, o = jax.lax.scan(update_or_restart, initial, (restart, *tokens))
    else:
        segments = find_segments(segment_ids)
        row = jnp.arange(len(segment_ids))

        def update_segment(carry, token):
            state, final = carry
            start, slot, *token = token
            state = jnp.where(start[:, None, None, None], initial[row, slot], state)
            state, o = update(state, token)
            return (state, final.at[row, slot].set(state, mode="drop")), o

        slot = tokens_first(jnp.where(segments.valid, segment_ids - 1, num_segments))
        (_, final), o = jax.lax.scan(
            update_segment,
            (jnp.zeros_like(initial[:, 0]), initial),
            (tokens_first(segments.start), slot, *tokens),
        )
    return tokens_first(scale * o).astype(v.dtype), final
