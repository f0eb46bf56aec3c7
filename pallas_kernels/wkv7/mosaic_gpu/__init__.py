"""The WKV7 operators as kernels for Hopper GPUs."""

from pallas_kernels.wkv7.mosaic_gpu.operator import wkv7_mosaic_gpu
from pallas_kernels.wkv7.mosaic_gpu.recurrent import wkv7_recurrent_mosaic_gpu

__all__ = ["wkv7_mosaic_gpu", "wkv7_recurrent_mosaic_gpu"]
