"""Token shift and its mixes."""

from pallas_kernels.operators.token_shift.api import token_shift_mix

__all__ = ["token_shift_mix"]
