"""Folders in the layout of flash-linear-attention (FLA): `config.json` and safetensors shards.

FLA's models are Hugging Face `transformers` models, and users know the layout as "huggingface".
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from goose_jax.checkpoints.atomic_write import atomic_path
from goose_jax.checkpoints.conversion import split_model
from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.key_map import Layout
from goose_jax.checkpoints.native import CheckpointMetadata
from goose_jax.checkpoints.stored_tensor import StoredTensor
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7

CONFIG = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = "goose_jax"  # the key of config.json for our metadata
_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}
_FIXED = {  # the settings of RWKV-7; FLA's class has other variants, too
    "model_type": "rwkv7",
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "attn": None,
    "tie_word_embeddings": False,
}
# Key of config.json: our field. Without num_heads, which FLA ignores and is often wrong.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "head_dim": "head_size",
    "intermediate_size": "intermediate_size",
    "decay_low_rank_dim": "decay_rank",
    "a_low_rank_dim": "alpha_rank",
    "v_low_rank_dim": "value_rank",
    "gate_low_rank_dim": "gate_rank",
}


def read_tensors(folder: Path) -> tuple[dict[str, StoredTensor], Layout]:
    """Returns the tensors of all shards and their layout. Values are not read yet.

    Raises:
      CheckpointError: if shards are missing or damaged, or do not agree with their index.
    """
    tensors: dict[str, StoredTensor] = {}
    index = _read_index(folder)
    for file in sorted(set(index.values())) if index is not None else [_SINGLE]:
        shard = _read_shard(folder / file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise CheckpointError(f"{folder} holds tensors twice: {', '.join(twice)}")
        tensors |= shard
    if index is not None and (difference := sorted(index.keys() ^ tensors.keys())):
        raise CheckpointError(f"{folder / _INDEX} and the shards differ in {', '.join(difference)}")
    old = any(name.endswith(".attn.x_x") for name in tensors)
    return tensors, "huggingface_x_x" if old else "huggingface"


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
      CheckpointError: if it is damaged or does not describe an RWKV-7 model.
    """
    settings = _read_json(folder / CONFIG)
    wrong = [
        f"{key} is {settings.get(key)!r} rather than {value!r}"
        for key, value in _FIXED.items()
        if settings.get(key, None if key == "model_type" else value) != value
    ]
    if wrong:
        raise CheckpointError(f"{folder} is no RWKV-7 model: " + "; ".join(wrong))
    return settings


def check_sizes(folder: Path, settings: Mapping[str, Any], config: RWKV7Config) -> None:
    """Checks the sizes in `config.json` against the sizes that were inferred from the weights.

    Raises:
      CheckpointError: if they differ. The message lists all differences.
    """
    told = {key: getattr(config, field) for key, field in _SIZES.items()}
    wrong = [
        f"{key} is {settings[key]!r}, but {value} by the weights"
        for key, value in told.items()
        if settings.get(key) not in (None, value)
    ]
    if wrong:
        raise CheckpointError(f"{folder / CONFIG} does not fit the weights: " + "; ".join(wrong))


def read_metadata(folder: Path, settings: Mapping[str, Any]) -> CheckpointMetadata | None:
    """Returns the metadata that `write_folder` recorded, or None if another program wrote it.

    Raises:
      CheckpointError: if the metadata are damaged.
    """
    if _OURS not in settings:
        return None
    try:
        return CheckpointMetadata(**settings[_OURS])
    except TypeError as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged: {_OURS}: {error}") from error


def write_folder(
    path: Path, model: RWKV7, metadata: CheckpointMetadata, *, max_shard_bytes: int
) -> None:
    """Writes a model to a new folder. Incomplete files are removed if writing fails.

    Args:
      path: the folder to create.
      model: the model.
      metadata: metadata to record in `config.json`.
      max_shard_bytes: maximum size of each file of tensors, unless a single tensor is larger.
    """
    with atomic_path(path) as temporary:
        temporary.mkdir(parents=True)
        settings = _settings(model.config, metadata)
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        _write_shards(temporary, dict(split_model(model, "huggingface")), max_shard_bytes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _read_index(folder: Path) -> dict[str, str] | None:
    if not (folder / _INDEX).is_file():
        return None
    names = _read_json(folder / _INDEX).get("weight_map")
    files = set(names.values()) if isinstance(names, dict) else {None}
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise CheckpointError(f"{folder / _INDEX} is damaged: weight_map names no files beside it")
    return names


def _read_shard(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="numpy") as shard:
            return {name: _stored(shard, path, name) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _stored(shard: Any, path: Path, name: str) -> StoredTensor:
    tensor = shard.get_slice(name)
    if tensor.get_dtype() not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {tensor.get_dtype()}")
    dtype = _DTYPES[tensor.get_dtype()]
    return StoredTensor(tuple(tensor.get_shape()), dtype, lambda: _read_tensor(path, name))


def _read_tensor(path: Path, name: str) -> np.ndarray:
    # The file is opened for each tensor: an open file keeps all pages in memory that were read.
    try:
        with safe_open(path, framework="numpy") as shard:
            return shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} has changed since it was opened: {error}") from error


def _settings(config: RWKV7Config, metadata: CheckpointMetadata) -> dict[str, Any]:
    end_of_document = 0 if metadata.tokenizer == "world" else None
    return {
        "architectures": ["RWKV7ForCausalLM"],
        **_FIXED,
        **{key: getattr(config, field) for key, field in _SIZES.items()},
        "attn_mode": "chunk",
        "hidden_ratio": config.intermediate_size / config.hidden_size,
        "num_heads": config.num_heads,
        "value_dim": [config.hidden_size] * config.num_layers,
        "norm_eps": config.norm_eps,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "torch_dtype": config.param_dtype,
        _OURS: dataclasses.asdict(metadata),
    }


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> None:
    shards = _plan_shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    names = [_SINGLE] if count == 1 else names
    for file, shard in zip(names, shards, strict=True):
        contents = {name: np.ascontiguousarray(tensors[name]) for name in shard}
        save_file(contents, folder / file, metadata={"format": "pt"})  # transformers requires this
    if count > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -math.inf
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards
