"""The gradients of the inputs of `wkv7`, out of those of the operators that this one fuses."""

import jax

from pallas_kernels.operators.key_update.xla import key_update_backward
from pallas_kernels.operators.value_residual.xla import value_residual_backward
from pallas_kernels.operators.wkv7.log_decay import MIN_LOG_DECAY
from pallas_kernels.operators.wkv7_inputs.reference import Inputs, WKV7Inputs, add_base
from pallas_kernels.precision import accumulation_dtype


def wkv7_inputs_backward(
    *inputs: jax.Array | None, cotangents: WKV7Inputs
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients of all inputs; None for those that were not given."""
    x, d = Inputs(*inputs), cotangents
    dtype = accumulation_dtype(x.k)
    dk = d.k.astype(dtype) + d.bonus_k.astype(dtype)
    dv = d.v.astype(dtype) + d.bonus_v.astype(dtype)
    decay, alpha = (
        jax.nn.sigmoid(add_base(*pair))
        for pair in ((x.decay_logits, x.decay_base), (x.alpha_logits, x.alpha_base))
    )
    dk, dalpha, dremoval_scale, dreplacement_mix = key_update_backward(
        x.k, alpha, x.removal_scale, x.replacement_mix, cotangents=(dk, d.a, d.b)
    )
    dv_first, dvalue_residual = None, None
    if x.v_first is None:
        dv += d.v_first
    else:
        logits = add_base(x.value_residual_logits, x.value_residual_base)
        dv, dv_first, dvalue_residual = value_residual_backward(
            x.v.astype(dtype), x.v_first.astype(dtype), logits, cotangents=dv
        )
        dv_first += d.v_first
    ddecay = MIN_LOG_DECAY * d.log_decay.astype(decay.dtype) * decay * (1 - decay)
    dalpha = dalpha * alpha * (1 - alpha)
    gradients = Inputs(
        k=dk,
        v=dv,
        v_first=dv_first,
        decay_logits=ddecay,
        alpha_logits=dalpha,
        value_residual_logits=dvalue_residual,
        decay_base=ddecay.sum((0, 1)),
        alpha_base=dalpha.sum((0, 1)),
        value_residual_base=None if dvalue_residual is None else dvalue_residual.sum((0, 1)),
        removal_scale=dremoval_scale,
        replacement_mix=dreplacement_mix,
    )
    return tuple(gradients)


__all__ = ["wkv7_inputs_backward"]
