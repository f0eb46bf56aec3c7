"""The time mix: what lets a token read those before it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.nn import initializers
from goose_jax.nn.initializers import Layer
from goose_jax.state import check_array, state_dtypes
from pallas_kernels import (
    key_update,
    output_correction,
    token_shift_mix,
    value_residual,
    wkv7,
    wkv7_recurrent,
)
from pallas_kernels.validation import check_segment_ids

type Tokens = Float[Array, "B T C"]
type Heads = Float[Array, "B T H K"]
type TimeMixState = tuple[Float[Array, "B C"], Float[Array, "B H K V"]]

MIN_LOG_DECAY = -math.exp(-0.5)
"""The log decay of RWKV-7 is `MIN_LOG_DECAY * sigmoid(logits)`, so it lies above this."""

SHORT = 16
"""Fewer tokens than this go through the token by token form of the wkv operator."""


class TimeMix(nnx.Module):
    """The time mix of RWKV-7, usable alone.

    Six mixes of each token with the one before it give receptance, log decay, key, value,
    in-context learning rate (alpha) and gate; the wkv operator updates and reads a state of
    `[K, V]` per head; its output is normalised per head, given a bonus for the current token,
    gated and projected. As in "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4.

    Args:
      config: of the model; `num_layers` enters the initial values.
      layer: this layer's index, from 0; may be traced. It only enters the initial values.
      rngs: source of random numbers.

    Example:
      >>> config = RWKV7Config(vocab_size=1, hidden_size=128, num_layers=2)
      >>> first, second = (TimeMix(config, layer=i, rngs=nnx.Rngs(i)) for i in range(2))
      >>> x = jnp.ones((1, 3, 128), "bfloat16")
      >>> y, v_first, state = first(x)
      >>> y, v_first, state = second(x, v_first)
      >>> y.shape, v_first.shape, state[1].shape
      ((1, 3, 128), (1, 3, 2, 64), (1, 2, 64, 64))

    Attributes:
      shift_mix: `[6, C]`, shares of the previous token, rows as in
        `initializers.SHIFT_MIX_NAMES`.
      receptance: `[C, C]`, and so are key, value and output.
      decay_base: `[C]`, and so are alpha_base and value_residual_base: logits to which a low-rank
        projection of the token is added.
      decay_down: `[C, rank]`, and so are alpha_down, value_residual_down and gate_down.
      decay_up: `[rank, C]`, and so are alpha_up, value_residual_up and gate_up.
      removal_scale: `[H, K]`, makes the removal key of the key.
      replacement_mix: `[H, K]`, how far alpha scales the replacement key.
      bonus: `[H, K]`, weights of the current token's own value.
      head_norm_scale: `[H, V]`.
      head_norm_bias: `[H, V]`.
    """

    def __init__(self, config: RWKV7Config, *, layer: Layer, rngs: nnx.Rngs):
        check_layer(layer, config)
        self.config = config
        C = config.hidden_size
        heads = (config.num_heads, config.head_size)

        def parameter(value: jax.Array) -> nnx.Param:
            return nnx.Param(value.astype(config.param_dtype))

        def square(gain: float) -> nnx.Param:
            return parameter(initializers.orthogonal(rngs.params(), (C, C), gain))

        def down(rank: int) -> nnx.Param:
            return parameter(jnp.zeros((C, rank)))

        def up(rank: int) -> nnx.Param:
            return parameter(initializers.low_rank_up(rngs.params(), rank, C))

        self.shift_mix = parameter(initializers.time_shift_mix(config, layer))
        self.receptance = square(1.0)
        self.key = square(0.1)
        self.value = square(1.0)
        self.output = parameter(jnp.zeros((C, C)))
        self.decay_base = parameter(initializers.decay_base(config, layer))
        self.decay_down = down(config.decay_rank)
        self.decay_up = up(config.decay_rank)
        self.alpha_base = parameter(initializers.alpha_base(config))
        self.alpha_down = down(config.alpha_rank)
        self.alpha_up = up(config.alpha_rank)
        self.value_residual_base = parameter(initializers.value_residual_base(config))
        self.value_residual_down = down(config.value_rank)
        self.value_residual_up = up(config.value_rank)
        self.gate_down = down(config.gate_rank)
        self.gate_up = up(config.gate_rank)
        self.removal_scale = parameter(initializers.removal_scale(config).reshape(heads))
        self.replacement_mix = parameter(jnp.full(heads, 1.02))
        self.bonus = parameter(jnp.full(heads, -0.04))
        head_norm_scale = initializers.head_norm_scale(config, layer)
        self.head_norm_scale = parameter(head_norm_scale.reshape(heads))
        self.head_norm_bias = parameter(jnp.zeros(heads))

    def __call__(
        self,
        x: Tokens,
        v_first: Heads | None = None,
        state: TimeMixState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        is_first: bool | Bool[Array, ""] = False,
    ) -> tuple[Tokens, Heads, TimeMixState]:
        """Mixes each token with those before it.

        Args:
          x: `[B, T, C]` in the compute dtype, normalised.
          v_first: `[B, T, H, V]` in the compute dtype, the values of the first layer; None in the
            first layer, which sets them.
          state: token shift `[B, C]` in the compute dtype and wkv state `[B, H, K, V]` float32, or
            None at the start of a text.
          segment_ids: `[B, T]` integers, several sequences in a row (see
            `pallas_kernels.packing`); 0 is padding.
          is_first: true in the first layer. Needed only where a traced layer runs the same code as
            the others; `v_first` is then an array whose values are ignored.

        Returns:
          y: `[B, T, C]`, to be added to the residual stream.
          v_first: `[B, T, H, V]`, for the layers that follow.
          state: as it came in.

        Raises:
          TypeError: for wrong dtypes, naming the argument.
          ValueError: for wrong shapes, naming the argument.
        """
        self._check(x, v_first, state, segment_ids)
        shift, wkv_state = (None, None) if state is None else state
        mixed, shift = token_shift_mix(x, self.shift_mix[...], state=shift, segment_ids=segment_ids)
        x_receptance, x_decay, x_key, x_value, x_alpha, x_gate = mixed

        r = self._heads(_project(x_receptance, self.receptance))
        log_decay = self._heads(self._log_decay(x_decay))
        alpha = self._heads(self._alpha(x_alpha))
        k = self._heads(_project(x_key, self.key))
        k, a, b = key_update(k, alpha, self.removal_scale[...], self.replacement_mix[...])
        v = self._heads(_project(x_value, self.value))
        if v_first is None:
            v_first = v
        else:
            # Where v_first is v, the residual adds exactly nothing and its logits get exactly no
            # gradient.
            v_first = jnp.where(is_first, v, v_first)
            v = value_residual(v, v_first, self._heads(self._value_residual_logits(x_value)))

        o, wkv_state = self._wkv((r, log_decay, k, v, a, b), wkv_state, segment_ids)
        y = output_correction(
            o,
            r,
            k,
            v,
            self._heads(self._gate(x_gate)),
            self.bonus[...],
            self.head_norm_scale[...],
            self.head_norm_bias[...],
            eps=self.config.head_norm_eps,
        )
        return _project(y.reshape(x.shape), self.output), v_first, (shift, wkv_state)

    def _check(
        self,
        x: Tokens,
        v_first: Heads | None,
        state: TimeMixState | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> None:
        config = self.config
        sizes = {"C": config.hidden_size, "H": config.num_heads}
        sizes |= {"K": config.head_size, "V": config.head_size}
        shift_dtype, wkv_dtype = state_dtypes(config)
        check_array("x", x, "B T C", sizes, shift_dtype)
        if v_first is not None:
            check_array("v_first", v_first, "B T H V", sizes, shift_dtype)
        if state is not None:
            check_array("state[0]", state[0], "B C", sizes, shift_dtype)
            check_array("state[1]", state[1], "B H K V", sizes, wkv_dtype)
        if segment_ids is not None:
            check_segment_ids(segment_ids, sizes)

    def _heads(self, x: Tokens) -> Heads:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_size)

    def _log_decay(self, x: Tokens) -> Tokens:
        low = _project(jnp.tanh(_project(x, self.decay_down)), self.decay_up)
        return MIN_LOG_DECAY * jax.nn.sigmoid(_add_base(low, self.decay_base))

    def _alpha(self, x: Tokens) -> Tokens:
        low = _project(_project(x, self.alpha_down), self.alpha_up)
        return jax.nn.sigmoid(_add_base(low, self.alpha_base)).astype(x.dtype)

    def _value_residual_logits(self, x: Tokens) -> Tokens:
        low = _project(_project(x, self.value_residual_down), self.value_residual_up)
        return _add_base(low, self.value_residual_base).astype(x.dtype)

    def _gate(self, x: Tokens) -> Tokens:
        return _project(jax.nn.sigmoid(_project(x, self.gate_down)), self.gate_up)

    def _wkv(
        self,
        inputs: tuple[Heads, ...],
        state: Float[Array, "B H K V"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Heads, Float[Array, "B H K V"]]:
        implementation = self.config.implementation
        if inputs[0].shape[1] < SHORT:
            return wkv7_recurrent(
                *inputs,
                initial_state=state,
                segment_ids=segment_ids,
                # The names of the chunked forms mean nothing here.
                implementation="reference" if implementation == "reference" else None,
            )
        return wkv7(
            *inputs,
            initial_state=state,
            segment_ids=segment_ids,
            min_log_decay=MIN_LOG_DECAY,
            implementation=implementation,
        )


def check_layer(layer: Layer, config: RWKV7Config) -> None:
    """Checks a layer's index, where it is known."""
    if not isinstance(layer, jax.Array) and not 0 <= layer < config.num_layers:
        raise ValueError(f"{layer=} must be at least 0 and less than {config.num_layers=}")


def _project(x: Tokens, weight: nnx.Param) -> Tokens:
    return x @ weight[...].astype(x.dtype)


def _add_base(low: Tokens, base: nnx.Param) -> Tokens:
    """Adds in float32 at least: bases of trained models are large beside what is added to them."""
    return low.astype(jnp.promote_types(low.dtype, jnp.float32)) + base[None, None]  # [1, 1, C]
