"""The layer norm of a token's channels."""

from pallas_kernels.operators.layer_norm.api import layer_norm, pre_norm

__all__ = ["layer_norm", "pre_norm"]
