"""RWKV-7 for JAX: the model, its training and its decoding."""

from goose_jax.checkpoints import load_pretrained, load_state, save_pretrained, save_state
from goose_jax.config import RWKV7Config
from goose_jax.generation import ContinuousBatch, Generation, SamplingConfig, generate, prefill
from goose_jax.nn import RWKV7, Block, ChannelMix, TimeMix, prepare_decoding
from goose_jax.state import RWKV7State, init_state, join_states, take_rows
from goose_jax.training import OptimizerConfig, TrainState, init_train_state, make_train_step
from pallas_kernels import __version__

__all__ = [
    "RWKV7",
    "Block",
    "ChannelMix",
    "ContinuousBatch",
    "Generation",
    "OptimizerConfig",
    "RWKV7Config",
    "RWKV7State",
    "SamplingConfig",
    "TimeMix",
    "TrainState",
    "__version__",
    "generate",
    "init_state",
    "init_train_state",
    "join_states",
    "load_pretrained",
    "load_state",
    "make_train_step",
    "prefill",
    "prepare_decoding",
    "save_pretrained",
    "save_state",
    "take_rows",
]
