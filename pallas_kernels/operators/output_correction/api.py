"""The public output correction operator."""

from jaxtyping import Array, Float

from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.output_correction.mosaic_gpu import (
    output_correction_backward_mosaic_gpu,
    output_correction_mosaic_gpu,
)
from pallas_kernels.operators.output_correction.reference import LAYOUT, output_correction_reference
from pallas_kernels.operators.output_correction.xla import output_correction_backward
from pallas_kernels.partitioning import partitioned, partitioned_backward
from pallas_kernels.validation import check_eps, check_float, check_same_dtype

FORWARD = {
    "mosaic_gpu": partitioned(output_correction_mosaic_gpu, LAYOUT),
    "xla": output_correction_reference,
    "reference": output_correction_reference,
}
BACKWARD = {
    "mosaic_gpu": partitioned_backward(output_correction_backward_mosaic_gpu, LAYOUT),
    "xla": output_correction_backward,
    "reference": differentiate(output_correction_reference),
}


def output_correction(
    o: Float[Array, "B T H V"],
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gate: Float[Array, "B T H V"],
    bonus: Float[Array, "H K"],
    norm_scale: Float[Array, "H V"],
    norm_bias: Float[Array, "H V"],
    *,
    eps: float = 64e-5,
    implementation: Choice = None,
) -> Float[Array, "B T H V"]:
    """Normalises the recurrence's output over each head, adds the bonus and applies the gate:

        normed = (o - mean(o)) / sqrt(variance(o) + eps)
        (normed * norm_scale + norm_bias + sum(r * k * bonus) * v) * gate

    with mean and variance over a head's V channels, the sum over its K channels; as in the
    official training code of RWKV-7, where `norm_scale` and `norm_bias` are `ln_x` and `bonus` is
    `r_k`. It is computed in float32 (float64 for float64 inputs), the variance from the
    differences to the mean, and differentiable in all arrays.

    Args:
      o: `[B, T, H, V]`, the output of `wkv7`.
      r: `[B, T, H, K]`, receptance, in the dtype of `o`.
      k: `[B, T, H, K]`, the replacement key that `wkv7` took, in the dtype of `o`.
      v: `[B, T, H, V]`, value, in the dtype of `o`.
      gate: `[B, T, H, V]`, in the dtype of `o`.
      bonus: `[H, K]`, weights of the current token. It may have a dtype of its own.
      norm_scale: `[H, V]`. It may have a dtype of its own.
      norm_bias: `[H, V]`. It may have a dtype of its own.
      eps: > 0, known at trace time; the official code's is 1e-5 times the head size.
      implementation: "mosaic_gpu", kernels for bfloat16 on Hopper GPUs, with K and V of 64;
        "xla", whose backward needs only the inputs; "reference", the definition, which JAX
        differentiates; a pair of names, (forward, backward); or None, which chooses.

    Returns:
      `[B, T, H, V]`, in the dtype of `o`.

    Raises:
      ValueError: for wrong shapes, sizes, eps or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("o", o, "B T H V", sizes)
    check_float("r", r, "B T H K", sizes)
    check_float("k", k, "B T H K", sizes)
    check_float("v", v, "B T H V", sizes)
    check_float("gate", gate, "B T H V", sizes)
    check_float("bonus", bonus, "H K", sizes)
    check_float("norm_scale", norm_scale, "H V", sizes)
    check_float("norm_bias", norm_bias, "H V", sizes)
    check_same_dtype(o=o, r=r, k=k, v=v, gate=gate)
    check_eps(eps)
    inputs = (o, r, k, v, gate, bonus, norm_scale, norm_bias)
    return run_from_inputs(
        "output_correction", FORWARD, BACKWARD, LAYOUT, implementation, *inputs, eps=float(eps)
    )
