"""The public layer norm operators."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.layer_norm.mosaic_gpu import (
    layer_norm_backward_mosaic_gpu,
    layer_norm_mosaic_gpu,
)
from pallas_kernels.operators.layer_norm.reference import (
    LAYOUT,
    PRE_NORM_LAYOUT,
    layer_norm_reference,
)
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


def _with_input(norm: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    return lambda x, *parameters, **settings: (norm(x, *parameters, **settings), x)


PRE_NORM_FORWARD = {name: _with_input(norm) for name, norm in FORWARD.items()}
PRE_NORM_BACKWARD = {
    "mosaic_gpu": partitioned_backward(layer_norm_backward_mosaic_gpu, PRE_NORM_LAYOUT),
    "xla": layer_norm_backward,
    "reference": differentiate(_with_input(layer_norm_reference)),
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
    inputs = _checked(x, scale, bias, eps)
    return run_from_inputs(
        "layer_norm", FORWARD, BACKWARD, LAYOUT, implementation, *inputs, eps=float(eps)
    )


def pre_norm(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    eps: float = 1e-5,
    implementation: Choice = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
    """Normalises tokens as `layer_norm` does, and hands them on: `layer_norm(x), x`.

    Take the second result where `x` is used again, as a residual stream is. The backward then adds
    the gradients of both uses in the pass that it makes anyway.

    Args:
      x: `[B, T, C]`, tokens.
      scale: `[C]`. It may have a dtype of its own.
      bias: `[C]`. It may have a dtype of its own.
      eps: > 0, known at trace time.
      implementation: as for `layer_norm`.

    Returns:
      normed: `[B, T, C]`, in the dtype of `x`.
      x: `[B, T, C]`, the argument.

    Raises:
      ValueError: for wrong shapes, sizes, eps or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    tables = (PRE_NORM_FORWARD, PRE_NORM_BACKWARD, PRE_NORM_LAYOUT)
    inputs = _checked(x, scale, bias, eps)
    return run_from_inputs("pre_norm", *tables, implementation, *inputs, eps=float(eps))


def _checked(x: Any, scale: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    """Checks the arguments of a norm, and returns its inputs."""
    sizes: dict[str, int] = {}
    check_float("x", x, "B T C", sizes)
    check_float("scale", scale, "C", sizes)
    check_float("bias", bias, "C", sizes)
    check_eps(eps)
    return x, scale, bias


__all__ = ["layer_norm", "pre_norm"]
