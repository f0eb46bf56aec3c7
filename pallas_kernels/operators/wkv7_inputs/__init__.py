"""What `wkv7` reads, from a time mix's projections and low-rank logits."""

from pallas_kernels.operators.wkv7_inputs.api import wkv7_inputs

__all__ = ["wkv7_inputs"]
