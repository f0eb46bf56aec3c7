"""Official parameter names to ours and back, for tests against the golden data."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from goose_jax import RWKV7, RWKV7Config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN_CONFIG = RWKV7Config(vocab_size=320, hidden_size=128, num_layers=3, compute_dtype="float32")

# Layouts of the official arrays, relative to ours.
SAME, TRANSPOSED, FLAT, ROW = "same", "transposed", "[C]", "[1, 1, C]"

TOP = {  # our path: official name, layout
    "embedding": ("emb.weight", SAME),
    "embedding_norm.scale": ("blocks.0.ln0.weight", SAME),
    "embedding_norm.bias": ("blocks.0.ln0.bias", SAME),
    "final_norm.scale": ("ln_out.weight", SAME),
    "final_norm.bias": ("ln_out.bias", SAME),
    "head": ("head.weight", TRANSPOSED),
}
BLOCK = {  # our path in `blocks`: official name in `blocks.{i}`, layout
    "time_mix_norm.scale": ("ln1.weight", SAME),
    "time_mix_norm.bias": ("ln1.bias", SAME),
    "time_mix.receptance": ("att.receptance.weight", TRANSPOSED),
    "time_mix.key": ("att.key.weight", TRANSPOSED),
    "time_mix.value": ("att.value.weight", TRANSPOSED),
    "time_mix.output": ("att.output.weight", TRANSPOSED),
    "time_mix.decay_base": ("att.w0", ROW),
    "time_mix.decay_down": ("att.w1", SAME),
    "time_mix.decay_up": ("att.w2", SAME),
    "time_mix.alpha_base": ("att.a0", ROW),
    "time_mix.alpha_down": ("att.a1", SAME),
    "time_mix.alpha_up": ("att.a2", SAME),
    "time_mix.value_residual_base": ("att.v0", ROW),
    "time_mix.value_residual_down": ("att.v1", SAME),
    "time_mix.value_residual_up": ("att.v2", SAME),
    "time_mix.gate_down": ("att.g1", SAME),
    "time_mix.gate_up": ("att.g2", SAME),
    "time_mix.removal_scale": ("att.k_k", ROW),
    "time_mix.replacement_mix": ("att.k_a", ROW),
    "time_mix.bonus": ("att.r_k", SAME),
    "time_mix.head_norm_scale": ("att.ln_x.weight", FLAT),
    "time_mix.head_norm_bias": ("att.ln_x.bias", FLAT),
    "channel_mix_norm.scale": ("ln2.weight", SAME),
    "channel_mix_norm.bias": ("ln2.bias", SAME),
    "channel_mix.shift_mix": ("ffn.x_k", ROW),
    "channel_mix.key": ("ffn.key.weight", TRANSPOSED),
    "channel_mix.value": ("ffn.value.weight", TRANSPOSED),
}
SHIFT_MIX = "time_mix.shift_mix"
SHIFT_MIX_ROWS = ("att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g")


def to_official(params) -> dict[str, np.ndarray]:
    """Renames an `nnx.State` of a model's parameters (or of their gradients)."""
    ours = nnx.to_pure_dict(params)

    def get(path):
        return np.asarray(functools.reduce(lambda node, key: node[key], path.split("."), ours))

    official = {name: _to_official(get(path), layout) for path, (name, layout) in TOP.items()}
    for path, (name, layout) in BLOCK.items():
        for i, value in enumerate(get(f"blocks.{path}")):
            official[f"blocks.{i}.{name}"] = _to_official(value, layout)
    for i, rows in enumerate(get(f"blocks.{SHIFT_MIX}")):
        for name, row in zip(SHIFT_MIX_ROWS, rows, strict=True):
            official[f"blocks.{i}.{name}"] = _to_official(row, ROW)
    return official


def from_official(weights: dict[str, np.ndarray], config: RWKV7Config) -> RWKV7:
    """A model with the given weights; those missing (layer 0's value residual) become zero."""
    abstract = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    ours = nnx.to_pure_dict(state)

    def put(path, value):
        *parents, leaf = path.split(".")
        node = functools.reduce(lambda node, key: node[key], parents, ours)
        node[leaf] = jnp.asarray(value, node[leaf].dtype).reshape(node[leaf].shape)

    def stack(name, layout):
        names = [f"blocks.{i}.{name}" for i in range(config.num_layers)]
        present = [_to_ours(weights[name], layout) for name in names if name in weights]
        missing = [np.zeros_like(present[0])] * (len(names) - len(present))
        assert not missing or (len(missing) == 1 and name.startswith("att.v"))
        return np.stack([*missing, *present])

    for path, (name, layout) in TOP.items():
        put(path, _to_ours(weights[name], layout))
    for path, (name, layout) in BLOCK.items():
        put(f"blocks.{path}", stack(name, layout))
    rows = [stack(name, ROW) for name in SHIFT_MIX_ROWS]
    put(f"blocks.{SHIFT_MIX}", np.stack(rows, axis=1))
    nnx.replace_by_pure_dict(state, ours)
    return nnx.merge(graphdef, state)


def golden_weights() -> dict[str, np.ndarray]:
    """The golden model's weights by official name, without layer 0's value residual."""
    stored = load_file(GOLDEN / "model.safetensors")
    names = json.loads((GOLDEN / "fla_name_map.json").read_text())
    weights = {}
    for official, entry in names.items():
        if entry is None:
            continue
        name, shape, stored_shape = entry
        transposed = len(shape) == 2 and shape != stored_shape
        weights[official] = stored[name].T if transposed else stored[name].reshape(shape)
        assert list(weights[official].shape) == shape
    return weights


def golden_model(config: RWKV7Config = GOLDEN_CONFIG) -> RWKV7:
    """The golden model: 3 layers, width 128, 2 heads, vocabulary 320; computes in float32."""
    return from_official(golden_weights(), config)


def _to_ours(value: np.ndarray, layout: str) -> np.ndarray:
    return value.T if layout == TRANSPOSED else value


def _to_official(value: np.ndarray, layout: str) -> np.ndarray:
    match layout:
        case "transposed":
            return value.T
        case "[C]":
            return value.reshape(-1)
        case "[1, 1, C]":
            return value.reshape(1, 1, -1)
        case _:
            return value
