"""Reads and writes safetensors: one file, or shards with an index."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from goose_jax.checkpoints.directory import read_json
from goose_jax.checkpoints.errors import CheckpointError, cause, list_names, shorten_name
from goose_jax.checkpoints.stored_tensor import StoredTensor

SINGLE = "model.safetensors"
INDEX_END = ".safetensors.index.json"
_INDEX = f"model{INDEX_END}"
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_NAME = 255  # of a file
_ALIGNMENT = 8  # bytes; the header is padded with spaces, as the format's library does


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name. Values are not read yet.

    Raises:
      CheckpointError: if the file is missing or damaged, or a tensor has a dtype that is not read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: _stored(file, path, name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {cause(error)}") from error


def read_shards(index: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of all shards that an index names. Values are not read yet.

    Args:
      index: the file `*.safetensors.index.json`; the shards lie beside it.

    Raises:
      CheckpointError: if shards are missing or damaged, or do not agree with their index.
    """
    names: Any = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_plain, names.values())):
        raise CheckpointError(f"{index} is damaged: weight_map names no files beside it")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(names.values())):
        shard = read_safetensors(index.parent / file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise CheckpointError(f"{index.parent} holds tensors twice: {list_names(twice)}")
        tensors |= shard
    if difference := sorted(names.keys() ^ tensors.keys()):
        raise CheckpointError(f"{index} and the shards differ in {list_names(difference)}")
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file. Only one tensor at a time is copied.

    Args:
      path: the file to create.
      tensors: arrays by name; they may be transposed views.

    Raises:
      OSError: if writing fails.
      ValueError: if the format has no name for a dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"safetensors are not written in the dtype {tensor.dtype.name}")
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or several shards and their index.

    Args:
      folder: an existing folder.
      tensors: arrays by name; they may be transposed views.
      max_shard_bytes: maximum size of the tensors in a file, unless a single tensor is larger.
    """
    shards = _plan_shards(tensors, max_shard_bytes)
    count = len(shards)
    files = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    files = [SINGLE] if count == 1 else files
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, {name: tensors[name] for name in shard})
    if count > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _is_plain(file: Any) -> bool:
    if not isinstance(file, str) or len(file) > _LONGEST_NAME:
        return False
    return Path(file).name == file and "\0" not in file


def _stored(file: Any, path: Path, name: str) -> StoredTensor:
    tensor = file.get_slice(name)
    if tensor.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{path}: {shorten_name(name)} has dtype {tensor.get_dtype()}, which is not read"
        )
    dtype = _DTYPES[tensor.get_dtype()]
    return StoredTensor(tuple(tensor.get_shape()), dtype, lambda: _read_tensor(path, name))


def _read_tensor(path: Path, name: str) -> np.ndarray:
    # The file is opened for each tensor: an open file keeps all pages in memory that were read.
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} has changed since it was opened: {cause(error)}") from error


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
