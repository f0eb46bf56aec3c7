"""RWKV-7 models of others in PyTorch, of the sizes of ours, with random weights on the GPU."""

import os
import pathlib
import sys
import types
import unittest.mock
from typing import Any

import torch

from goose_jax import RWKV7Config
from goose_jax.checkpoints.key_map import axis_sizes
from goose_jax.checkpoints.layouts import OFFICIAL


def rwkv_lm_model(config: RWKV7Config, context_length: int, sources: pathlib.Path) -> Any:
    """Returns the model that RWKV-LM trains, in bfloat16, and compiles its CUDA."""
    os.environ |= {
        "RWKV_MY_TESTING": "x070",
        "RWKV_KERNEL": "@rwkv3",  # the kernels for H100s
        "RWKV_HEAD_SIZE": f"{config.head_size}",
        "RWKV_HEAD_L2WRAP_CE_CHUNK": "0",
        "RWKV_JIT_ON": "1",
    }
    folder = sources / "RWKV-LM" / "RWKV-v7" / "train_temp"
    os.chdir(folder)  # paths of its CUDA begin here
    sys.path.insert(0, str(folder))
    from src.model import RWKV

    arguments = types.SimpleNamespace(
        n_layer=config.num_layers,
        n_embd=config.hidden_size,
        dim_att=config.hidden_size,
        dim_ffn=config.intermediate_size,
        head_size=config.head_size,
        vocab_size=config.vocab_size,
        ctx_len=context_length,
        my_testing="x070",
        grad_cp=0,
    )
    return RWKV(arguments).to("cuda", torch.bfloat16)


def fla_model(config: RWKV7Config) -> Any:
    """Returns FLA's model in bfloat16."""
    from fla.models import RWKV7Config as FlaConfig
    from fla.models import RWKV7ForCausalLM

    with torch.device("cuda"):
        model = RWKV7ForCausalLM(
            FlaConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                head_dim=config.head_size,
                vocab_size=config.vocab_size,
                decay_low_rank_dim=config.decay_rank,
                a_low_rank_dim=config.alpha_rank,
                v_low_rank_dim=config.value_rank,
                gate_low_rank_dim=config.gate_rank,
            )
        )
    return model.to("cuda", torch.bfloat16)


def albatross_model(config: RWKV7Config, sources: pathlib.Path) -> Any:
    """Returns the model that Albatross decodes with, in float16, and compiles its CUDA."""
    sys.path.insert(0, str(sources / "Albatross"))
    from reference.rwkv7 import RWKV_x070

    sizes = axis_sizes(config)
    weights = {}
    for entry in OFFICIAL.entries:
        shape = entry.stored_shape(sizes)
        for name in entry.names(config.num_layers):
            weights[name] = torch.randn(shape, device="cuda", dtype=torch.half)
            weights[name] *= shape[-1] ** -0.5
    arguments = types.SimpleNamespace(
        n_layer=config.num_layers,
        n_embd=config.hidden_size,
        vocab_size=config.vocab_size,
        head_size=config.head_size,
        MODEL_NAME="",
    )
    with unittest.mock.patch("torch.load", return_value=weights):
        return RWKV_x070(arguments)
