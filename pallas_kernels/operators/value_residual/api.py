"""The public value residual operator."""

from jaxtyping import Array, Float

from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.value_residual.reference import LAYOUT, value_residual_reference
from pallas_kernels.operators.value_residual.xla import value_residual_backward
from pallas_kernels.validation import check_float, check_same_dtype

FORWARD = {"xla": value_residual_reference, "reference": value_residual_reference}
BACKWARD = {"xla": value_residual_backward, "reference": differentiate(value_residual_reference)}


def value_residual(
    v: Float[Array, "B T H V"],
    v_first: Float[Array, "B T H V"],
    logits: Float[Array, "B T H V"],
    *,
    implementation: Choice = None,
) -> Float[Array, "B T H V"]:
    """Moves a layer's values towards those of the first layer:

        v + (v_first - v) * sigmoid(logits)

    It is computed in float32 (float64 for float64 inputs) and differentiable in all arrays.

    Args:
      v: `[B, T, H, V]`, this layer's values.
      v_first: `[B, T, H, V]`, the first layer's values, in the dtype of `v`.
      logits: `[B, T, H, V]`; their sigmoid is the share of `v_first`. They may have a dtype of
        their own.
      implementation: "xla", whose backward needs only the inputs; "reference", the definition,
        which JAX differentiates; a pair of names, (forward, backward); or None, which chooses.

    Returns:
      `[B, T, H, V]`, in the dtype of `v`.

    Raises:
      ValueError: for wrong shapes, sizes or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("v", v, "B T H V", sizes)
    check_float("v_first", v_first, "B T H V", sizes)
    check_float("logits", logits, "B T H V", sizes)
    check_same_dtype(v=v, v_first=v_first)
    inputs = (v, v_first, logits)
    return run_from_inputs("value_residual", FORWARD, BACKWARD, LAYOUT, implementation, *inputs)
