"""One kernel in each direction, or those of the two operators where one would lack registers."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.operators.layer_norm import api as layer_norm
from pallas_kernels.operators.norm_shift_mix.mosaic_gpu import (
    has_registers,
    has_registers_for_gradients,
    norm_shift_mix_backward_mosaic_gpu,
    norm_shift_mix_mosaic_gpu,
)
from pallas_kernels.operators.norm_shift_mix.reference import KERNEL_LAYOUT, LAYOUT, Mixed
from pallas_kernels.operators.token_shift import api as token_shift
from pallas_kernels.operators.token_shift.reference import mask_padding
from pallas_kernels.partitioning import partitioned, partitioned_backward
from pallas_kernels.types import SegmentIds

_mix = partitioned(norm_shift_mix_mosaic_gpu, KERNEL_LAYOUT)
_backward = partitioned_backward(norm_shift_mix_backward_mosaic_gpu, LAYOUT)
_KERNELS = "mosaic_gpu"


def mix_by_kernels(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    eps: float,
) -> tuple[Mixed, Float[Array, "B C"]]:
    """Computes the first two results of `pallas_kernels.norm_shift_mix`, which documents them.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    if has_registers(x.shape[2]):
        return _mix(x, scale, bias, mixes, state, segment_ids, eps=eps)
    normed = layer_norm.FORWARD[_KERNELS](mask_padding(x, segment_ids), scale, bias, eps=eps)
    return token_shift.FORWARD[_KERNELS](normed, mixes, state, segment_ids)


def backward_by_kernels(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    cotangents: tuple[Sequence[Float[Array, "B T C"]], Float[Array, "B C"], Float[Array, "B T C"]],
    eps: float,
) -> tuple[Any, ...]:
    """Returns the gradients of all inputs, and None for the segment ids.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    if has_registers_for_gradients(x.shape[2], len(mixes)):
        inputs = (x, scale, bias, mixes, state, segment_ids)
        return _backward(*inputs, cotangents=cotangents, eps=eps)
    dmixed, dnew_state, dinput = cotangents
    x = mask_padding(x, segment_ids)
    normed = layer_norm.FORWARD[_KERNELS](x, scale, bias, eps=eps)
    dnormed, dmixes, dstate, _ = token_shift.BACKWARD[_KERNELS](
        normed, mixes, state, segment_ids, cotangents=(dmixed, dnew_state)
    )
    dx, dscale, dbias = layer_norm.PRE_NORM_BACKWARD[_KERNELS](
        x, scale, bias, cotangents=(dnormed, dinput), eps=eps
    )
    return dx, dscale, dbias, dmixes, dstate, None


__all__ = ["backward_by_kernels", "mix_by_kernels"]
