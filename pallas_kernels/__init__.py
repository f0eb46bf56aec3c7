"""The operators of RWKV-7 for JAX."""

from pallas_kernels.channel_mix import channel_mix
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.decode_layers import LayerWeights, decode_layers
from pallas_kernels.key_update import key_update
from pallas_kernels.output_correction import output_correction
from pallas_kernels.token_shift import token_shift_mix
from pallas_kernels.value_residual import value_residual
from pallas_kernels.wkv7 import wkv7, wkv7_recurrent

__all__ = [
    "LayerWeights",
    "channel_mix",
    "cross_entropy",
    "decode_layers",
    "key_update",
    "output_correction",
    "token_shift_mix",
    "value_residual",
    "wkv7",
    "wkv7_recurrent",
]
