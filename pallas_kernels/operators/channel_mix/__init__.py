"""The channel mix."""

from pallas_kernels.operators.channel_mix.api import channel_mix, feed_forward

__all__ = ["channel_mix", "feed_forward"]
