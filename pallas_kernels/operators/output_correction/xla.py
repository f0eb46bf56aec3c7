"""The output correction with a backward that keeps only the inputs."""

import dataclasses

import jax

from pallas_kernels.arrays import accumulation_dtype, per_token
from pallas_kernels.operators.output_correction.reference import (
    normalize,
    output_correction_reference,
)
from pallas_kernels.types import FloatArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; mean, variance and bonus term are computed again.

    Attributes:
      o: `[B, T, H, V]`; normalised again.
      r: `[B, T, H, K]`; a factor of the bonus term.
      k: `[B, T, H, K]`; a factor of the bonus term.
      v: `[B, T, H, V]`; a factor of the bonus term.
      gate: `[B, T, H, V]`; a factor of everything.
      bonus: `[H, K]`; a factor of the bonus term.
      norm_scale: `[H, V]`; a factor of the normalised o.
      norm_bias: `[H, V]`; part of the gradient of the gate.
    """

    o: FloatArray
    r: FloatArray
    k: FloatArray
    v: FloatArray
    gate: FloatArray
    bonus: FloatArray
    norm_scale: FloatArray
    norm_bias: FloatArray


def _forward(
    o: FloatArray,
    r: FloatArray,
    k: FloatArray,
    v: FloatArray,
    gate: FloatArray,
    bonus: FloatArray,
    norm_scale: FloatArray,
    norm_bias: FloatArray,
    eps: float,
) -> tuple[FloatArray, Residuals]:
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    return output_correction_reference(*inputs, eps), Residuals(*inputs)


def _backward(eps: float, residuals: Residuals, doutput: FloatArray) -> tuple[FloatArray, ...]:
    inputs = tuple(getattr(residuals, field.name) for field in dataclasses.fields(residuals))
    dtype = accumulation_dtype(*inputs)
    o, r, k, v, gate = (x.astype(dtype) for x in inputs[:5])
    bonus, norm_scale, norm_bias = (per_token(x, dtype) for x in inputs[5:])
    doutput = doutput.astype(dtype)
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


output_correction_xla = jax.custom_vjp(output_correction_reference, nondiff_argnums=(8,))
output_correction_xla.defvjp(_forward, _backward)
