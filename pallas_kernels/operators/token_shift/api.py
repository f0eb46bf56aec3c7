"""The public token shift operator."""

from collections.abc import Callable

from pallas_kernels.arrays import vary_alike
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference
from pallas_kernels.operators.token_shift.xla import token_shift_mix_xla
from pallas_kernels.types import FloatArray, SegmentIds
from pallas_kernels.validation import check_float, check_same_dtype, check_segment_ids

IMPLEMENTATIONS: dict[str, Callable[..., tuple[tuple[FloatArray, ...], FloatArray]]] = {
    "xla": token_shift_mix_xla,
    "reference": token_shift_mix_reference,
}


def token_shift_mix(
    x: FloatArray,
    mixes: FloatArray,
    *,
    state: FloatArray | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[tuple[FloatArray, ...], FloatArray]:
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
      implementation: "xla", which keeps its inputs for the backward and nothing else; "reference",
        the definition; or None, which chooses.

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
    x, mixes, state, segment_ids = vary_alike(x, mixes, state, segment_ids)
    return dispatch(
        "token_shift_mix", IMPLEMENTATIONS, implementation, x, mixes, state, segment_ids
    )


def check_shift(
    x: FloatArray,
    state: FloatArray | None,
    segment_ids: SegmentIds | None,
    sizes: dict[str, int],
) -> None:
    """Checks what all operators with a token shift have in common."""
    if state is not None:
        check_float("state", state, "B C", sizes)
        check_same_dtype(x=x, state=state)
    if segment_ids is not None:
        check_segment_ids(segment_ids, sizes)
