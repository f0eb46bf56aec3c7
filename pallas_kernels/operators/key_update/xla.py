"""The gradients of the key update, from its inputs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.operators.key_update.reference import MIN_NORM, inverse_norm, square_norm
from pallas_kernels.precision import accumulation_dtype, per_token


def key_update_backward(
    k: Float[Array, "B T H K"],
    alpha: Float[Array, "B T H K"],
    removal_scale: Float[Array, "H K"],
    replacement_mix: Float[Array, "H K"],
    *,
    cotangents: tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]],
) -> tuple[
    Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "H K"], Float[Array, "H K"]
]:
    """Returns the gradients of k, alpha, removal_scale and replacement_mix."""
    inputs = (k, alpha, removal_scale, replacement_mix)
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
        dk.astype(inputs[0].dtype),
        dalpha.astype(inputs[1].dtype),
        dremoval_scale.astype(inputs[2].dtype),
        dreplacement_mix.astype(inputs[3].dtype),
    )


__all__ = ["key_update_backward"]
