"""The gradients of the output correction, from its inputs."""

from jaxtyping import Array, Float

from pallas_kernels.operators.output_correction.reference import normalize
from pallas_kernels.precision import accumulation_dtype, per_token


def output_correction_backward(
    o: Float[Array, "B T H V"],
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gate: Float[Array, "B T H V"],
    bonus: Float[Array, "H K"],
    norm_scale: Float[Array, "H V"],
    norm_bias: Float[Array, "H V"],
    *,
    cotangents: Float[Array, "B T H V"],
    eps: float,
) -> tuple[Float[Array, "..."], ...]:
    """Returns the gradients of the eight inputs of `pallas_kernels.output_correction`."""
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    dtype = accumulation_dtype(*inputs)
    o, r, k, v, gate = (x.astype(dtype) for x in inputs[:5])
    bonus, norm_scale, norm_bias = (per_token(x, dtype) for x in inputs[5:])
    doutput = cotangents.astype(dtype)
    normed, factor = normalize(o, eps)
    rk = r * k
    weight = (rk * bonus).sum(-1, keepdims=True)  # [B, T, H, 1], of v
    corrected = normed * norm_scale + norm_bias + weight * v

    dcorrected = doutput * gate
    dweight = (dcorrected * v).sum(-1, keepdims=True)
    dnormed = dcorrected * norm_scale
    # The gradient of o has neither a mean nor a part along o: those would not change normed.
    along = (dnormed * normed).mean(-1, keepdims=True)
    do = factor * (dnormed - dnormed.mean(-1, keepdims=True) - normed * along)
    gradients = (
        do,
        dweight * k * bonus,
        dweight * r * bonus,
        dcorrected * weight,
        doutput * corrected,
        (dweight * rk).sum((0, 1)),
        (dcorrected * normed).sum((0, 1)),
        dcorrected.sum((0, 1)),
    )
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


__all__ = ["output_correction_backward"]
