"""The public operator that makes the inputs of `wkv7`."""

from jaxtyping import Array, Float

from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.wkv7_inputs.mosaic_gpu import (
    wkv7_inputs_backward_mosaic_gpu,
    wkv7_inputs_mosaic_gpu,
)
from pallas_kernels.operators.wkv7_inputs.reference import (
    LAYOUT,
    Inputs,
    WKV7Inputs,
    wkv7_inputs_reference,
)
from pallas_kernels.operators.wkv7_inputs.xla import wkv7_inputs_backward
from pallas_kernels.partitioning import partitioned, partitioned_backward
from pallas_kernels.validation import check_float, check_same_dtype

FORWARD = {
    "mosaic_gpu": partitioned(wkv7_inputs_mosaic_gpu, LAYOUT),
    "xla": wkv7_inputs_reference,
    "reference": wkv7_inputs_reference,
}
BACKWARD = {
    "mosaic_gpu": partitioned_backward(wkv7_inputs_backward_mosaic_gpu, LAYOUT),
    "xla": wkv7_inputs_backward,
    "reference": differentiate(wkv7_inputs_reference),
}

type Heads = Float[Array, "B T H K"]
type Parameter = Float[Array, "H K"]


def wkv7_inputs(
    k: Heads,
    v: Heads,
    v_first: Heads | None,
    decay_logits: Heads,
    alpha_logits: Heads,
    value_residual_logits: Heads | None,
    *,
    decay_base: Parameter,
    alpha_base: Parameter,
    value_residual_base: Parameter | None,
    removal_scale: Parameter,
    replacement_mix: Parameter,
    implementation: Choice = None,
) -> WKV7Inputs:
    """What `wkv7` reads besides the receptance, from what a time mix's matrices make of a token:

        log_decay = log_decay_from_logits(decay_logits + decay_base)
        new_k, a, b = key_update(k, sigmoid(alpha_logits + alpha_base),
                                 removal_scale, replacement_mix)
        new_v = value_residual(v, v_first, value_residual_logits + value_residual_base)

    It fuses these operators: logits plus bases, log decays and learning rates are never in memory
    in float32. It is computed in float32 (float64 for float64 inputs) and differentiable in all
    arrays. Kernels round k, a and b by the token's position, as in `key_update`.

    Args:
      k: `[B, T, H, K]`, projected keys.
      v: `[B, T, H, K]`, projected values, in the dtype of `k`.
      v_first: `[B, T, H, K]`, values of the first layer, in the dtype of `k`; None in the first
        layer, whose values stay as they are.
      decay_logits: `[B, T, H, K]`, the token's part of the decay's logits.
      alpha_logits: `[B, T, H, K]`, the token's part of the learning rate's logits.
      value_residual_logits: `[B, T, H, K]`, the token's part of the logits of the share of
        `v_first`; None if that is None.
      decay_base: `[H, K]`, the part of the decay's logits that all tokens share. This and the other
        parameters may have dtypes of their own.
      alpha_base: `[H, K]`, the same of the learning rate's logits.
      value_residual_base: `[H, K]`, the same of the share's logits; None if `v_first` is None.
      removal_scale: `[H, K]`, as in `key_update`.
      replacement_mix: `[H, K]`, as in `key_update`.
      implementation: "mosaic_gpu", kernels for bfloat16 on Hopper GPUs, with K of 64; "xla", whose
        backward needs only the inputs; "reference", the definition, which JAX differentiates; a
        pair of names, (forward, backward); or None, which chooses.

    Returns:
      `WKV7Inputs`, a named tuple of arrays `[B, T, H, K]`. They have the dtype of `k`, except the
      log decay.

      log_decay: float32 (float64 for float64 inputs); bfloat16 from "mosaic_gpu", because the
        kernels of `wkv7` round it to that.
      k: the replacement key.
      v: the value.
      a: minus the removal key.
      b: the removal key times the learning rate.
      bonus_k: `k` again, for `output_correction`. The backward adds the gradients of `k` and
        `bonus_k` in the pass that it makes anyway.
      bonus_v: `v` again, for `output_correction`. The backward adds the gradients of both, too.
      v_first: the values of the first layer, for the next layer: the argument, or `v` in the first.

    Raises:
      ValueError: for wrong shapes, sizes or names, with the argument and its value; if only some of
        the three arguments of the value residual are None.
      TypeError: for wrong dtypes.
    """
    inputs = Inputs(
        k,
        v,
        v_first,
        decay_logits,
        alpha_logits,
        value_residual_logits,
        decay_base,
        alpha_base,
        value_residual_base,
        removal_scale,
        replacement_mix,
    )
    _check(inputs)
    return run_from_inputs("wkv7_inputs", FORWARD, BACKWARD, LAYOUT, implementation, *inputs)


def _check(inputs: Inputs) -> None:
    residual = {
        name: getattr(inputs, name)
        for name in ("v_first", "value_residual_logits", "value_residual_base")
    }
    missing = [name for name, x in residual.items() if x is None]
    if missing and len(missing) < len(residual):
        raise ValueError(
            f"{', '.join(residual)} must all be given or all be None, got None for "
            f"{', '.join(missing)}"
        )
    sizes: dict[str, int] = {}
    for i, (name, x) in enumerate(inputs._asdict().items()):
        if x is not None:
            check_float(name, x, "B T H K" if i < 6 else "H K", sizes)
    check_same_dtype(k=inputs.k, v=inputs.v)
    if inputs.v_first is not None:
        check_same_dtype(k=inputs.k, v_first=inputs.v_first)


__all__ = ["WKV7Inputs", "wkv7_inputs"]
