"""Reads and writes named tensors in files and folders, whatever the names are.

A container is a file of torch (`.pth`), a file of safetensors, or a folder with one of them or with
several shards and their index.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from goose_jax.checkpoints.atomic_write import atomic_path
from goose_jax.checkpoints.directory import CHECKSUMS
from goose_jax.checkpoints.errors import CheckpointError, list_names
from goose_jax.checkpoints.folder_settings import CONFIG
from goose_jax.checkpoints.pth import is_pth, read_pth
from goose_jax.checkpoints.pth_writer import write_pth
from goose_jax.checkpoints.safetensors_files import (
    INDEX_END,
    read_safetensors,
    read_shards,
    write_safetensors,
    write_shards,
)
from goose_jax.checkpoints.stored_tensor import StoredTensor

type Container = Literal["pth", "safetensors", "folder"]
type CheckpointKind = Container | Literal["native"]

_PTH_ENDS = (".pth", ".pt", ".bin")
_SAFETENSORS_ENDS = (".safetensors", ".st")
_USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_HEADER_LENGTH = 8  # bytes before the header of a safetensors file


def checkpoint_kind(path: Path) -> CheckpointKind:
    """Returns what lies at `path`, judged by the files that exist and their first bytes.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is a file of another format.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.is_dir():
        is_ours = (path / CHECKSUMS).is_file() or (path / "checkpoints").is_dir()
        is_foreign = (path / CONFIG).is_file() or any(_weight_files(path).values())
        return "folder" if is_foreign and not is_ours else "native"
    with path.open("rb") as file:
        beginning = file.read(_HEADER_LENGTH + 1)
    if is_pth(beginning):
        return "pth"
    if path.name.endswith(INDEX_END):
        return "safetensors"
    if beginning.startswith(b"GGUF"):
        raise CheckpointError(f"{path} is a GGUF file, which is not read; use the original .pth")
    if beginning[_HEADER_LENGTH:] == b"{":
        return "safetensors"
    raise CheckpointError(
        f"{path} is neither a .pth nor a safetensors file: it begins with {beginning!r}"
    )


def belongs_to_folder(path: Path) -> bool:
    """Returns whether `config.json` speaks of the weights at `path`.

    That is so for a folder, and for a file in it that has the name which Hugging Face gives it.
    """
    return path.is_dir() or path.name in _USUAL


def container_to_write(path: Path) -> Container:
    """Returns the container that the end of a path asks for."""
    if path.suffix.lower() in _PTH_ENDS:
        return "pth"
    return "safetensors" if path.suffix.lower() in _SAFETENSORS_ENDS else "folder"


def open_tensors(
    path: Path,
) -> tuple[dict[str, StoredTensor] | list[StoredTensor], Container]:
    """Returns the tensors at `path` by name, and the container. Values are not read yet.

    Args:
      path: a file of torch or of safetensors, an index of shards, or a folder with one of these.

    Returns:
      tensors: by name; a list if the file is a list of tensors.
      container: kind of the file, or of the file in the folder.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if a file is damaged or has another format, or a folder holds none or
        several.
    """
    if path.is_dir():
        file = _file_in(path)
        return open_tensors(file)[0], "folder"
    if checkpoint_kind(path) == "pth":
        return read_pth(path), "pth"
    read = read_shards if path.name.endswith(INDEX_END) else read_safetensors
    return read(path), "safetensors"


def write_tensors(
    path: Path,
    container: Container,
    tensors: Iterable[tuple[str, np.ndarray]],
    settings: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes named tensors. Incomplete files are removed if writing fails.

    Args:
      path: the file or folder to create, with its parents.
      container: what to create.
      tensors: names and arrays, which may be transposed views.
      settings: contents of a folder's `config.json`.
      files: contents of other files in a folder, by name.
      max_shard_bytes: maximum size of each file in a folder, unless a single tensor is larger.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if container == "pth":
        write_pth(path, tensors)
        return
    with atomic_path(path) as temporary:
        if container == "safetensors":
            write_safetensors(temporary, dict(tensors))
            return
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        write_shards(temporary, dict(tensors), max_shard_bytes)


def _weight_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of weights in a folder by kind, in the order of preference."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "index": [file for file in files if file.name.endswith(INDEX_END)],
        "safetensors": [file for file in files if file.suffix.lower() in _SAFETENSORS_ENDS],
        "torch": [file for file in files if file.suffix.lower() in _PTH_ENDS],
    }


def _file_in(folder: Path) -> Path:
    found = next((files for files in _weight_files(folder).values() if files), [])
    usual = [file for file in found if file.name in _USUAL]
    if len(found) == 1 or len(usual) == 1:
        return (usual or found)[0]
    if not found:
        raise CheckpointError(f"{folder} holds no file of weights (.safetensors, .st or .pth)")
    names = list_names(file.name for file in found)
    raise CheckpointError(f"{folder} holds several files of weights; give one of {names}")
