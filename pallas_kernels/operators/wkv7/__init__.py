"""WKV7, the recurrent operator at the heart of RWKV-7."""

from pallas_kernels.operators.wkv7.api import wkv7

__all__ = ["wkv7"]
