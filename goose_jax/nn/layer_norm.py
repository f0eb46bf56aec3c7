"""Layer norm with statistics in float32."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.parallel.in_model import context_axis, enter_heads
from pallas_kernels import layer_norm, norm_shift_mix


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

    def shift_mix(
        self,
        x: Float[Array, "B T C"],
        mixes: Float[Array, "M C"],
        state: Float[Array, "B C"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[tuple[Float[Array, "B T C"], ...], Float[Array, "B C"], Float[Array, "B T C"]]:
        """Normalises each token, and mixes it with the one before, as `norm_shift_mix` does.

        Args:
          x: `[B, T, C]` in the compute dtype, the residual stream.
          mixes: `[M, C]`, shares of the token before.
          state: `[B, C]` in the compute dtype, the norm of the last token before `x`; None at the
            start of a text.
          segment_ids: `[B, T]` integers, if rows hold several sequences; 0 is padding.

        Returns:
          mixed: M arrays `[B, T, C]` in the compute dtype.
          state: `[B, C]`, the norm of the last token of each row.
          x: `[B, T, C]`, the argument, for the residual sum. Use this result in place of the
            argument: it saves a pass of the backward.
        """
        entered = enter_heads(x)
        mixed, state, handed_on = norm_shift_mix(
            entered,
            self.scale[...],
            self.bias[...],
            mixes,
            eps=self.config.norm_eps,
            state=state,
            segment_ids=segment_ids,
            implementation=self.config.implementation_around_wkv7,
            context_axis=context_axis(),
        )
        # What has entered heads differs between devices; the residual stream does not.
        return mixed, state, handed_on if entered is x else x
