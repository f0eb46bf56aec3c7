"""WKV7 token by token, as kernels for Hopper GPUs."""

from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.differentiable import (
    wkv7_recurrent_mosaic_gpu,
)

__all__ = ["wkv7_recurrent_mosaic_gpu"]
