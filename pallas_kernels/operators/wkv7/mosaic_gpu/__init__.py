"""WKV7 as kernels for Hopper GPUs."""

from pallas_kernels.operators.wkv7.mosaic_gpu.differentiable import wkv7_mosaic_gpu

__all__ = ["wkv7_mosaic_gpu"]
