"""WKV7 token by token."""

from pallas_kernels.operators.wkv7_recurrent.api import wkv7_recurrent

__all__ = ["wkv7_recurrent"]
