"""The operators of RWKV-7 for JAX.

The names of this package are public, and so are all of these modules:

    types        names of arrays and the legend of their dimensions
    packing      several sequences in one row of tokens
    validation   checks of arguments, in one wording
    dispatch     how an implementation is chosen, for operators made of these
    sharding     functions made of operators, on meshes with explicit axes

All other modules are private.
"""

from pallas_kernels.differentiation import KEPT, KEPT_STATES
from pallas_kernels.dispatch import NotServed
from pallas_kernels.operators.channel_mix import channel_mix, feed_forward
from pallas_kernels.operators.cross_entropy import cross_entropy, cross_entropy_sum
from pallas_kernels.operators.decode_layers import LayerWeights, decode_layers
from pallas_kernels.operators.key_update import key_update
from pallas_kernels.operators.layer_norm import layer_norm, pre_norm
from pallas_kernels.operators.norm_shift_mix import norm_shift_mix
from pallas_kernels.operators.output_correction import output_correction
from pallas_kernels.operators.token_shift import token_shift_mix
from pallas_kernels.operators.value_residual import value_residual
from pallas_kernels.operators.wkv7 import WKV7_IMPLEMENTATIONS, wkv7
from pallas_kernels.operators.wkv7.log_decay import MIN_LOG_DECAY, log_decay_from_logits
from pallas_kernels.operators.wkv7_inputs import WKV7Inputs, wkv7_inputs
from pallas_kernels.operators.wkv7_recurrent import wkv7_recurrent

__version__ = "0.1.0"

__all__ = [
    "KEPT",
    "KEPT_STATES",
    "MIN_LOG_DECAY",
    "WKV7_IMPLEMENTATIONS",
    "LayerWeights",
    "NotServed",
    "WKV7Inputs",
    "channel_mix",
    "cross_entropy",
    "cross_entropy_sum",
    "decode_layers",
    "feed_forward",
    "key_update",
    "layer_norm",
    "log_decay_from_logits",
    "norm_shift_mix",
    "output_correction",
    "pre_norm",
    "token_shift_mix",
    "value_residual",
    "wkv7",
    "wkv7_inputs",
    "wkv7_recurrent",
]
