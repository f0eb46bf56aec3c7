"""The value residual with a backward that keeps only the inputs."""

import dataclasses

import jax

from pallas_kernels.arrays import accumulation_dtype
from pallas_kernels.operators.value_residual.reference import value_residual_reference
from pallas_kernels.types import FloatArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs; the share is computed again.

    Attributes:
      v: `[B, T, H, V]`; its distance from v_first is the gradient of the share.
      v_first: `[B, T, H, V]`; likewise.
      logits: `[B, T, H, V]`; the share is their sigmoid.
    """

    v: FloatArray
    v_first: FloatArray
    logits: FloatArray


def _forward(
    v: FloatArray, v_first: FloatArray, logits: FloatArray
) -> tuple[FloatArray, Residuals]:
    return value_residual_reference(v, v_first, logits), Residuals(v, v_first, logits)


def _backward(
    residuals: Residuals, doutput: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    inputs = (residuals.v, residuals.v_first, residuals.logits)
    dtype = accumulation_dtype(*inputs)
    v, v_first, logits = (x.astype(dtype) for x in inputs)
    share, rest = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    doutput = doutput.astype(dtype)
    gradients = doutput * rest, doutput * share, doutput * (v_first - v) * share * rest
    dv, dv_first, dlogits = (
        gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)
    )
    return dv, dv_first, dlogits


value_residual_xla = jax.custom_vjp(value_residual_reference)
value_residual_xla.defvjp(_forward, _backward)
