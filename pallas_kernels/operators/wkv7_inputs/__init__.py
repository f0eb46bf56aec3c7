"""What `wkv7` reads, from a time mix's projections and low-rank logits."""

from pallas_kernels.operators.wkv7_inputs.api import WKV7Inputs, wkv7_inputs

__all__ = ["WKV7Inputs", "wkv7_inputs"]
