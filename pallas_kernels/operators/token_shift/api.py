"""The public token shift operator."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.context import ContextAxis, check_context_axis, token_before
from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.token_shift.mosaic_gpu import (
    KERNEL_UNITS,
    token_shift_mix_backward_mosaic_gpu,
    token_shift_mix_mosaic_gpu,
)
from pallas_kernels.operators.token_shift.reference import LAYOUT, token_shift_mix_reference
from pallas_kernels.operators.token_shift.xla import token_shift_mix_backward
from pallas_kernels.partitioning import partitioned, partitioned_backward
from pallas_kernels.sharding import over_explicit_axes
from pallas_kernels.types import SegmentIds
from pallas_kernels.validation import check_float, check_same_dtype, check_segment_ids

FORWARD = {
    "mosaic_gpu": partitioned(token_shift_mix_mosaic_gpu, LAYOUT, units=KERNEL_UNITS),
    "xla": token_shift_mix_reference,
    "reference": token_shift_mix_reference,
}
BACKWARD = {
    "mosaic_gpu": partitioned_backward(
        token_shift_mix_backward_mosaic_gpu, LAYOUT, units=KERNEL_UNITS
    ),
    "xla": token_shift_mix_backward,
    "reference": differentiate(token_shift_mix_reference),
}


def token_shift_mix(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    *,
    state: Float[Array, "B C"] | None = None,
    segment_ids: SegmentIds | None = None,
    context_axis: ContextAxis | None = None,
    implementation: Choice = None,
) -> tuple[tuple[Float[Array, "B T C"], ...], Float[Array, "B C"]]:
    """Mixes every token with the one before it, M times, with a weight for each channel:

        mixed_m = x + (shift(x) - x) * mixes[m]

    The token shift of RWKV: M is six in the time mix of RWKV-7, one in its channel mix. It is
    computed in float32 (float64 for float64 inputs) and differentiable in `x`, `mixes`, `state`
    and through both results.

    Args:
      x: `[B, T, C]`, tokens.
      mixes: `[M, C]`, 0 keeps a token as it is, 1 takes the one before. It may have a dtype of its
        own.
      state: `[B, C]`, the token before each row's first one, in the dtype of `x`; None means
        zeros.
      segment_ids: `[B, T]` integers, several sequences in a row: 0 is padding, which is skipped,
        and consecutive equal ids are one segment (see `pallas_kernels.packing`). `state` comes
        before the row's first segment, zeros before the later ones.
      context_axis: in `jax.shard_map`, the mesh axis over which the tokens of each row are divided
        into equal pieces, in order. All arrays with tokens are this device's pieces; `state` and
        `new_state` are those of the whole row, the same on all devices. Outside, it may be an Auto
        axis of the mesh in context; arrays are then whole. Tokens that an explicit axis divides
        need no `context_axis`.
      implementation: "mosaic_gpu", kernels for bfloat16 on Hopper GPUs, with C a multiple of 64;
        "xla", whose backward needs only the inputs; "reference", the definition, which JAX
        differentiates; a pair of names, (forward, backward); or None, which chooses.

    Returns:
      mixed: M arrays `[B, T, C]` in the dtype of `x`; zero at padding.
      new_state: `[B, C]`, the last token of each row that is not padding; `state` if all are.

    Raises:
      ValueError: for wrong shapes, sizes, segment ids or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("x", x, "B T C", sizes)
    check_float("mixes", mixes, "M C", sizes)
    check_shift(x, state, segment_ids, sizes)

    def run(
        x: Any, mixes: Any, state: Any, segment_ids: Any, context_axis: Any = context_axis
    ) -> Any:
        new_state = None
        if context_axis is not None:
            check_context_axis("token_shift_mix", context_axis, x.shape)
            state, new_state = token_before(x, state, segment_ids, context_axis)
        inputs = (x, mixes, state, segment_ids)
        mixed, last = run_from_inputs(
            "token_shift_mix", FORWARD, BACKWARD, LAYOUT, implementation, *inputs
        )
        return mixed, last if new_state is None else new_state

    return over_explicit_axes(
        run, LAYOUT, x, mixes, state, segment_ids, over_context=True, context_axis=context_axis
    )


def check_shift(
    x: Any,
    state: Any,
    segment_ids: Any,
    sizes: dict[str, int],
) -> None:
    """Checks the state `[B, C]` and segment ids `[B, T]` of an operator with a token shift."""
    if state is not None:
        check_float("state", state, "B C", sizes)
        check_same_dtype(x=x, state=state)
    if segment_ids is not None:
        check_segment_ids(segment_ids, sizes)
