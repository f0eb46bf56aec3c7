"""The value residual by its definition."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype


def value_residual_reference(
    v: Float[Array, "*axes"],
    v_first: Float[Array, "*axes"],
    logits: Float[Array, "*axes"],
) -> Float[Array, "*axes"]:
    """Computes `pallas_kernels.value_residual`, which documents the arguments."""
    inputs = (v, v_first, logits)
    dtype, output_dtype = accumulation_dtype(*inputs), v.dtype
    v, v_first, logits = (x.astype(dtype) for x in inputs)
    return (v + (v_first - v) * jax.nn.sigmoid(logits)).astype(output_dtype)


__all__ = ["value_residual_reference"]
