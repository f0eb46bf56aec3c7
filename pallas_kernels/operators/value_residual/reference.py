"""The value residual by its definition."""

import jax

from pallas_kernels.arrays import accumulation_dtype
from pallas_kernels.types import FloatArray


def value_residual_reference(v: FloatArray, v_first: FloatArray, logits: FloatArray) -> FloatArray:
    """The operator of `pallas_kernels.value_residual`, which documents the arguments."""
    inputs = (v, v_first, logits)
    dtype, output_dtype = accumulation_dtype(*inputs), v.dtype
    v, v_first, logits = (x.astype(dtype) for x in inputs)
    return (v + (v_first - v) * jax.nn.sigmoid(logits)).astype(output_dtype)
