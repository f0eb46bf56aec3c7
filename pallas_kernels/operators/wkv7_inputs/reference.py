"""The inputs of `wkv7` by their definition, out of the operators that this one fuses."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels.operators.key_update.reference import key_update_reference
from pallas_kernels.operators.value_residual.reference import value_residual_reference
from pallas_kernels.operators.wkv7.log_decay import log_decay_from_logits
from pallas_kernels.precision import accumulation_dtype, per_token
from pallas_kernels.sharding import Layout

LAYOUT = Layout(inputs=("B T H K",) * 6 + ("H K",) * 5, results="B T H K", independent="B T H")


class Inputs(NamedTuple):
    """The arguments of `pallas_kernels.wkv7_inputs`, which documents them.

    The first six are `[B, T, H, K]`, the others `[H, K]`. Those of the value residual are None in
    the first layer.
    """

    k: Any
    v: Any
    v_first: Any
    decay_logits: Any
    alpha_logits: Any
    value_residual_logits: Any
    decay_base: Any
    alpha_base: Any
    value_residual_base: Any
    removal_scale: Any
    replacement_mix: Any


class WKV7Inputs(NamedTuple):
    """What `wkv7_inputs` returns, or the gradients of it: each `[B, T, H, K]`.

    The last three are for other uses of the same arrays: the backward adds their gradients in the
    pass that it makes anyway.

    Attributes:
      log_decay: the log decay, for `wkv7`.
      k: the replacement key, for `wkv7`.
      v: the value, for `wkv7`.
      a: minus the removal key, for `wkv7`.
      b: the removal key times the learning rate, for `wkv7`.
      bonus_k: k again, for `output_correction`.
      bonus_v: v again, for `output_correction`.
      v_first: values of the first layer, for the next layer.
    """

    log_decay: Any
    k: Any
    v: Any
    a: Any
    b: Any
    bonus_k: Any
    bonus_v: Any
    v_first: Any

    @classmethod
    def of(cls, x: Inputs, log_decay: Any, k: Any, v: Any, a: Any, b: Any) -> "WKV7Inputs":
        """Returns these results of `x`, also for their other uses."""
        return cls(log_decay, k, v, a, b, k, v, x.v if x.v_first is None else x.v_first)


def add_base(logits: Float[Array, "B T H K"], base: Float[Array, "H K"]) -> jax.Array:
    """Adds a base in float32 at least, because in trained models it is large beside the logits."""
    dtype = accumulation_dtype(logits, base)
    return logits.astype(dtype) + per_token(base, dtype)


def wkv7_inputs_reference(*inputs: jax.Array | None) -> WKV7Inputs:
    """Computes `pallas_kernels.wkv7_inputs`, which documents the arguments."""
    x = Inputs(*inputs)
    dtype = accumulation_dtype(x.k)
    # In float32 from the beginning, so that gradients of several uses are added in it.
    wide = x._replace(
        **{
            name: of.astype(dtype)
            for name in ("k", "v", "v_first")
            if (of := getattr(x, name)) is not None
        }
    )
    log_decay = log_decay_from_logits(add_base(x.decay_logits, x.decay_base))
    alpha = jax.nn.sigmoid(add_base(x.alpha_logits, x.alpha_base))
    k, a, b = key_update_reference(wide.k, alpha, x.removal_scale, x.replacement_mix)
    v = wide.v
    if wide.v_first is not None:
        logits = add_base(x.value_residual_logits, x.value_residual_base)
        v = value_residual_reference(v, wide.v_first, logits)
    results = WKV7Inputs.of(wide, log_decay, k, v, a, b)
    return WKV7Inputs(log_decay, *(result.astype(x.k.dtype) for result in results[1:]))


__all__ = ["LAYOUT", "Inputs", "WKV7Inputs", "add_base", "wkv7_inputs_reference"]
