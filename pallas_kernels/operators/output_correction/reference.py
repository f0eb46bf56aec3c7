"""The output correction by its definition."""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulation_dtype, per_token
from pallas_kernels.types import FloatArray


def normalize(o: FloatArray, eps: float) -> tuple[FloatArray, FloatArray]:
    """`o` with mean 0 and variance 1 over the last axis, and the factor that made it so."""
    centered = o - o.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return centered * factor, factor


def output_correction_reference(
    o: FloatArray,
    r: FloatArray,
    k: FloatArray,
    v: FloatArray,
    gate: FloatArray,
    bonus: FloatArray,
    norm_scale: FloatArray,
    norm_bias: FloatArray,
    eps: float,
) -> FloatArray:
    """The operator of `pallas_kernels.output_correction`, which documents the arguments."""
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    dtype, output_dtype = accumulation_dtype(*inputs), o.dtype
    o, r, k, v, gate = (x.astype(dtype) for x in inputs[:5])
    bonus, norm_scale, norm_bias = (per_token(x, dtype) for x in inputs[5:])
    normed, _ = normalize(o, eps)
    corrected = normed * norm_scale + norm_bias + (r * k * bonus).sum(-1, keepdims=True) * v
    return (corrected * gate).astype(output_dtype)
