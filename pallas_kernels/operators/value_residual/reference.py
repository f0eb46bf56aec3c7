"""The value residual by its definition."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype


def value_residual_reference(
    v: Float[Array, "B T H V"],
    v_first: Float[Array, "B T H V"],
    logits: Float[Array, "B T H V"],
) -> Float[Array, "B T H V"]:
    """Computes `pallas_kernels.value_residual`, which documents the arguments."""
    inputs = (v, v_first, logits)
    dtype, output_dtype = accumulation_dtype(*inputs), v.dtype
    v, v_first, logits = (x.astype(dtype) for x in inputs)
    return (v + (v_first - v) * jax.nn.sigmoid(logits)).astype(output_dtype)


__all__ = ["value_residual_reference"]
