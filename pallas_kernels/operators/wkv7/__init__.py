"""WKV7, the recurrent operator at the heart of RWKV-7."""

from pallas_kernels.operators.wkv7.api import WKV7_IMPLEMENTATIONS, wkv7

__all__ = ["WKV7_IMPLEMENTATIONS", "wkv7"]
