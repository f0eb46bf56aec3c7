"""One token through all layers, by the definitions of the operators in a layer."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.operators.channel_mix.reference import channel_mix_reference
from pallas_kernels.operators.decode_layers.weights import LayerWeights
from pallas_kernels.operators.key_update.reference import key_update_reference
from pallas_kernels.operators.output_correction.reference import (
    normalize,
    output_correction_reference,
)
from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference
from pallas_kernels.operators.value_residual.reference import value_residual_reference
from pallas_kernels.operators.wkv7.call import WKVInputs
from pallas_kernels.operators.wkv7.log_decay import log_decay_from_logits
from pallas_kernels.operators.wkv7.reference import update
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import FloatArray, Mask


def decode_layers_reference(
    x: FloatArray,
    time_shift: FloatArray,
    wkv: FloatArray,
    channel_shift: FloatArray,
    active: Mask | None,
    weights: LayerWeights,
    *,
    norm_eps: float,
    head_norm_eps: float,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Computes `pallas_kernels.decode_layers`, which documents the arguments."""
    dtype = x.dtype

    def run_layer(carry, of_layer):
        x, v_first = carry
        layer, w, states = of_layer
        time_shift, wkv, channel_shift = states
        token = layer_norm(x, w.time_norm_scale, w.time_norm_bias, norm_eps)
        y, v_first, new_wkv = _time_mix(token, v_first, time_shift, wkv, w, layer, head_norm_eps)
        x = x + y
        channel_token = layer_norm(x, w.channel_norm_scale, w.channel_norm_bias, norm_eps)
        y, _ = channel_mix_reference(
            channel_token[:, None],
            w.channel_shift_mix,
            w.channel_key.astype(dtype),
            w.channel_value.astype(dtype),
            channel_shift,
            None,
        )
        x = x + y[:, 0]
        new = (token, new_wkv, channel_token)
        if active is not None:
            new = jax.tree.map(functools.partial(_of_active, active), new, states)
        return (x, v_first), new

    layers = jnp.arange(len(wkv))
    (x, _), states = jax.lax.scan(
        run_layer, (x, jnp.zeros_like(x)), (layers, weights, (time_shift, wkv, channel_shift))
    )
    return (x, *states)


def layer_norm(x: FloatArray, scale: FloatArray, bias: FloatArray, eps: float) -> FloatArray:
    """Returns the layer norm of `x` `[B, C]`, computed in float32 at least."""
    normed, _ = normalize(x.astype(accumulation_dtype(x)), eps)
    return (normed * scale[None] + bias[None]).astype(x.dtype)


def _time_mix(x, v_first, before, state, w, layer, head_norm_eps):
    dtype = accumulation_dtype(x)
    B, heads = len(x), w.removal_scale.shape

    def in_heads(y):
        return y.reshape(B, 1, *heads)

    def low_rank(y, activation, down, up):
        return activation(y @ down.astype(y.dtype)) @ up.astype(y.dtype)

    def logits(y, activation, base, down, up):
        return low_rank(y, activation, down, up).astype(dtype) + base[None]

    mixed, _ = token_shift_mix_reference(x[:, None], w.time_shift_mix, before, None)
    x_r, x_w, x_k, x_v, x_a, x_g = (y[:, 0] for y in mixed)
    r, k, v = (
        y @ z.astype(x.dtype) for y, z in ((x_r, w.receptance), (x_k, w.key), (x_v, w.value))
    )
    decay_logits = logits(x_w, jnp.tanh, w.decay_base, w.decay_down, w.decay_up)
    alpha = jax.nn.sigmoid(logits(x_a, _identity, w.alpha_base, w.alpha_down, w.alpha_up))
    gate = low_rank(x_g, jax.nn.sigmoid, w.gate_down, w.gate_up)
    v_first = jnp.where(layer == 0, v, v_first)
    residual_logits = logits(
        x_v, _identity, w.value_residual_base, w.value_residual_down, w.value_residual_up
    )
    v = value_residual_reference(v, v_first, residual_logits)
    r, log_decay, k, v, alpha, gate = (
        in_heads(y) for y in (r, log_decay_from_logits(decay_logits), k, v, alpha, gate)
    )
    k, a, b = key_update_reference(k, alpha, w.removal_scale, w.replacement_mix)
    vectors = (y[:, 0].astype(state.dtype) for y in (r, log_decay, k, v, a, b))
    state, o = update(state, WKVInputs(*vectors))
    y = output_correction_reference(
        o[:, None].astype(x.dtype),
        r,
        k,
        v,
        gate,
        w.bonus,
        w.head_norm_scale,
        w.head_norm_bias,
        eps=head_norm_eps,
    )
    return y.reshape(x.shape) @ w.output.astype(x.dtype), v_first, state


def _identity(x: FloatArray) -> FloatArray:
    return x


def _of_active(active: Mask, x: FloatArray, y: FloatArray) -> FloatArray:
    """Returns the rows of x where `active`, else the rows of y."""
    return jnp.where(active.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


__all__ = ["decode_layers_reference"]
