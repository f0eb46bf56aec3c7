"""The output correction by its definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.sharding import Layout

LAYOUT = Layout(
    inputs=("B T H V", "B T H K", "B T H K", "B T H V", "B T H V", "H K", "H V", "H V"),
    results="B T H V",
    independent="B T H",
)


def normalize(
    x: Float[Array, "*axes V"], eps: float
) -> tuple[Float[Array, "*axes V"], Float[Array, "*axes 1"]]:
    """Returns `x` with mean 0 and variance 1 over the last axis, and `1 / sqrt(variance + eps)`."""
    centered = x - x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return centered * factor, factor


def output_correction_reference(
    o: Float[Array, "B T H V"],
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gate: Float[Array, "B T H V"],
    bonus: Float[Array, "H K"],
    norm_scale: Float[Array, "H V"],
    norm_bias: Float[Array, "H V"],
    *,
    eps: float,
) -> Float[Array, "B T H V"]:
    """Computes `pallas_kernels.output_correction`, which documents the arguments."""
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    dtype, output_dtype = accumulation_dtype(*inputs), o.dtype
    o, r, k, v, gate = (x.astype(dtype) for x in inputs[:5])
    bonus, norm_scale, norm_bias = (per_token(x, dtype) for x in inputs[5:])
    normed, _ = normalize(o, eps)
    corrected = normed * norm_scale + norm_bias + (r * k * bonus).sum(-1, keepdims=True) * v
    return (corrected * gate).astype(output_dtype)


__all__ = ["LAYOUT", "normalize", "output_correction_reference"]
