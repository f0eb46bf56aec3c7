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
from goose_jax.checkpoints.stored_tensor import StoredTensor, map_file

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
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 8 << 20  # bytes; that of a model of 13 billion parameters has 200,000
_ALIGNMENT = 8  # bytes; the header is padded with spaces, as the format's library does


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name. Values are not read yet.

    Raises:
      CheckpointError: if the file is missing or damaged, or a tensor has a dtype that is not read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if _header_length(path) > _MAX_HEADER:
        raise CheckpointError(f"{path}: its header has more than {_MAX_HEADER:,} bytes")
    try:
        with safe_open(path, framework="numpy") as file:  # which checks the header
            begins = _read_positions(path)
            if begins.keys() != set(file.keys()):
                raise CheckpointError(f"{path} is damaged: its header names a tensor twice")
            return {name: _stored(file, path, name, begin) for name, begin in begins.items()}
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
        file.write(_HEADER_LENGTH.pack(len(text)) + text)
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


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(_HEADER_LENGTH.size), "little")


def _read_positions(path: Path) -> dict[str, int]:
    """Returns the position of each tensor's first byte in a file whose header has been checked."""
    length = _header_length(path)
    with path.open("rb") as file:
        file.seek(_HEADER_LENGTH.size)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = _HEADER_LENGTH.size + length
    return {name: data + told["data_offsets"][0] for name, told in header.items()}


def _stored(file: Any, path: Path, name: str, begin: int) -> StoredTensor:
    tensor = file.get_slice(name)
    if tensor.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{path}: {shorten_name(name)} has dtype {tensor.get_dtype()}, which is not read"
        )
    shape, dtype = tuple(tensor.get_shape()), _DTYPES[tensor.get_dtype()]

    def read() -> np.ndarray:
        mapped, skipped = map_file(path, begin, math.prod(shape) * dtype.itemsize)
        return np.ndarray(shape, dtype, mapped, skipped)

    return StoredTensor(shape, dtype, read)


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
