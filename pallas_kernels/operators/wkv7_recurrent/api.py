"""The public operator."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.wkv7.api import check_inputs
from pallas_kernels.operators.wkv7.call import Results, WKVCall
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu import wkv7_recurrent_mosaic_gpu
from pallas_kernels.operators.wkv7_recurrent.reference import wkv7_recurrent_reference
from pallas_kernels.operators.wkv7_recurrent.xla import wkv7_recurrent_xla
from pallas_kernels.sharding import over_explicit_axes
from pallas_kernels.types import SegmentIds

IMPLEMENTATIONS: dict[str, Callable[..., Results]] = {
    "mosaic_gpu": wkv7_recurrent_mosaic_gpu,
    "xla": wkv7_recurrent_xla,
    "reference": wkv7_recurrent_reference,
}


def wkv7_recurrent(
    r: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"] | None = None,
    b: Float[Array, "B T H K"] | None = None,
    *,
    kk: Float[Array, "B T H K"] | None = None,
    alpha: Float[Array, "B T H K"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Array, "B *N H K V"] | None = None,
    segment_ids: SegmentIds | None = None,
    num_segments: int | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> Results:
    """Computes the WKV operator of RWKV-7 token by token, for decoding and short sequences.

    For every row and head, with a state S of `[K, V]`:

        S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        o_t = scale * S_t^T r_t

    as in "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4. Differentiable in all
    arrays, in the initial state and through the final state. Reading the tokens of a row in several
    calls, each from the final state of the one before, gives the same outputs as one call.

    Args:
      r: `[B, T, H, K]`, receptance. T may be any number >= 1.
      log_decay: `[B, T, H, K]`, <= 0; a channel's decay is its exponential, -inf clears it. It may
        have a dtype of its own.
      k: `[B, T, H, K]`, the key that writes (RWKV-7: the replacement key).
      v: `[B, T, H, V]`, value.
      a: `[B, T, H, K]`, reads what is to be removed. Give `a` and `b`, or `kk` and `alpha`.
      b: `[B, T, H, K]`, where it is removed.
      kk: `[B, T, H, K]`, the normalised removal key of RWKV-7; `a = -kk`.
      alpha: `[B, T, H, K]`, its in-context learning rate; `b = kk * alpha`.
      scale: a factor on the outputs, known at trace time.
      initial_state: `[B, H, K, V]`, the state before the first token; None means zeros. With
        `num_segments`, `[B, N, H, K, V]`: one state for each segment.
      segment_ids: `[B, T]` integers, several sequences in a row: 0 is padding, consecutive equal
        ids are one segment, where the state restarts. Without `num_segments` the initial state
        belongs to the first segment of the row, later ones start from zero.
      num_segments: N, known at trace time; asks for one initial and one final state per segment.
        Ids lie in 0..N; the segment with id n has the states `[:, n - 1]`.
      reverse: read the tokens from the last to the first. The initial state is then the one after
        the last token, the final state the one after reading the first.
      implementation: "mosaic_gpu" (kernels for Hopper GPUs that keep one state per 8 tokens for
        the backward: K of 64 or 128, V a multiple of 64, no float64), "xla" (a scan that keeps one
        per 16 tokens), "reference" (a scan that JAX differentiates), or None, which takes the first
        of these that serves the call.

    Returns:
      o: `[B, T, H, V]`, in the dtype of `v`; zero at padding.
      final_state: `[B, H, K, V]` or `[B, N, H, K, V]`, float32 (float64 for float64 inputs).

    Raises:
      ValueError: for wrong shapes, sizes, segment ids or names, and unless exactly one of the pairs
        `a`, `b` and `kk`, `alpha` is given.
      TypeError: for wrong dtypes.
      NotServed: if a named implementation does not serve these arguments.
    """
    pairs: dict[str, Any] = {"a": a, "b": b, "kk": kk, "alpha": alpha}
    given = {name: x for name, x in pairs.items() if x is not None}
    if [*given] not in (["a", "b"], ["kk", "alpha"]):
        raise ValueError(f"give a and b, or kk and alpha, got {' and '.join(given) or 'none'}")
    inputs = {"r": r, "log_decay": log_decay, "k": k, "v": v} | given
    call = WKVCall(
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    check_inputs(inputs, call)

    def run(inputs: tuple[Any, ...], *arrays: Any) -> Results:
        return dispatch(
            "wkv7_recurrent",
            IMPLEMENTATIONS,
            implementation,
            RecurrentInputs(*inputs),
            call.with_arrays(*arrays),
            fused="kk" in given,
            reverse=reverse,
        )

    arrays = (tuple(inputs.values()), initial_state, segment_ids)
    return over_explicit_axes(run, call.layout(), *arrays)


__all__ = ["wkv7_recurrent"]
