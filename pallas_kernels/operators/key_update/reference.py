"""The key update by its definition, which `pallas_kernels.key_update` documents."""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulation_dtype, per_token
from pallas_kernels.types import FloatArray

MIN_NORM = 1e-12
"""The least divisor of a normalisation; the official code's (that of `torch.nn.functional`)."""


def square_norm(x: FloatArray) -> FloatArray:
    """The squared norm over the last axis, which is kept."""
    return jnp.square(x).sum(-1, keepdims=True)


def inverse_norm(square: FloatArray) -> FloatArray:
    """`1 / max(norm, MIN_NORM)` from the squared norm.

    Unlike the norm, the bounded square has a derivative at zero.
    """
    return jax.lax.rsqrt(jnp.maximum(square, MIN_NORM**2))


def key_update_reference(
    k: FloatArray, alpha: FloatArray, removal_scale: FloatArray, replacement_mix: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The operator of `pallas_kernels.key_update`, which documents the arguments."""
    inputs = (k, alpha, removal_scale, replacement_mix)
    dtype, output_dtype = accumulation_dtype(*inputs), k.dtype
    k, alpha = (x.astype(dtype) for x in inputs[:2])
    removal_scale, replacement_mix = (per_token(x, dtype) for x in inputs[2:])
    scaled = k * removal_scale
    kk = scaled * inverse_norm(square_norm(scaled))
    new_k = k * (1 + (alpha - 1) * replacement_mix)
    return new_k.astype(output_dtype), -kk.astype(output_dtype), (kk * alpha).astype(output_dtype)
