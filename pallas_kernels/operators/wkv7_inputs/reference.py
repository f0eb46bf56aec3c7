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


class Results(NamedTuple):
    """The results of `pallas_kernels.wkv7_inputs`, or their gradients: each `[B, T, H, K]`."""

    log_decay: Any
    k: Any
    v: Any
    a: Any
    b: Any


def add_base(logits: Float[Array, "B T H K"], base: Float[Array, "H K"]) -> jax.Array:
    """Adds a base in float32 at least, because in trained models it is large beside the logits."""
    dtype = accumulation_dtype(logits, base)
    return logits.astype(dtype) + per_token(base, dtype)


def wkv7_inputs_reference(*inputs: jax.Array | None) -> tuple[jax.Array, ...]:
    """Computes `pallas_kernels.wkv7_inputs`, which documents the arguments."""
    x = Inputs(*inputs)
    log_decay = log_decay_from_logits(add_base(x.decay_logits, x.decay_base))
    alpha = jax.nn.sigmoid(add_base(x.alpha_logits, x.alpha_base))
    k, a, b = key_update_reference(x.k, alpha, x.removal_scale, x.replacement_mix)
    v = x.v
    if x.v_first is not None:
        logits = add_base(x.value_residual_logits, x.value_residual_base)
        v = value_residual_reference(v, x.v_first, logits)
    return tuple(Results(log_decay, k, v, a, b))


__all__ = ["LAYOUT", "Inputs", "Results", "add_base", "wkv7_inputs_reference"]
