"""Models as others write them: names and shapes of each layout, and what wraps weights.

Written independently of `goose_jax.checkpoints.layouts`, which these judge.
"""

import argparse
import collections
import contextlib
import io
import json
import re

import numpy as np
import pytest

from goose_jax.cli.main import main
from tests.goose_jax import safetensors_by_hand, torch_files
from tests.goose_jax.official_weights import golden_weights

CONFIG = {  # as in the repositories RWKV/RWKV7-*
    "architectures": ["Rwkv7ForCausalLM"],
    "model_type": "rwkv7",
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "head_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "decay_low_rank_dim": 32,
    "a_low_rank_dim": 32,
    "v_low_rank_dim": 32,
    "gate_low_rank_dim": 64,
    "layer_norm_epsilon": 1e-5,
    "group_norm_epsilon": 64e-5,
    "embedding_layer_norm_fused": False,
    "context_length": 4096,
    "tie_word_embeddings": False,
}


def is_low_rank(name):
    return re.fullmatch(r"blocks\.\d+\.att\.[wavg][12]", name) is not None


def transformers(name, value):
    if is_low_rank(name):
        return f"model.{name}.weight", value.T
    return {"emb.weight": "model.embeddings.weight"}.get(
        name, name if name == "head.weight" else f"model.{name}"
    ), value


def transformers_raw(name, value):
    return transformers(name, value)[0].replace(f"{name}.weight", name), value


def behind(prefix, embedding):
    def rename(name, value):
        return {"emb.weight": f"{prefix}{embedding}.weight", "head.weight": "head.weight"}.get(
            name, prefix + name
        ), value

    return rename


def rwkv_rs(name, value):
    parts = {
        "emb.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "ln_out": "model.norm",
        "blocks.0.ln0": "model.embedding_norm",
        "blocks": "model.layers",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "att.receptance": "linear_attn.r_proj",
        "att.key": "linear_attn.k_proj",
        "att.value": "linear_attn.v_proj",
        "att.output": "linear_attn.o_proj",
        "att.ln_x": "linear_attn.g_norm",
        "att": "linear_attn",
        "ffn": "mlp",
    }
    for old, new in parts.items():
        name = re.sub(rf"(?<![\w]){re.escape(old)}(?![\w])", new, name)
    return name, value.reshape(-1) if value.ndim == 3 else value


RENAME = {
    "official": lambda name, value: (name, value),
    "web-rwkv": lambda name, value: (name, value.T if is_low_rank(name) else value),
    "transformers": transformers,
    "transformers-raw": transformers_raw,
    "transformers-emb": behind("model.", "emb"),
    "rwkv7": behind("rwkv7.", "embeddings"),
    "rwkv7-emb": behind("rwkv7.", "emb"),
    "rwkv-rs": rwkv_rs,
}


def released(layout, dtype="float32"):
    """The golden weights as released files have them: without the unused value residual."""
    unused = [f"blocks.0.att.v{k}" for k in "012"]
    weights = {name: value for name, value in golden_weights().items() if name not in unused}
    pairs = (RENAME[layout](name, value.astype(dtype)) for name, value in weights.items())
    return {name: np.ascontiguousarray(value) for name, value in pairs}


def write_folder(folder, arrays, config):
    safetensors_by_hand.write_shards(folder, arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def namespace(tensors):
    """Arguments, sizes and numbers beside weights."""
    size = torch_files.Call(torch_files.SIZE, (2, 3))
    arguments = argparse.Namespace(proj_dir="out", n_layer=3, betas=(0.9, 0.99))
    return tensors | {"args": arguments, "epoch": 3, 7: size, "dtype": torch_files.DTYPE}


def lightning(tensors):
    step = torch_files.tensor(torch_files.storage(np.float32, 320 * 128, "0"), 0, (1,), (1,))
    return {
        "epoch": 1,
        "state_dict": collections.OrderedDict(
            (f"_forward_module.{name}", torch_files.parameter(x)) for name, x in tensors.items()
        ),
        "optimizer_states": [{"state": {0: {"step": step}, 1: {"step": step}}}],
        "hyper_parameters": argparse.Namespace(lr=1e-4),
        "shapes": [{"emb": torch_files.Call(torch_files.SIZE, (320, 128))}, {1, 2}, b"bytes"],
    }


WRAPPED = {
    "module": lambda x: {"module": x, "global_steps": 7, "optimizer": None},
    "state_dict": lambda x: {"state_dict": x},
    "model beside its optimizer": lambda x: {"model": x, "exp_avg": dict(x)},
    "model beside two moments": lambda x: {
        "moments": {f"{kind}.{name}": value for kind in "mv" for name, value in x.items()},
        "model": x,
    },
    "prefix model.": lambda x: {f"model.{name}": value for name, value in x.items()},
    "prefix module.": lambda x: {f"module.{name}": value for name, value in x.items()},
    "two prefixes": lambda x: {f"_forward_module.model.{k}": value for k, value in x.items()},
    "arguments": namespace,
    "lightning": lightning,
    "default dict": lambda x: collections.defaultdict(list, x),
}


def error_of(arguments):
    stream = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(stream):
        main(arguments)
    return stream.getvalue()
