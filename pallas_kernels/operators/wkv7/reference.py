"""WKV7 by its definition: one token after the other.

    S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    o_t = scale * S_t^T r_t

Every other implementation must equal this one. JAX differentiates it, at the price of keeping the
state of every token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.operators.wkv7.call import Results, WKVCall, WKVInputs, prepare, tokens_first
from pallas_kernels.packing import find_segments
from pallas_kernels.precision import full_products


def update(
    state: Float[Array, "B H K V"], token: WKVInputs
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """Reads one token, with inputs `[B, H, _]`: returns the new state and `S^T r`."""
    r, log_decay, k, v, a, b = token
    removed = jnp.einsum("bhkv,bhk->bhv", state, a)
    state = jnp.exp(log_decay)[..., None] * state
    state += b[..., None] * removed[:, :, None] + k[..., None] * v[:, :, None]
    return state, jnp.einsum("bhkv,bhk->bhv", state, r)


def wkv7_reference(inputs: WKVInputs, call: WKVCall) -> Results:
    """Computes `pallas_kernels.wkv7`, which documents it, token by token."""
    with full_products(call.precision == "high"):
        return _scan_tokens(inputs, call)


def _scan_tokens(inputs: WKVInputs, call: WKVCall) -> Results:
    dtype = inputs.v.dtype
    inputs, initial, segment_ids = prepare(inputs, call)
    tokens = WKVInputs(*(tokens_first(x).astype(initial.dtype) for x in inputs))

    if segment_ids is None:
        final, o = jax.lax.scan(update, initial, tokens)
    elif call.num_segments is None:
        segments = find_segments(segment_ids)

        def update_or_restart(state, step):
            restart, token = step
            return update(jnp.where(restart[:, None, None, None], 0, state), token)

        restart = tokens_first(segments.start & (segments.index > 0))
        final, o = jax.lax.scan(update_or_restart, initial, (restart, tokens))
    else:
        segments = find_segments(segment_ids)
        row = jnp.arange(len(segment_ids))

        def update_segment(carry, step):
            state, final = carry
            start, slot, token = step
            state = jnp.where(start[:, None, None, None], initial[row, slot], state)
            state, o = update(state, token)
            return (state, final.at[row, slot].set(state, mode="drop")), o

        slot = tokens_first(jnp.where(segments.valid, segment_ids - 1, call.num_segments))
        (_, final), o = jax.lax.scan(
            update_segment,
            (jnp.zeros_like(initial[:, 0]), initial),
            (tokens_first(segments.start), slot, tokens),
        )
    return tokens_first(call.scale * o).astype(dtype), final


__all__ = ["update", "wkv7_reference"]
