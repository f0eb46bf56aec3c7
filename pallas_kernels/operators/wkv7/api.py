"""The public WKV7 operator."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.context import ContextAxis, check_context_axis
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.wkv7.call import Implementation, Results, WKVCall, WKVInputs
from pallas_kernels.operators.wkv7.context import wkv7_over_context
from pallas_kernels.operators.wkv7.mosaic_gpu import wkv7_mosaic_gpu
from pallas_kernels.operators.wkv7.reference import wkv7_reference
from pallas_kernels.operators.wkv7.xla_chunked import wkv7_xla
from pallas_kernels.sharding import over_explicit_axes
from pallas_kernels.types import Precision, SegmentIds
from pallas_kernels.validation import (
    check_float,
    check_precision,
    check_same_dtype,
    check_segment_ids,
)

IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": wkv7_mosaic_gpu,
    "xla": wkv7_xla,
    "reference": wkv7_reference,
}
WKV7_IMPLEMENTATIONS = tuple(IMPLEMENTATIONS)
"""The names that `wkv7` takes as `implementation`, the preferred ones first."""


def check_inputs(inputs: Mapping[str, Any], call: WKVCall) -> None:
    """Checks what `wkv7` and `wkv7_recurrent` have in common; `inputs` are by name."""
    sizes: dict[str, int] = {}
    for name, value in inputs.items():
        check_float(name, value, "B T H V" if name == "v" else "B T H K", sizes)
    check_same_dtype(**{name: x for name, x in inputs.items() if name != "log_decay"})
    if not isinstance(call.scale, (int, float)) or not math.isfinite(call.scale):
        raise ValueError(f"scale must be a finite number known at trace time, got {call.scale!r}")
    if call.segment_ids is not None:
        check_segment_ids(call.segment_ids, sizes, call.num_segments)
    elif call.num_segments is not None:
        raise ValueError(f"num_segments={call.num_segments} needs segment_ids")
    if call.initial_state is not None:
        if call.num_segments is not None:
            sizes["N"] = call.num_segments
        axes = "B H K V" if call.num_segments is None else "B N H K V"
        check_float("initial_state", call.initial_state, axes, sizes)


def wkv7(
    r: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    *,
    scale: float = 1.0,
    initial_state: Float[Array, "B *N H K V"] | None = None,
    segment_ids: SegmentIds | None = None,
    num_segments: int | None = None,
    min_log_decay: float | None = None,
    precision: Precision = None,
    context_axis: ContextAxis | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B *N H K V"]]:
    """The WKV operator of RWKV-7, for training and for reading long inputs.

    For every row and head, with a state S of `[K, V]`:

        S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        o_t = scale * S_t^T r_t

    as in "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4. `docs/rwkv7.md` derives
    what the implementations compute. It is differentiable in all arrays and the initial state,
    through outputs and final state.

    Args:
      r: `[B, T, H, K]`, receptance. T may be any number >= 1.
      log_decay: `[B, T, H, K]`, <= 0; a channel's decay is its exponential, -inf clears it. It may
        have a dtype of its own.
      k: `[B, T, H, K]`, the key that writes (RWKV-7: the replacement key).
      v: `[B, T, H, V]`, value.
      a: `[B, T, H, K]`, reads what is to be removed. RWKV-7: `-kk`, kk the normalised removal key.
      b: `[B, T, H, K]`, where it is removed. RWKV-7: `kk * alpha`.
      scale: a factor on the outputs, known at trace time.
      initial_state: `[B, H, K, V]`, the state before the first token; None means zeros. With
        `num_segments`, `[B, N, H, K, V]`: one state for each segment.
      segment_ids: `[B, T]` integers, several sequences in a row: 0 is padding, consecutive equal
        ids are one segment, where the state restarts (see `pallas_kernels.packing`). Without
        `num_segments` the initial state belongs to the row's first segment, later ones start from
        zero, and the final state is the one after the row's last token.
      num_segments: N, known at trace time; asks for one initial and one final state per segment.
        Ids lie in 0..N, the segment with id n has the states `[:, n - 1]`, and each id occurs in
        at most one run per row; where it does not occur, the final state is the initial one.
      min_log_decay: the caller's promise that no `log_decay` is below this number (RWKV-7:
        `-exp(-0.5)`). It lets an implementation use a faster form; None makes no promise.
      precision: None lets kernels round operands of matrix products to 16 bits. That costs little,
        but where keys are nearly parallel, or tokens take turns, errors grow to a few percent.
        "high" asks for products of float32: errors are those of rounding the results. The kernels
        do not offer it, and XLA takes more than ten times as long.
      context_axis: in `jax.shard_map`, the mesh axis over which the tokens of each row are divided
        into equal pieces, in order. All arrays with tokens are this device's pieces; the initial
        state is the same on all devices, and the final state is that after the whole row. It costs
        a second pass over the piece in each direction, and `[B, H, K, K + V]` float32 from each
        device to all. Outside of `jax.shard_map` it may be an Auto axis of the mesh in context;
        arrays are then whole. Tokens that an explicit axis divides need no `context_axis`.
      implementation: "mosaic_gpu" (kernels for Hopper GPUs: inputs of 16 bits, K of 64 or 128, V
        a multiple of 64, min_log_decay of at least -1), "xla" (chunked matrix products),
        "reference" (a scan over tokens), or None, which takes the first of these that can.

    Returns:
      o: `[B, T, H, V]`, in the dtype of `v`; zero at padding.
      final_state: `[B, H, K, V]` or `[B, N, H, K, V]`, float32 (float64 for float64 inputs).

    Raises:
      ValueError: for wrong shapes, sizes, segment ids or names, with the argument and its value;
        for `num_segments` where the tokens of rows are divided over devices.
      TypeError: for wrong dtypes. All arrays except log_decay, initial_state and segment_ids
        share one of bfloat16, float16, float32, float64.
      NotServed: if a named implementation does not serve these arguments.
    """
    inputs = WKVInputs(r, log_decay, k, v, a, b)
    call = WKVCall(
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
        min_log_decay=min_log_decay,
        precision=precision,
    )
    check_inputs(inputs._asdict(), call)
    if min_log_decay is not None and not min_log_decay <= 0:
        raise ValueError(f"min_log_decay must be None or a number <= 0, got {min_log_decay}")
    check_precision("precision", precision)

    def of_rows(inputs: WKVInputs, call: WKVCall) -> Results:
        return dispatch("wkv7", IMPLEMENTATIONS, implementation, inputs, call)

    def run(
        inputs: tuple[Any, ...], *arrays: Any, context_axis: ContextAxis | None = context_axis
    ) -> Results:
        arguments = WKVInputs(*inputs), call.with_arrays(*arrays)
        if context_axis is None:
            return of_rows(*arguments)
        check_context_axis("wkv7", context_axis, arguments[0].k.shape)
        if num_segments is not None:
            raise ValueError(f"wkv7: {num_segments=} needs rows that are not divided over devices")
        return wkv7_over_context(of_rows, *arguments, context_axis)

    arrays = (tuple(inputs), initial_state, segment_ids)
    return over_explicit_axes(
        run, call.layout(), *arrays, over_context=True, context_axis=context_axis
    )


__all__ = ["check_inputs", "wkv7"]
