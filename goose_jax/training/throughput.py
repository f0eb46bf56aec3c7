"""The share of a device's arithmetic that training uses, and its memory."""

import re
import resource
import sys

import jax

from goose_jax.config import RWKV7Config

# Products of dense bfloat16 matrices, in 10^12 operations per second, by words of
# `jax.Device.device_kind`. The first words that fit count. Source: the makers' data sheets.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "TPU v6 lite": 918.0,
    "TPU v5p": 459.0,
    "TPU v5 lite": 197.0,
    "TPU v4": 275.0,
}
_WKV_OPERATIONS = 9  # per entry of the state: decay 1, S a 2, its outer product 2, v k 2, S r 2


def flops_per_token(config: RWKV7Config, *, all_trained: bool = True) -> float:
    """Returns the floating-point operations of a training step, per token.

    They are those of the matrix products and of the recurrence of the states. Forward, a weight
    costs 2 operations per token, and an entry of the state 9. The backward costs 2 operations per
    weight for the gradient of its input, and 2 for the gradient of the weight if it is trained; and
    twice the forward's operations for the state. What the backward computes again does not count.

    Args:
      config: configuration of the model.
      all_trained: False if the weights are frozen, as in LoRA and state tuning.
    """
    C, L = config.hidden_size, config.num_layers
    ranks = config.decay_rank + config.alpha_rank + config.gate_rank
    per_layer = 4 * C * C + 2 * C * config.intermediate_size + 2 * C * ranks
    weights = L * per_layer + (L - 1) * 2 * C * config.value_rank + C * config.vocab_size
    state = L * C * config.head_size
    return (6 if all_trained else 4) * weights + 3 * _WKV_OPERATIONS * state


def peak_flops(device: jax.Device, compute_dtype: str) -> float | None:
    """Returns the operations per second that a device makes at most, or None if it is unknown.

    Args:
      device: the device.
      compute_dtype: dtype of the matrices. Only the peaks of dtypes of 16 bits are known.
    """
    if compute_dtype not in ("bfloat16", "float16"):
        return None
    if "Laptop" in device.device_kind:  # it has the name of a faster card
        return None
    for name, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device.device_kind):
            return tflops * 1e12
    return None


def peak_memory() -> dict[str, int]:
    """Returns the most memory that this process has used so far, in bytes.

    Returns:
      "host_memory_bytes", and "device_memory_bytes" of the first device if it counts its memory.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    used = {"host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    counted = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        used["device_memory_bytes"] = counted["peak_bytes_in_use"]
    return used


__all__ = ["flops_per_token", "peak_flops", "peak_memory"]
