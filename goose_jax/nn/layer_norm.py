"""Layer norm with statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from goose_jax.config import RWKV7Config


class LayerNorm(nnx.Module):
    """Computes `(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis.

    The computation is in float32 (float64 for float64 inputs).

    Args:
      config: configuration of the model, which gives C, `norm_eps` and the dtypes.

    Attributes:
      scale: `[C]`, factor of each channel, initially 1.
      bias: `[C]`, offset of each channel, initially 0.
    """

    def __init__(self, config: RWKV7Config):
        self.config = config
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, config.param_dtype))

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Normalises each token.

        Args:
          x: `[B, T, C]` in a floating-point dtype.

        Returns:
          `[B, T, C]` in the compute dtype.
        """
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        centred = x.astype(dtype) - jnp.mean(x, axis=-1, keepdims=True, dtype=dtype)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(variance + self.config.norm_eps)
        scaled = normalised * self.scale[None, None] + self.bias[None, None]  # [1, 1, C]
        return scaled.astype(self.config.compute_dtype)
