"""The channel mix: the feed-forward half of a block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.nn import initializers
from goose_jax.nn.initializers import Layer
from goose_jax.nn.layer_norm import LayerNorm
from goose_jax.nn.time_mix import Tokens, check_layer
from goose_jax.parallel.in_model import context_axis, enter_heads, sum_over_heads
from goose_jax.state import check_activations
from pallas_kernels import channel_mix, feed_forward
from pallas_kernels.validation import check_segment_ids


class ChannelMix(nnx.Module):
    """The channel mix of RWKV-7, usable alone: `relu(mixed @ key)^2 @ value`.

    `mixed` is a mixture of each token with the token before it. Source: "RWKV-7 Goose with
    Expressive Dynamic State Evolution" (arXiv:2503.14456), section 4.

    Args:
      config: configuration of the model. Inputs must have its `compute_dtype`, which is bfloat16 if
        nothing else is given. The initial values depend on `num_layers`.
      layer: index of this layer, from 0; may be traced. Only the initial values depend on it.
      rngs: source of random numbers for the initial values.

    Example:
      >>> config = RWKV7Config(vocab_size=1, hidden_size=128, num_layers=2)
      >>> layer = ChannelMix(config, layer=0, rngs=nnx.Rngs(0))
      >>> y, state = layer(jnp.ones((1, 3, 128), "bfloat16"))
      >>> y.shape, state.shape
      ((1, 3, 128), (1, 128))

    Attributes:
      shift_mix: `[C]`, share of the previous token in each channel.
      key: `[C, F]`, projection to the inner width.
      value: `[F, C]`, projection back.
    """

    def __init__(self, config: RWKV7Config, *, layer: Layer, rngs: nnx.Rngs):
        check_layer(layer, config)
        self.config = config
        C, F = config.hidden_size, config.intermediate_size

        def parameter(value: jax.Array) -> nnx.Param:
            return nnx.Param(value.astype(config.param_dtype))

        self.shift_mix = parameter(initializers.channel_shift_mix(config, layer))
        self.key = parameter(initializers.orthogonal(rngs.params(), (C, F), 1.0))
        self.value = parameter(jnp.zeros((F, C)))

    def __call__(
        self,
        x: Tokens,
        state: Float[Array, "B C"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Tokens, Float[Array, "B C"]]:
        """Mixes the channels of each token.

        Args:
          x: `[B, T, C]` in the compute dtype, normalised.
          state: `[B, C]` in the compute dtype, the last token before `x`; None at the start of a
            text.
          segment_ids: `[B, T]` integers, if rows hold several sequences (see
            `pallas_kernels.packing`); 0 is padding.

        Returns:
          y: `[B, T, C]`, to be added to the residual stream.
          state: `[B, C]`, the last token of each row.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape; the message names it.
        """
        self._check(x, state, segment_ids)
        y, new_state = channel_mix(
            enter_heads(x),
            self.shift_mix[...],
            *self._weights(),
            state=state,
            segment_ids=segment_ids,
            implementation=self.config.implementation_around_wkv7,
            context_axis=context_axis(),
        )
        return sum_over_heads(y), new_state

    def after_norm(
        self,
        norm: LayerNorm,
        x: Tokens,
        state: Float[Array, "B C"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Tokens, Float[Array, "B C"], Tokens]:
        """Mixes the channels of each token of a residual stream, after a norm.

        Args:
          norm: normalises `x` in the pass that mixes its tokens.
          x: `[B, T, C]` in the compute dtype, the residual stream.
          state: as for a call.
          segment_ids: as for a call.

        Returns:
          y, state: as a call with `norm(x)` returns them.
          x: `[B, T, C]`, the argument, for the residual sum. Use this result in place of the
            argument: it saves a pass of the backward.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape; the message names it.
        """
        self._check(x, state, segment_ids)
        mixes = self.shift_mix[...][None]
        (mixed,), new_state, x = norm.shift_mix(x, mixes, state, segment_ids)
        y = feed_forward(
            mixed, *self._weights(), implementation=self.config.implementation_around_wkv7
        )
        return sum_over_heads(y), new_state, x

    def _check(
        self, x: Tokens, state: Float[Array, "B C"] | None, segment_ids: Int[Array, "B T"] | None
    ) -> None:
        sizes = {"C": self.config.hidden_size}
        check_activations("x", x, "B T C", sizes, self.config)
        if state is not None:
            check_activations("state", state, "B C", sizes, self.config)
        if segment_ids is not None:
            check_segment_ids(segment_ids, sizes)

    def _weights(self) -> tuple[Float[Array, "C F"], Float[Array, "F C"]]:
        dtype = jnp.dtype(self.config.compute_dtype)
        return self.key[...].astype(dtype), self.value[...].astype(dtype)
