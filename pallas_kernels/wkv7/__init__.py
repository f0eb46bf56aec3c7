"""WKV7, the recurrent operator at the heart of RWKV-7."""

from pallas_kernels.wkv7.api import wkv7
from pallas_kernels.wkv7.recurrent import wkv7_recurrent

__all__ = ["wkv7", "wkv7_recurrent"]
