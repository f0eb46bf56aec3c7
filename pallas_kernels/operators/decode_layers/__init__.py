"""One token through all layers."""

from pallas_kernels.operators.decode_layers.api import decode_layers
from pallas_kernels.operators.decode_layers.weights import LayerWeights

__all__ = ["LayerWeights", "decode_layers"]
