"""The public output correction operator."""

import math
from collections.abc import Callable

from pallas_kernels.arrays import vary_alike
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.output_correction.reference import output_correction_reference
from pallas_kernels.operators.output_correction.xla import output_correction_xla
from pallas_kernels.types import FloatArray
from pallas_kernels.validation import check_float, check_same_dtype

IMPLEMENTATIONS: dict[str, Callable[..., FloatArray]] = {
    "xla": output_correction_xla,
    "reference": output_correction_reference,
}


def output_correction(
    o: FloatArray,
    r: FloatArray,
    k: FloatArray,
    v: FloatArray,
    gate: FloatArray,
    bonus: FloatArray,
    norm_scale: FloatArray,
    norm_bias: FloatArray,
    *,
    eps: float = 64e-5,
    implementation: str | None = None,
) -> FloatArray:
    """Normalises the recurrence's output over each head, adds the bonus and applies the gate:

        normed = (o - mean(o)) / sqrt(variance(o) + eps)
        (normed * norm_scale + norm_bias + sum(r * k * bonus) * v) * gate

    with mean and variance over a head's V channels, the sum over its K channels; as in the
    official training code of RWKV-7, where `norm_scale` and `norm_bias` are `ln_x` and `bonus` is
    `r_k`. It is computed in float32 (float64 for float64 inputs), the variance from the
    differences to the mean, and differentiable in all arrays.

    Args:
      o: `[B, T, H, V]`, the output of `wkv7`.
      r: `[B, T, H, K]`, receptance; this and the three below have the dtype of `o`.
      k: `[B, T, H, K]`, the replacement key, as `wkv7` took it.
      v: `[B, T, H, V]`, value.
      gate: `[B, T, H, V]`.
      bonus: `[H, K]`, weights of the current token. The parameters may each have a dtype of their
        own.
      norm_scale: `[H, V]`.
      norm_bias: `[H, V]`.
      eps: > 0, known at trace time; the official code's is 1e-5 times the head size.
      implementation: "xla", which keeps its inputs for the backward and nothing else; "reference",
        the definition; or None, which chooses.

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
    if not isinstance(eps, (int, float)) or not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a number > 0 known at trace time, got {eps!r}")
    arrays = vary_alike(o, r, k, v, gate, bonus, norm_scale, norm_bias)
    return dispatch("output_correction", IMPLEMENTATIONS, implementation, *arrays, float(eps))
