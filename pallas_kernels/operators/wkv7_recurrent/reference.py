"""WKV7 token by token, by the definition that also `wkv7` has."""

from pallas_kernels.operators.wkv7.call import WKVCall
from pallas_kernels.operators.wkv7.reference import wkv7_reference
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs, run_forward_in_time
from pallas_kernels.types import FloatArray


def wkv7_recurrent_reference(
    inputs: RecurrentInputs, call: WKVCall, *, fused: bool, reverse: bool
) -> tuple[FloatArray, FloatArray]:
    """Scans over tokens; JAX differentiates the scan.

    `pallas_kernels.wkv7_recurrent` documents the arguments.
    """
    return run_forward_in_time(wkv7_reference, inputs, call, fused=fused, reverse=reverse)


__all__ = ["wkv7_recurrent_reference"]
