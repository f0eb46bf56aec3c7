"""The layer norm by its definition."""

from jaxtyping import Array, Float

from pallas_kernels.operators.output_correction.reference import normalize
from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.sharding import Layout

LAYOUT = Layout(inputs=("B T C", "C", "C"), results="B T C", independent="B T")


def layer_norm_reference(
    x: Float[Array, "B T C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, eps: float
) -> Float[Array, "B T C"]:
    """Computes `pallas_kernels.layer_norm`, which documents the arguments."""
    dtype = accumulation_dtype(x, scale, bias)
    normed, _ = normalize(x.astype(dtype), eps)
    return (normed * per_token(scale, dtype) + per_token(bias, dtype)).astype(x.dtype)


__all__ = ["LAYOUT", "layer_norm_reference"]
