"""Writes and reads directories of JSON files and arrays, with a checksum of each file.

A directory is written under a temporary name and renamed at the end. A directory with the final
name is therefore always complete, and a failure while writing leaves nothing behind.
"""

import contextlib
import errno
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from goose_jax.checkpoints.atomic_write import atomic_path
from goose_jax.checkpoints.errors import CheckpointError, cause, shorten_name

CHECKSUMS = "checksums.json"
"""The file with the size and CRC-32 of each other file. It marks a complete directory."""

_ROOM_FOR_DESCRIPTIONS = 1 << 20
_LONGEST = 255  # characters of a file's name
_BLOCK = 1 << 20  # bytes that are read at once for a checksum


def write_directory(
    path: Path | str, descriptions: Mapping[str, Any], trees: Mapping[str, Any]
) -> None:
    """Writes JSON files, arrays and the checksums of all files to a new directory.

    Args:
      path: the directory to create, with its parents.
      descriptions: for each JSON file its value, by file name; bytes are written as they are.
      trees: for each folder of arrays its pytree, by folder name. A None is left out.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    try:
        with atomic_path(path) as temporary:
            temporary.mkdir(parents=True)
            _reserve(temporary, trees)
            for name, value in descriptions.items():
                if isinstance(value, bytes):
                    (temporary / name).write_bytes(value)
                else:
                    _write_json(temporary / name, value)
            for name, tree in trees.items():
                _write_arrays(temporary / name, tree)
            _write_json(temporary / CHECKSUMS, _checksums(temporary))
    except OSError as error:
        raise OSError(f"could not save the checkpoint {path}: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


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


def _reserve(directory: Path, tree: Any) -> None:
    """Raises an OSError if the disk has no space for the arrays of `tree`.

    Without this check Orbax would run out of space in the middle of its writes, and the tracebacks
    of its threads would fill the terminal.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _ROOM_FOR_DESCRIPTIONS
    file = directory / "space"
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                # Some file systems do not support posix_fallocate.
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
    file.unlink()


def _write_arrays(path: Path, tree: Any) -> None:
    try:
        with _orbax() as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(tree))
    except OSError:
        raise
    except Exception as error:  # TensorStore reports errors of the system as ValueError
        raise OSError(_reason(error)) from error


def read_arrays(path: Path, like: Any) -> Any:
    """Reads the arrays in a folder of a checkpoint.

    Args:
      path: the folder.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes of
        the arrays.

    Returns:
      A pytree of the structure of `like`, on the default device.

    Raises:
      CheckpointError: if the arrays are damaged, or have other names, shapes or dtypes.
    """
    # The device is given here, because the device that the file names may not exist.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like
    )
    try:
        with _orbax() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            _check_fits(path, stored, abstract)
            arrays = checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))
    except CheckpointError:
        raise
    except Exception as error:  # Orbax has no common class of errors
        raise CheckpointError(f"{path} is damaged: {_reason(error)}") from error
    # Restored arrays are committed to the device. Copies are not, like other new arrays.
    return jax.tree.map(lambda array: jnp.array(np.asarray(array)), arrays)


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Makes a checkpointer that does not log the errors that it raises."""
    logger = logging.getLogger("absl")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        logger.addFilter(_is_no_error)
        try:
            yield checkpointer
        finally:
            logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _reason(error: Exception) -> str:
    """Returns the cause of an error whose message has pages of context."""
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


def _checksums(directory: Path) -> dict[str, list[int]]:
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
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {shorten_name(name)} is missing")
        if [file.stat().st_size, _crc32(file)] != expected:
            raise CheckpointError(
                f"{path} is damaged: {shorten_name(name)} is not what was written"
            )


__all__ = ["CHECKSUMS", "read_arrays", "read_json", "verify_directory", "write_directory"]
