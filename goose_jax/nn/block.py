"""One layer of the model."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.nn.channel_mix import ChannelMix
from goose_jax.nn.initializers import Layer
from goose_jax.nn.layer_norm import LayerNorm
from goose_jax.nn.time_mix import Heads, TimeMix, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockState:
    """The recurrent state of one layer: `RWKV7State` without its leading axis.

    Attributes:
      time_shift: `[B, C]`, in the compute dtype.
      wkv: `[B, H, K, V]`, float32.
      channel_shift: `[B, C]`, in the compute dtype.
    """

    time_shift: Float[Array, "B C"]
    wkv: Float[Array, "B H K V"]
    channel_shift: Float[Array, "B C"]


class Block(nnx.Module):
    """A time mix and a channel mix, each normalised before and added to the residual stream.

    Args:
      config: of the model.
      layer: this layer's index, from 0; may be traced. It only enters the initial values.
      rngs: source of random numbers.

    Example:
      >>> config = RWKV7Config(vocab_size=1, hidden_size=128, num_layers=1)
      >>> block = Block(config, layer=0, rngs=nnx.Rngs(0))
      >>> x, v_first, state = block(jnp.ones((1, 3, 128), "bfloat16"))
      >>> x.shape, state.channel_shift.shape
      ((1, 3, 128), (1, 128))

    Attributes:
      time_mix_norm: `LayerNorm` before the time mix.
      time_mix: `TimeMix`.
      channel_mix_norm: `LayerNorm` before the channel mix.
      channel_mix: `ChannelMix`.
    """

    def __init__(self, config: RWKV7Config, *, layer: Layer, rngs: nnx.Rngs):
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
        """Runs the layer; arguments and results as for `TimeMix`, `x` being the residual stream."""
        time_state = None if state is None else (state.time_shift, state.wkv)
        mixed, v_first, (time_shift, wkv) = self.time_mix(
            self.time_mix_norm(x), v_first, time_state, segment_ids, is_first=is_first
        )
        x = x + mixed
        channel_state = None if state is None else state.channel_shift
        mixed, channel_shift = self.channel_mix(
            self.channel_mix_norm(x), channel_state, segment_ids
        )
        return x + mixed, v_first, BlockState(time_shift, wkv, channel_shift)
