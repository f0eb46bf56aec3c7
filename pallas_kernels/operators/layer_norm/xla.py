"""The gradients of the layer norm, from its inputs."""

from jaxtyping import Array, Float

from pallas_kernels.operators.layer_norm.reference import Cotangents, of_norm_and_input
from pallas_kernels.operators.output_correction.reference import normalize
from pallas_kernels.precision import accumulation_dtype, per_token


def layer_norm_backward(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    cotangents: Cotangents,
    eps: float,
) -> tuple[Float[Array, "B T C"], Float[Array, " C"], Float[Array, " C"]]:
    """Returns the gradients of x, scale and bias, for `layer_norm` and `pre_norm`."""
    doutput, dinput = of_norm_and_input(cotangents)
    dtype = accumulation_dtype(x, scale, bias)
    normed, factor = normalize(x.astype(dtype), eps)
    doutput = doutput.astype(dtype)
    dnormed = doutput * per_token(scale, dtype)
    # The gradient of x has neither a mean nor a part along x: those would not change normed.
    along = (dnormed * normed).mean(-1, keepdims=True)
    dx = factor * (dnormed - dnormed.mean(-1, keepdims=True) - normed * along)
    if dinput is not None:
        dx += dinput.astype(dtype)
    return (
        dx.astype(x.dtype),
        (doutput * normed).sum((0, 1)).astype(scale.dtype),
        doutput.sum((0, 1)).astype(bias.dtype),
    )


__all__ = ["layer_norm_backward"]
