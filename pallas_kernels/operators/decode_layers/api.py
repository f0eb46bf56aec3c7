"""The public operator."""

from collections.abc import Callable
from typing import Any

from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.decode_layers.mosaic_gpu import decode_layers_mosaic_gpu
from pallas_kernels.operators.decode_layers.reference import decode_layers_reference
from pallas_kernels.operators.decode_layers.weights import LAYOUT, LayerWeights, check_weights
from pallas_kernels.sharding import over_explicit_axes
from pallas_kernels.types import FloatArray, Mask
from pallas_kernels.validation import check_bool, check_float, check_same_dtype

type Results = tuple[FloatArray, FloatArray, FloatArray, FloatArray]

IMPLEMENTATIONS: dict[str, Callable[..., Results]] = {
    "mosaic_gpu": decode_layers_mosaic_gpu,
    "reference": decode_layers_reference,
}


def decode_layers(
    x: FloatArray,
    time_shift: FloatArray,
    wkv: FloatArray,
    channel_shift: FloatArray,
    weights: LayerWeights,
    *,
    active: Mask | None = None,
    norm_eps: float = 1e-5,
    head_norm_eps: float = 64e-5,
    implementation: str | None = None,
) -> Results:
    """Reads one token of each row through all layers of an RWKV-7 model, for decoding.

    Computes what the layers of `goose_jax.RWKV7` compute between the norm of the embedding and the
    final norm. The kernels have no gradient. In `jax.shard_map` they need `check_vma=False`,
    because they overwrite states.

    Args:
      x: `[B, C]`, the normalised embedding of each row's token.
      time_shift: `[layers, B, C]`, in the dtype of x, the input of each time mix for the previous
        token.
      wkv: `[layers, B, H, K, K]`, float32 (float64 for float64 inputs), the states.
      channel_shift: `[layers, B, C]`, in the dtype of x, the input of each channel mix for the
        previous token.
      weights: weights of all layers.
      active: `[B]` booleans, false for rows whose states must not change; their results for x have
        no meaning. None means that all rows are active.
      norm_eps: added to the variance in the layer norms.
      head_norm_eps: added to the variance in the norm over each head's output.
      implementation: "mosaic_gpu" (kernels for Hopper GPUs: bfloat16, heads of 64, C a multiple of
        256); "reference", plain JAX; or None, which takes the first that serves the call.

    Returns:
      x: `[B, C]`, in the dtype of x, before the final norm.
      time_shift: `[layers, B, C]`, the new state of the time mixes' token shift.
      wkv: `[layers, B, H, K, K]`, the new states.
      channel_shift: `[layers, B, C]`, the new state of the channel mixes' token shift.

    Raises:
      ValueError: for wrong shapes and names, with the argument and its value.
      TypeError: for wrong dtypes.
      NotServed: if a named implementation does not serve these arguments.
    """
    sizes: dict[str, int] = {}
    check_float("x", x, "B C", sizes)
    check_weights(weights, sizes)
    check_float("time_shift", time_shift, "layers B C", sizes)
    check_float("wkv", wkv, "layers B H K K", sizes)
    check_float("channel_shift", channel_shift, "layers B C", sizes)
    check_same_dtype(x=x, time_shift=time_shift, channel_shift=channel_shift)
    if sizes["H"] * sizes["K"] != sizes["C"]:
        raise ValueError(f"wkv must have H * K = C = {sizes['C']}, got shape={wkv.shape}")
    if active is not None:
        check_bool("active", active, "B", sizes)

    def run(*arrays: Any) -> Results:
        eps = {"norm_eps": norm_eps, "head_norm_eps": head_norm_eps}
        return dispatch("decode_layers", IMPLEMENTATIONS, implementation, *arrays, **eps)

    arrays = (x, time_shift, wkv, channel_shift, active, weights)
    return over_explicit_axes(run, LAYOUT, *arrays)


__all__ = ["decode_layers"]
