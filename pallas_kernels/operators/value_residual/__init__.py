"""The value residual."""

from pallas_kernels.operators.value_residual.api import value_residual

__all__ = ["value_residual"]
