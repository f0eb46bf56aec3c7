"""The WKV7 operator as kernels for Hopper GPUs."""

from pallas_kernels.wkv7.mosaic_gpu.operator import wkv7_mosaic_gpu

__all__ = ["wkv7_mosaic_gpu"]
