"""Reads directories of JSON files and arrays, with a checksum of each file.

`goose_jax.checkpoints.directory_writer` writes them.
"""

import contextlib
import json
import logging
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from goose_jax.checkpoints.errors import CheckpointError, cause, shorten_name
from goose_jax.parallel import tree_shardings

CHECKSUMS = "checksums.json"
"""The file with the size and CRC-32 of each other file. It marks a complete directory."""

_LONGEST = 255  # characters of a file's name
_BLOCK = 1 << 20  # bytes that are read at once for a checksum


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file of a checkpoint.

    Raises:
      CheckpointError: if the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {cause(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def read_arrays(path: Path, like: Any, mesh: Mesh | None = None) -> Any:
    """Reads the arrays in a folder of a checkpoint.

    Args:
      path: the folder.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes of
        the arrays.
      mesh: the mesh that the arrays are divided over, by `goose_jax.parallel.PARTITION_RULES`; each
        process then reads the parts of its devices only. None reads to the default device.

    Returns:
      A pytree of the structure of `like`.

    Raises:
      CheckpointError: if the arrays are damaged, or have other names, shapes or dtypes.
    """
    # Devices are given here, because the devices that the file names may not exist.
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, like)
    else:
        shardings = tree_shardings(like, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings,
    )
    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            _check_fits(path, stored, abstract)
            arrays = checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))
    except CheckpointError:
        raise
    except Exception as error:  # Orbax has no common class of errors
        raise CheckpointError(f"{path} is damaged: {orbax_reason(error)}") from error
    if mesh is not None:
        return arrays
    # Restored arrays are committed to the device. Copies are not, like other new arrays.
    return jax.tree.map(lambda array: jnp.array(np.asarray(array)), arrays)


class _ErrorFilter(logging.Filter):
    """Drops errors while `depth` is not 0; several threads may be within."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.depth = threading.Lock(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        return self.depth == 0 or record.levelno < logging.ERROR


_error_filter = _ErrorFilter()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax from logging the errors that it raises."""
    with _error_filter.lock:
        logging.getLogger("absl").addFilter(_error_filter)
        _error_filter.depth += 1
    try:
        yield
    finally:
        with _error_filter.lock:
            _error_filter.depth -= 1


def orbax_reason(error: Exception) -> str:
    """Returns the cause of an error of Orbax, whose message has pages of context."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rsplit(": ", 1)[-1]


def _check_fits(path: Path, stored: Any, expected: Any) -> None:
    here, there = _shapes(stored), _shapes(expected)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"{path} does not fit its configuration: {name} is {here.get(name, 'missing')} "
                f"in the file and {there.get(name, 'missing')} in the model"
            )


def _shapes(tree: Any) -> dict[str, str]:
    # Keys are compared by name alone, because Orbax turns tuples into lists or dicts.
    return {
        ".".join(_name(key) for key in path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _name(key: Any) -> str:
    return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))


def checksums_of(directory: Path) -> dict[str, list[int]]:
    """Returns the size and CRC-32 of each file in a directory, by path."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {
        str(file.relative_to(directory).as_posix()): [file.stat().st_size, _crc32(file)]
        for file in files
    }


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def verify_directory(
    path: Path, *, leave_out: str | None = None, only: Sequence[str] | None = None
) -> None:
    """Checks the files of a checkpoint against its checksums.

    In a run of several processes the first one checks files of arrays, for all.

    Args:
      path: directory of the checkpoint.
      leave_out: name of a folder whose files are not checked.
      only: names of the files to check; None checks all.

    Raises:
      CheckpointError: if a file is missing or has changed. The message names the file.
    """
    for name, expected in read_json(path / CHECKSUMS).items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name or len(name) > _LONGEST:
            raise CheckpointError(
                f"{path} is damaged: {CHECKSUMS} names {shorten_name(repr(name))}"
            )
        if parts[0] == leave_out or (only is not None and name not in only):
            continue
        if len(parts) > 1 and jax.process_index() > 0:
            continue
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {shorten_name(name)} is missing")
        if [file.stat().st_size, _crc32(file)] != expected:
            raise CheckpointError(
                f"{path} is damaged: {shorten_name(name)} is not what was written"
            )


__all__ = [
    "CHECKSUMS",
    "checksums_of",
    "orbax_reason",
    "quiet_orbax",
    "read_arrays",
    "read_json",
    "verify_directory",
]
