"""The public layer norm operator."""

from jaxtyping import Array, Float

from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.layer_norm.mosaic_gpu import (
    layer_norm_backward_mosaic_gpu,
    layer_norm_mosaic_gpu,
)
from pallas_kernels.operators.layer_norm.reference import LAYOUT, layer_norm_reference
from pallas_kernels.operators.layer_norm.xla import layer_norm_backward
from pallas_kernels.partitioning import partitioned, partitioned_backward
from pallas_kernels.validation import check_eps, check_float

FORWARD = {
    "mosaic_gpu": partitioned(layer_norm_mosaic_gpu, LAYOUT),
    "xla": layer_norm_reference,
    "reference": layer_norm_reference,
}
BACKWARD = {
    "mosaic_gpu": partitioned_backward(layer_norm_backward_mosaic_gpu, LAYOUT),
    "xla": layer_norm_backward,
    "reference": differentiate(layer_norm_reference),
}


def layer_norm(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    eps: float = 1e-5,
    implementation: Choice = None,
) -> Float[Array, "B T C"]:
    """Normalises each token over its channels:

        (x - mean(x)) / sqrt(variance(x) + eps) * scale + bias

    It is computed in float32 (float64 for float64 inputs), the variance from the differences to the
    mean, and differentiable in all arrays.

    Args:
      x: `[B, T, C]`, tokens.
      scale: `[C]`. It may have a dtype of its own.
      bias: `[C]`. It may have a dtype of its own.
      eps: > 0, known at trace time.
      implementation: "mosaic_gpu", kernels for bfloat16 on Hopper GPUs, with C a multiple of 64;
        "xla", whose backward needs only the inputs; "reference", the definition, which JAX
        differentiates; a pair of names, (forward, backward); or None, which chooses.

    Returns:
      `[B, T, C]`, in the dtype of `x`.

    Raises:
      ValueError: for wrong shapes, sizes, eps or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("x", x, "B T C", sizes)
    check_float("scale", scale, "C", sizes)
    check_float("bias", bias, "C", sizes)
    check_eps(eps)
    inputs = (x, scale, bias)
    return run_from_inputs(
        "layer_norm", FORWARD, BACKWARD, LAYOUT, implementation, *inputs, eps=float(eps)
    )
