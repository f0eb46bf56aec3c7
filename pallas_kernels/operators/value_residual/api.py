"""The public value residual operator."""

from collections.abc import Callable

from pallas_kernels.arrays import vary_alike
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.value_residual.reference import value_residual_reference
from pallas_kernels.operators.value_residual.xla import value_residual_xla
from pallas_kernels.types import FloatArray
from pallas_kernels.validation import check_float, check_same_dtype

IMPLEMENTATIONS: dict[str, Callable[..., FloatArray]] = {
    "xla": value_residual_xla,
    "reference": value_residual_reference,
}


def value_residual(
    v: FloatArray,
    v_first: FloatArray,
    logits: FloatArray,
    *,
    implementation: str | None = None,
) -> FloatArray:
    """Moves a layer's values towards those of the first layer:

        v + (v_first - v) * sigmoid(logits)

    It is computed in float32 (float64 for float64 inputs) and differentiable in all arrays.

    Args:
      v: `[B, T, H, V]`, this layer's values.
      v_first: `[B, T, H, V]`, the first layer's, in the dtype of `v`.
      logits: `[B, T, H, V]`, of the share of `v_first`. It may have a dtype of its own.
      implementation: "xla", which keeps its inputs for the backward and nothing else; "reference",
        the definition; or None, which chooses.

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
    arrays = vary_alike(v, v_first, logits)
    return dispatch("value_residual", IMPLEMENTATIONS, implementation, *arrays)
