"""The key update with a backward that keeps only the inputs."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulation_dtype, per_token
from pallas_kernels.operators.key_update.reference import (
    MIN_NORM,
    inverse_norm,
    key_update_reference,
    square_norm,
)
from pallas_kernels.types import FloatArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; the removal key is computed again.

    Attributes:
      k: `[B, T, H, K]`; enters the removal key and the gradients of alpha and the parameters.
      alpha: `[B, T, H, K]`; a factor in the gradients of both keys.
      removal_scale: `[H, K]`; enters the removal key.
      replacement_mix: `[H, K]`; a factor in the gradients of k and alpha.
    """

    k: FloatArray
    alpha: FloatArray
    removal_scale: FloatArray
    replacement_mix: FloatArray


def _forward(
    k: FloatArray, alpha: FloatArray, removal_scale: FloatArray, replacement_mix: FloatArray
) -> tuple[tuple[FloatArray, FloatArray, FloatArray], Residuals]:
    outputs = key_update_reference(k, alpha, removal_scale, replacement_mix)
    return outputs, Residuals(k, alpha, removal_scale, replacement_mix)


def _backward(
    residuals: Residuals, cotangents: tuple[FloatArray, FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    inputs = (
        residuals.k,
        residuals.alpha,
        residuals.removal_scale,
        residuals.replacement_mix,
    )
    dtype = accumulation_dtype(*inputs)
    k, alpha = (x.astype(dtype) for x in inputs[:2])
    removal_scale, replacement_mix = (per_token(x, dtype) for x in inputs[2:])
    dnew_k, da, db = (x.astype(dtype) for x in cotangents)
    scaled = k * removal_scale
    square = square_norm(scaled)
    inverse = inverse_norm(square)
    kk = scaled * inverse

    dkk = alpha * db - da
    along = (kk * dkk).sum(-1, keepdims=True)  # changes of the norm do not change kk,
    along = jnp.where(square > MIN_NORM**2, along, 0)  # unless the divisor is a constant
    dscaled = inverse * (dkk - kk * along)

    replaced = dnew_k * k
    dk = dscaled * removal_scale + dnew_k * (1 + (alpha - 1) * replacement_mix)
    dalpha = kk * db + replaced * replacement_mix
    dremoval_scale = (dscaled * k).sum((0, 1))
    dreplacement_mix = (replaced * (alpha - 1)).sum((0, 1))
    return (
        dk.astype(residuals.k.dtype),
        dalpha.astype(residuals.alpha.dtype),
        dremoval_scale.astype(residuals.removal_scale.dtype),
        dreplacement_mix.astype(residuals.replacement_mix.dtype),
    )


key_update_xla = jax.custom_vjp(key_update_reference)
key_update_xla.defvjp(_forward, _backward)
