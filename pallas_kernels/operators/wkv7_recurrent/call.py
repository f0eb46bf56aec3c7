"""The inputs of `wkv7_recurrent`, and calls of it in terms of `wkv7`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.operators.wkv7.call import Implementation, WKVCall, WKVInputs
from pallas_kernels.types import FloatArray


class RecurrentInputs(NamedTuple):
    """The arrays with a vector for each token and head; also their gradients, or references.

    Attributes:
      r: `[B, T, H, K]`, receptance.
      log_decay: `[B, T, H, K]`, <= 0; a channel's decay is its exponential.
      k: `[B, T, H, K]`, the key that writes.
      v: `[B, T, H, V]`, value.
      removal: `[B, T, H, K]`, a; or kk, in a fused call.
      replacement: `[B, T, H, K]`, b; or alpha, in a fused call.
    """

    r: Any
    log_decay: Any
    k: Any
    v: Any
    removal: Any
    replacement: Any


def removal_pair(removal: jax.Array, replacement: jax.Array, *, fused: bool) -> tuple[Any, Any]:
    """Returns a and b: as they are given, or from kk and alpha in a fused call."""
    return (-removal, removal * replacement) if fused else (removal, replacement)


def run_forward_in_time(
    implementation: Implementation,
    inputs: RecurrentInputs,
    call: WKVCall,
    *,
    fused: bool,
    reverse: bool,
) -> tuple[FloatArray, FloatArray]:
    """Calls an implementation that takes a and b, and reads from the first token to the last.

    Args:
      implementation: of `wkv7`.
      inputs: of `wkv7_recurrent`.
      call: what else the call asks for.
      fused: whether kk and alpha are given instead of a and b.
      reverse: whether to read from the last token to the first.

    Returns:
      Outputs `[B, T, H, V]` and the final state.
    """
    a, b = removal_pair(inputs.removal, inputs.replacement, fused=fused)
    arrays = WKVInputs(inputs.r, inputs.log_decay, inputs.k, inputs.v, a, b)
    if not reverse:
        return implementation(arrays, call)
    arrays, segment_ids = jax.tree.map(lambda x: jnp.flip(x, 1), (arrays, call.segment_ids))
    o, final_state = implementation(arrays, dataclasses.replace(call, segment_ids=segment_ids))
    return jnp.flip(o, 1), final_state


__all__ = ["RecurrentInputs", "removal_pair", "run_forward_in_time"]
