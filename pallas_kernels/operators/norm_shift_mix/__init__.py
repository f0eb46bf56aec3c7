"""The layer norm, then token shift and its mixes."""

from pallas_kernels.operators.norm_shift_mix.api import norm_shift_mix

__all__ = ["norm_shift_mix"]
