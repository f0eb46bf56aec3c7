"""One layer of the model."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.nn.channel_mix import ChannelMix
from goose_jax.nn.initializers import Layer
from goose_jax.nn.layer_norm import LayerNorm
from goose_jax.nn.remat import PROJECTED
from goose_jax.nn.time_mix import Heads, TimeMix, Tokens
from goose_jax.state import check_activations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockState:
    """The recurrent state of one layer: `RWKV7State` without its leading axis.

    Attributes:
      time_shift: `[B, C]` in the compute dtype, the last token's input to the time mix.
      wkv: `[B, H, K, V]` float32, what each head has learnt from the tokens so far.
      channel_shift: `[B, C]` in the compute dtype, the last token's input to the channel mix.
    """

    time_shift: Float[Array, "B C"]
    wkv: Float[Array, "B H K V"]
    channel_shift: Float[Array, "B C"]


class Block(nnx.Module):
    """A time mix and a channel mix. Each reads the normalised residual stream and is added to it.

    The residual stream is rounded to the compute dtype once per block: the channel mix reads a
    rounded sum, but what rounding took from that sum is added to the next one. Rounding the stream
    makes most of the error of a deep model's gradients in bfloat16.

    Args:
      config: configuration of the model. Inputs must have its `compute_dtype`, which is bfloat16 if
        nothing else is given.
      layer: index of this layer, from 0; may be traced. The initial values depend on it, and
        whether the layer needs `v_first`.
      rngs: source of random numbers for the initial values.

    Example:
      >>> config = RWKV7Config(vocab_size=1, hidden_size=128, num_layers=1)
      >>> block = Block(config, layer=0, rngs=nnx.Rngs(0))
      >>> x, v_first, state = block(jnp.ones((1, 3, 128), "bfloat16"))
      >>> x.shape, state.channel_shift.shape
      ((1, 3, 128), (1, 128))

    Attributes:
      config: configuration of the model.
      time_mix_norm: `LayerNorm` before the time mix.
      time_mix: `TimeMix`.
      channel_mix_norm: `LayerNorm` before the channel mix.
      channel_mix: `ChannelMix`.
    """

    def __init__(self, config: RWKV7Config, *, layer: Layer, rngs: nnx.Rngs):
        self.config = config
        self.time_mix_norm = LayerNorm(config)
        self.time_mix = TimeMix(config, layer=layer, rngs=rngs)
        self.channel_mix_norm = LayerNorm(config)
        self.channel_mix = ChannelMix(config, layer=layer, rngs=rngs)

    def __call__(
        self,
        x: Tokens,
        v_first: Heads | None = None,
        state: BlockState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        is_first: bool | Bool[Array, ""] = False,
    ) -> tuple[Tokens, Heads, BlockState]:
        """Runs the layer.

        Args:
          x: `[B, T, C]` in the compute dtype, the residual stream.
          v_first: `[B, T, H, V]` in the compute dtype, the values of the first layer. None, which
            only the first layer may get, computes them.
          state: the layer's state after the tokens before; None at the start of a text.
          segment_ids: `[B, T]` integers, if rows hold several sequences (see
            `pallas_kernels.packing`); 0 is padding.
          is_first: true lets this layer be the first, as in `TimeMix`. It may be traced.

        Returns:
          x: `[B, T, C]`, the residual stream after this layer.
          v_first: `[B, T, H, V]`, for the next layers.
          state: the state after the last token of each row.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape, or if a layer after the first gets no
            `v_first`; the message names it.
        """
        check_activations("x", x, "B T C", {"C": self.config.hidden_size}, self.config)
        time_state = None if state is None else (state.time_shift, state.wkv)
        mixed, v_first, (time_shift, wkv), x = self.time_mix.after_norm(
            self.time_mix_norm, x, v_first, time_state, segment_ids, is_first=is_first
        )
        middle = checkpoint_name(x + mixed, PROJECTED)
        lost = _lost_by_rounding(x, mixed, middle)
        channel_state = None if state is None else state.channel_shift
        mixed, channel_shift, middle = self.channel_mix.after_norm(
            self.channel_mix_norm, middle, channel_state, segment_ids
        )
        x = (middle + lost + mixed).astype(middle.dtype)
        return x, v_first, BlockState(time_shift, wkv, channel_shift)


def _lost_by_rounding(x: Tokens, y: Tokens, rounded: Tokens) -> Float[Array, "B T C"]:
    """Returns x + y minus their rounded sum, in float32 or wider; its gradient is zero."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.stop_gradient(x.astype(dtype) + y.astype(dtype) - rounded.astype(dtype))
