"""The gradients of the value residual, from its inputs."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype


def value_residual_backward(
    v: Float[Array, "B T H V"],
    v_first: Float[Array, "B T H V"],
    logits: Float[Array, "B T H V"],
    *,
    cotangents: Float[Array, "B T H V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H V"], Float[Array, "B T H V"]]:
    """Returns the gradients of v, v_first and logits."""
    inputs = (v, v_first, logits)
    dtype = accumulation_dtype(*inputs)
    v, v_first, logits = (x.astype(dtype) for x in inputs)
    share, rest = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    doutput = cotangents.astype(dtype)
    gradients = doutput * rest, doutput * share, doutput * (v_first - v) * share * rest
    dv, dv_first, dlogits = (
        gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)
    )
    return dv, dv_first, dlogits


__all__ = ["value_residual_backward"]
