"""The channel mix by its definition: `relu(mixed @ key_weight)^2 @ value_weight`."""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulation_dtype, contract
from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference
from pallas_kernels.types import FloatArray, SegmentIds


def project_keys(mixed: FloatArray, key_weight: FloatArray) -> FloatArray:
    """`relu(mixed @ key_weight)` `[B, T, F]` in the dtype of `mixed` `[B, T, C]`."""
    return jax.nn.relu(contract("btc,cf->btf", mixed, key_weight)).astype(mixed.dtype)


def square(activation: FloatArray) -> FloatArray:
    """The square, computed in float32 at least, in the dtype of the argument."""
    return jnp.square(activation.astype(accumulation_dtype(activation))).astype(activation.dtype)


def channel_mix_reference(
    x: FloatArray,
    mix: FloatArray,
    key_weight: FloatArray,
    value_weight: FloatArray,
    state: FloatArray | None,
    segment_ids: SegmentIds | None,
) -> tuple[FloatArray, FloatArray]:
    """The operator of `pallas_kernels.channel_mix`, which documents the arguments."""
    (mixed,), new_state = token_shift_mix_reference(x, mix[None], state, segment_ids)
    activation = project_keys(mixed, key_weight)
    y = contract("btf,fc->btc", square(activation), value_weight)
    return y.astype(x.dtype), new_state
