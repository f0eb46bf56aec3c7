"""The time mix: the half of a block in which tokens read the tokens before them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from goose_jax.config import RWKV7Config
from goose_jax.nn import initializers
from goose_jax.nn.initializers import Layer
from goose_jax.nn.layer_norm import LayerNorm
from goose_jax.nn.remat import PROJECTED
from goose_jax.parallel.in_model import context_axis, enter_heads, sum_over_heads
from goose_jax.state import check_activations, check_wkv_state
from pallas_kernels import (
    KEPT,
    MIN_LOG_DECAY,
    WKV7Inputs,
    output_correction,
    token_shift_mix,
    wkv7,
    wkv7_inputs,
    wkv7_recurrent,
)
from pallas_kernels.validation import check_segment_ids, is_known

type Tokens = Float[Array, "B T C"]
type Heads = Float[Array, "B T H K"]
type HeadChannels = Float[Array, "B T channels_of_heads"]  # C, or a device's part of it
type TimeMixState = tuple[Float[Array, "B C"], Float[Array, "B H K V"]]


CHUNKED_FROM = 16
"""Rows with fewer tokens are read token by token, by `wkv7_recurrent`; others by `wkv7`."""


class TimeMix(nnx.Module):
    """The time mix of RWKV-7, usable alone.

    Six mixes of each token with the one before it give receptance, log decay, key, value,
    in-context learning rate (alpha) and gate; the wkv operator updates and reads a state of
    `[K, V]` per head; its output is normalised per head, given a bonus for the current token,
    gated and projected. Source: "RWKV-7 Goose with Expressive Dynamic State Evolution"
    (arXiv:2503.14456), section 4.

    Args:
      config: configuration of the model. Inputs must have its `compute_dtype`, which is bfloat16 if
        nothing else is given. The initial values depend on `num_layers`.
      layer: index of this layer, from 0; may be traced. The initial values depend on it, and
        whether the layer needs `v_first`.
      rngs: source of random numbers for the initial values.

    Example:
      >>> config = RWKV7Config(vocab_size=1, hidden_size=128, num_layers=2)
      >>> first, second = (TimeMix(config, layer=i, rngs=nnx.Rngs(i)) for i in range(2))
      >>> x = jnp.ones((1, 3, 128), "bfloat16")
      >>> y, v_first, state = first(x)
      >>> y, v_first, state = second(x, v_first)
      >>> y.shape, v_first.shape, state[1].shape
      ((1, 3, 128), (1, 3, 2, 64), (1, 2, 64, 64))

    Attributes:
      needs_v_first: whether calls must give `v_first`: true if `layer` is not 0 and not traced.
      shift_mix: `[6, C]`, shares of the previous token; `initializers.SHIFT_MIX_NAMES` names the
        rows.
      receptance: `[C, C]`, projection to the receptance r.
      key: `[C, C]`, projection to the key k.
      value: `[C, C]`, projection to the value v.
      output: `[C, C]`, projection of the result.
      decay_base: `[C]`, logits of the log decay, to which a low-rank projection is added.
      decay_down: `[C, rank]`, first matrix of that projection.
      decay_up: `[rank, C]`, second matrix of that projection.
      alpha_base: `[C]`, logits of the in-context learning rate alpha, to which a low-rank
        projection is added.
      alpha_down: `[C, rank]`, first matrix of that projection.
      alpha_up: `[rank, C]`, second matrix of that projection.
      value_residual_base: `[C]`, logits of the share of the first layer's value, to which a
        low-rank projection is added.
      value_residual_down: `[C, rank]`, first matrix of that projection.
      value_residual_up: `[rank, C]`, second matrix of that projection.
      gate_down: `[C, rank]`, first matrix of the gate's low-rank projection.
      gate_up: `[rank, C]`, second matrix of the gate's low-rank projection.
      removal_scale: `[H, K]`, factors that make the removal key of the key.
      replacement_mix: `[H, K]`, how far alpha scales the replacement key.
      bonus: `[H, K]`, weights of the current token's own value.
      head_norm_scale: `[H, V]`, scale of the norm over each head's output.
      head_norm_bias: `[H, V]`, bias of the norm over each head's output.
    """

    def __init__(self, config: RWKV7Config, *, layer: Layer, rngs: nnx.Rngs):
        check_layer(layer, config)
        self.config = config
        self.needs_v_first = not isinstance(layer, jax.Array) and layer > 0
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
        """Mixes each token with the tokens before it.

        Args:
          x: `[B, T, C]` in the compute dtype, normalised.
          v_first: `[B, T, H, V]` in the compute dtype, the values of the first layer. None, which
            only the first layer may get, computes them.
          state: the token shift `[B, C]` in the compute dtype and the wkv state `[B, H, K, V]` in
            float32, both after the tokens before; None at the start of a text.
          segment_ids: `[B, T]` integers, if rows hold several sequences (see
            `pallas_kernels.packing`); 0 is padding.
          is_first: true lets this layer be the first, whatever its index: `v_first` may be None,
            and if it is given, its values are ignored. A scan over layers needs this, because all
            layers run the same code. It may be traced.

        Returns:
          y: `[B, T, C]`, to be added to the residual stream.
          v_first: `[B, T, H, V]`, for the next layers.
          state: the token shift and the wkv state after the last token of each row.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: if an argument has another shape, or if a layer after the first gets no
            `v_first`; the message names it.
        """
        self._check(x, v_first, state, segment_ids, is_first)
        shift, wkv_state = (None, None) if state is None else state
        mixed, shift = token_shift_mix(
            enter_heads(x),
            self.shift_mix[...],
            state=shift,
            segment_ids=segment_ids,
            implementation=self.config.implementation_around_wkv7,
            context_axis=context_axis(),
        )
        y, v_first, wkv_state = self._of_mixed(
            mixed, v_first, wkv_state, segment_ids, is_first=is_first
        )
        return y, v_first, (shift, wkv_state)

    def after_norm(
        self,
        norm: LayerNorm,
        x: Tokens,
        v_first: Heads | None = None,
        state: TimeMixState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        is_first: bool | Bool[Array, ""] = False,
    ) -> tuple[Tokens, Heads, TimeMixState, Tokens]:
        """Mixes each token of a residual stream with the tokens before it, after a norm.

        Args:
          norm: normalises `x` in the pass that mixes its tokens.
          x: `[B, T, C]` in the compute dtype, the residual stream.
          v_first: as for a call, and so are the others.
          state: the token shift and the wkv state.
          segment_ids: segments of rows.
          is_first: whether this is the first layer.

        Returns:
          y, v_first, state: as a call with `norm(x)` returns them.
          x: `[B, T, C]`, the argument, for the residual sum. Use this result in place of the
            argument: it saves a pass of the backward.

        Raises:
          TypeError: if an argument has another dtype; the message names it.
          ValueError: as a call does.
        """
        self._check(x, v_first, state, segment_ids, is_first)
        shift, wkv_state = (None, None) if state is None else state
        mixed, shift, x = norm.shift_mix(x, self.shift_mix[...], shift, segment_ids)
        y, v_first, wkv_state = self._of_mixed(
            mixed, v_first, wkv_state, segment_ids, is_first=is_first
        )
        return y, v_first, (shift, wkv_state), x

    def _of_mixed(
        self,
        mixed: tuple[Tokens, ...],
        v_first: Heads | None,
        wkv_state: Float[Array, "B H K V"] | None,
        segment_ids: Int[Array, "B T"] | None,
        *,
        is_first: bool | Bool[Array, ""],
    ) -> tuple[Tokens, Heads, Float[Array, "B H K V"]]:
        """Returns the output, the values of the first layer and the new wkv state."""
        x_receptance, x_decay, x_key, x_value, x_alpha, x_gate = mixed

        r = self._heads(_project(x_receptance, self.receptance))
        k = self._heads(_project(x_key, self.key))
        v = self._heads(_project(x_value, self.value))
        logits = value_residual_base = None
        if is_first is True:
            v_first = None
        if v_first is not None:
            if is_first is not False:
                # In the first layer v_first is v: the residual adds exactly zero, and the gradient
                # of its logits is exactly zero.
                v_first = jnp.where(is_first, v, v_first)
            logits = self._heads(self._value_residual_logits(x_value))
            value_residual_base = self._of_heads(self.value_residual_base)
        made = wkv7_inputs(
            k,
            v,
            v_first,
            self._heads(self._decay_logits(x_decay)),
            self._heads(self._alpha_logits(x_alpha)),
            logits,
            decay_base=self._of_heads(self.decay_base),
            alpha_base=self._of_heads(self.alpha_base),
            value_residual_base=value_residual_base,
            removal_scale=self.removal_scale[...],
            replacement_mix=self.replacement_mix[...],
            implementation=self._implementation_of_inputs(r),
        )
        o, wkv_state = self._wkv(r, made, wkv_state, segment_ids)
        y = output_correction(
            o,
            r,
            made.bonus_k,
            made.bonus_v,
            self._heads(self._gate(x_gate)),
            self.bonus[...],
            self.head_norm_scale[...],
            self.head_norm_bias[...],
            eps=self.config.head_norm_eps,
            implementation=self.config.implementation_around_wkv7,
        )
        y = checkpoint_name(y, KEPT)
        y = sum_over_heads(_multiply(y.reshape(*y.shape[:2], -1), self.output))
        return y, made.v_first, wkv_state

    def _check(
        self,
        x: Tokens,
        v_first: Heads | None,
        state: TimeMixState | None,
        segment_ids: Int[Array, "B T"] | None,
        is_first: bool | Bool[Array, ""],
    ) -> None:
        config = self.config
        # On a mesh that divides heads, each device has the parameters and the states of some.
        sizes = {"C": config.hidden_size, "H": self.bonus.shape[0]}
        sizes |= {"K": config.head_size, "V": config.head_size}
        check_activations("x", x, "B T C", sizes, config)
        if v_first is not None:
            check_activations("v_first", v_first, "B T H V", sizes, config)
        elif self.needs_v_first and is_first is not True:
            raise ValueError(
                "v_first must be given, the values of the first layer: this layer was not made "
                "with layer=0 (is_first=True lets it be the first)"
            )
        if state is not None:
            check_activations("state[0]", state[0], "B C", sizes, config)
            check_wkv_state("state[1]", state[1], "B H K V", sizes, config)
        if segment_ids is not None:
            check_segment_ids(segment_ids, sizes)

    def _heads(self, x: Tokens) -> Heads:
        return x.reshape(*x.shape[:-1], -1, self.config.head_size)

    def _of_heads(self, parameter: nnx.Param) -> Float[Array, "H K"]:
        return parameter[...].reshape(-1, self.config.head_size)

    def _implementation_of_inputs(self, r: Heads) -> str | None:
        """Returns the implementation of `wkv7_inputs` for rows as long as those of r.

        Its kernels round the log decay to bfloat16, which only the kernels of `wkv7` do anyway.
        """
        implementation = self.config.implementation_around_wkv7
        exact = _is_short(r) or self.config.precision is not None
        return "xla" if implementation is None and exact else implementation

    @jax.named_scope("decay_logits")
    def _decay_logits(self, x: Tokens) -> HeadChannels:
        return _multiply(jnp.tanh(_project(x, self.decay_down)), self.decay_up)

    @jax.named_scope("alpha_logits")
    def _alpha_logits(self, x: Tokens) -> HeadChannels:
        return _multiply(_project(x, self.alpha_down), self.alpha_up)

    @jax.named_scope("value_residual_logits")
    def _value_residual_logits(self, x: Tokens) -> HeadChannels:
        return _multiply(_project(x, self.value_residual_down), self.value_residual_up)

    @jax.named_scope("gate")
    def _gate(self, x: Tokens) -> HeadChannels:
        return _multiply(jax.nn.sigmoid(_project(x, self.gate_down)), self.gate_up)

    def _wkv(
        self,
        r: Heads,
        made: WKV7Inputs,
        state: Float[Array, "B H K V"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Heads, Float[Array, "B H K V"]]:
        inputs = (r, made.log_decay, made.k, made.v, made.a, made.b)
        implementation = self.config.implementation
        if _is_short(r) and context_axis() is None:
            return wkv7_recurrent(
                *inputs,
                initial_state=state,
                segment_ids=segment_ids,
                # All other names belong to implementations in chunks, which this operator lacks.
                implementation="reference" if implementation == "reference" else None,
            )
        return wkv7(
            *inputs,
            initial_state=state,
            segment_ids=segment_ids,
            min_log_decay=MIN_LOG_DECAY,
            precision=self.config.precision,
            implementation=implementation,
            context_axis=context_axis(),
        )


def check_layer(layer: Layer, config: RWKV7Config) -> None:
    """Checks the index of a layer, if it is not traced.

    Raises:
      ValueError: if there is no such layer.
    """
    if not isinstance(layer, jax.Array) and not 0 <= layer < config.num_layers:
        raise ValueError(f"{layer=} must be at least 0 and less than {config.num_layers=}")


def _is_short(x: jax.Array) -> bool:
    """Returns whether rows are read token by token; not so if their length is a symbol."""
    length = x.shape[1]
    return is_known(length) and length < CHUNKED_FROM


def _multiply(x: Float[Array, "B T inputs"], weight: nnx.Param) -> Float[Array, "B T outputs"]:
    """Multiplies tokens by a matrix; `jax.checkpoint` may compute the result again.

    For products of few channels, which take no longer than to keep and read their results, and for
    those that the backward does not need.
    """
    with jax.named_scope("projection"):
        return x @ weight[...].astype(x.dtype)


def _project(x: Float[Array, "B T inputs"], weight: nnx.Param) -> Float[Array, "B T outputs"]:
    """Multiplies tokens by a matrix; the result is kept for the backward."""
    return checkpoint_name(_multiply(x, weight), PROJECTED)
