"""The golden model, and parameters (or gradients) by their official names."""

import pathlib

import numpy as np
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.checkpoints.containers import open_tensors
from goose_jax.checkpoints.conversion import build_model, split_params
from goose_jax.checkpoints.layouts import FLA, OFFICIAL
from goose_jax.checkpoints.pth import read_pth

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN_CONFIG = RWKV7Config(vocab_size=320, hidden_size=128, num_layers=3, compute_dtype="float32")


def to_official(params) -> dict[str, np.ndarray]:
    """Renames an `nnx.State` of a model's parameters (or of their gradients)."""
    return dict(split_params(nnx.to_pure_dict(params), OFFICIAL, unused=True))


def golden_weights() -> dict[str, np.ndarray]:
    """The golden model's weights by official name."""
    tensors = read_pth(GOLDEN / "tiny_official.pth")
    return {name: tensor.read() for name, tensor in tensors.items()}


def golden_model(config: RWKV7Config = GOLDEN_CONFIG) -> RWKV7:
    """The golden model: 3 layers, width 128, 2 heads, vocabulary 320; computes in float32.

    Without the first layer's unused value residual, as released models are.
    """
    tensors, _ = open_tensors(GOLDEN / "tiny_fla_hf")
    return build_model(tensors, FLA, config)
