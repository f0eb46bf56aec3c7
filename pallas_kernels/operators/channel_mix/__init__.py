"""The channel mix."""

from pallas_kernels.operators.channel_mix.api import channel_mix

__all__ = ["channel_mix"]
