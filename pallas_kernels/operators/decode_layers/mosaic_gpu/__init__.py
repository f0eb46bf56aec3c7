"""Kernels for Hopper GPUs."""

from pallas_kernels.operators.decode_layers.mosaic_gpu.layers import decode_layers_mosaic_gpu

__all__ = ["decode_layers_mosaic_gpu"]
