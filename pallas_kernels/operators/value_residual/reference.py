"""The value residual by its definition."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.sharding import Layout

LAYOUT = Layout(inputs=("B T H V",) * 3, results="B T H V", independent="B T H")


def move_to_first(v: jax.Array, v_first: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `v + (v_first - v) * sigmoid(logits)`; kernels use it too."""
    return v + (v_first - v) * jax.nn.sigmoid(logits)


def value_residual_reference(
    v: Float[Array, "*axes"],
    v_first: Float[Array, "*axes"],
    logits: Float[Array, "*axes"],
) -> Float[Array, "*axes"]:
    """Computes `pallas_kernels.value_residual`, which documents the arguments."""
    inputs = (v, v_first, logits)
    dtype, output_dtype = accumulation_dtype(*inputs), v.dtype
    v, v_first, logits = (x.astype(dtype) for x in inputs)
    return move_to_first(v, v_first, logits).astype(output_dtype)


__all__ = ["LAYOUT", "move_to_first", "value_residual_reference"]
