"""The model and its parts, as Flax NNX modules."""

from goose_jax.nn.block import Block, BlockState
from goose_jax.nn.channel_mix import ChannelMix
from goose_jax.nn.decoding_weights import DecodingWeights, prepare_decoding
from goose_jax.nn.layer_norm import LayerNorm
from goose_jax.nn.model import RWKV7, abstract_model
from goose_jax.nn.time_mix import TimeMix

__all__ = [
    "RWKV7",
    "Block",
    "BlockState",
    "ChannelMix",
    "DecodingWeights",
    "LayerNorm",
    "TimeMix",
    "abstract_model",
    "prepare_decoding",
]
