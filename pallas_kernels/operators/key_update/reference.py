"""The key update by its definition, which `pallas_kernels.key_update` documents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.sharding import Layout

LAYOUT = Layout(inputs=("B T H K", "B T H K", "H K", "H K"), results="B T H K", independent="B T H")

MIN_NORM = 1e-12
"""The least divisor of a normalisation, as of `torch.nn.functional.normalize`."""


def square_norm(x: Float[Array, "*axes K"]) -> Float[Array, "*axes 1"]:
    """Returns the squared norm over the last axis, which is kept."""
    return jnp.square(x).sum(-1, keepdims=True)


def inverse_norm(square: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Returns `1 / max(norm, MIN_NORM)` for a squared norm.

    Unlike the norm, the bounded square has a derivative at zero.
    """
    return jax.lax.rsqrt(jnp.maximum(square, MIN_NORM**2))


def replacement_key(k: jax.Array, alpha: jax.Array, replacement_mix: jax.Array) -> jax.Array:
    """Returns the key that writes, for arrays that broadcast; kernels use it too."""
    return k * (1 + (alpha - 1) * replacement_mix)


def key_update_reference(
    k: Float[Array, "B T H K"],
    alpha: Float[Array, "B T H K"],
    removal_scale: Float[Array, "H K"],
    replacement_mix: Float[Array, "H K"],
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Computes `pallas_kernels.key_update`, which documents the arguments."""
    inputs = (k, alpha, removal_scale, replacement_mix)
    dtype, output_dtype = accumulation_dtype(*inputs), k.dtype
    k, alpha = (x.astype(dtype) for x in inputs[:2])
    removal_scale, replacement_mix = (per_token(x, dtype) for x in inputs[2:])
    scaled = k * removal_scale
    kk = scaled * inverse_norm(square_norm(scaled))
    new_k = replacement_key(k, alpha, replacement_mix)
    return new_k.astype(output_dtype), -kk.astype(output_dtype), (kk * alpha).astype(output_dtype)


__all__ = [
    "LAYOUT",
    "MIN_NORM",
    "inverse_norm",
    "key_update_reference",
    "replacement_key",
    "square_norm",
]
