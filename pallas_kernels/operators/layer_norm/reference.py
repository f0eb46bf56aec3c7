"""The layer norm by its definition."""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.operators.output_correction.reference import normalize
from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.sharding import Layout

LAYOUT = Layout(inputs=("B T C", "C", "C"), results="B T C", independent="B T")
PRE_NORM_LAYOUT = dataclasses.replace(LAYOUT, results=("B T C", "B T C"))

type Cotangents = Float[Array, "B T C"] | tuple[Float[Array, "B T C"], Float[Array, "B T C"]]
"""The gradient of `layer_norm`'s result, or those of `pre_norm`'s results."""


def layer_norm_reference(
    x: Float[Array, "B T C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, eps: float
) -> Float[Array, "B T C"]:
    """Computes `pallas_kernels.layer_norm`, which documents the arguments."""
    dtype = accumulation_dtype(x, scale, bias)
    normed, _ = normalize(x.astype(dtype), eps)
    return (normed * per_token(scale, dtype) + per_token(bias, dtype)).astype(x.dtype)


def of_norm_and_input(
    cotangents: Cotangents,
) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"] | None]:
    """Returns the gradients of the norm and of the input that `pre_norm` hands on, if it does."""
    return cotangents if isinstance(cotangents, tuple) else (cotangents, None)


__all__ = ["LAYOUT", "PRE_NORM_LAYOUT", "Cotangents", "layer_norm_reference", "of_norm_and_input"]
