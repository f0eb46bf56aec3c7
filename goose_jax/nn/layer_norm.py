"""Layer norm with statistics in float32."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from goose_jax.config import RWKV7Config
from pallas_kernels import layer_norm, pre_norm


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
        normed = layer_norm(x, self.scale[...], self.bias[...], eps=self.config.norm_eps)
        return normed.astype(self.config.compute_dtype)

    def before_residual(
        self, x: Float[Array, "B T C"]
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
        """Normalises each token, and hands `x` on for the residual sum.

        Args:
          x: `[B, T, C]` in the compute dtype.

        Returns:
          normed: `[B, T, C]` in the compute dtype.
          x: `[B, T, C]`, the argument. Use this result in place of the argument: it saves a pass
            of the backward.
        """
        normed, x = pre_norm(x, self.scale[...], self.bias[...], eps=self.config.norm_eps)
        return normed.astype(self.config.compute_dtype), x
