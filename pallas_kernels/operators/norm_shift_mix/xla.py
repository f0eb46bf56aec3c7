"""The gradients of the layer norm, token shift and mixes, from their inputs."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from pallas_kernels.operators.layer_norm.reference import layer_norm_reference
from pallas_kernels.operators.layer_norm.xla import layer_norm_backward
from pallas_kernels.operators.token_shift.reference import mask_padding
from pallas_kernels.operators.token_shift.xla import token_shift_mix_backward
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import SegmentIds


def norm_shift_mix_backward(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    cotangents: tuple[Sequence[Float[Array, "B T C"]], Float[Array, "B C"], Float[Array, "B T C"]],
    eps: float,
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, " C"],
    Float[Array, " C"],
    Float[Array, "M C"],
    Float[Array, "B C"] | None,
    None,
]:
    """Returns the gradients of all inputs, and None for the segment ids."""
    dmixed, dnew_state, dinput = cotangents
    dtype = accumulation_dtype(x, scale, bias, mixes)
    tokens = mask_padding(x, segment_ids).astype(dtype)
    normed = layer_norm_reference(tokens, scale, bias, eps=eps)
    before = None if state is None else state.astype(dtype)
    dnormed, dmixes, dstate, _ = token_shift_mix_backward(
        normed, mixes, before, segment_ids, cotangents=(dmixed, dnew_state)
    )
    dx, dscale, dbias = layer_norm_backward(
        tokens, scale, bias, cotangents=(dnormed, dinput), eps=eps
    )
    return (
        dx.astype(x.dtype),
        dscale,
        dbias,
        dmixes,
        None if state is None or dstate is None else dstate.astype(state.dtype),
        None,
    )


__all__ = ["norm_shift_mix_backward"]
