"""Checkpoints of goose-jax: a directory with everything that is needed to use a model.

    config.json       fields of the `RWKV7Config`
    metadata.json     step, name of the tokenizer, and other values that the run records
    params/           the parameters, written by Orbax
    optimizer/        the state of the optimizer, written by Orbax; only if training will be resumed
    checksums.json    size and CRC-32 of each of these files

A checkpoint is written under a temporary name and renamed at the end. A directory with the final
name is therefore always complete, and a failure while saving leaves earlier checkpoints unchanged.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7

_CONFIG, _METADATA, _CHECKSUMS = "config.json", "metadata.json", "checksums.json"
_PARAMS, _OPTIMIZER = "params", "optimizer"
ADAPTER = "adapter.json"
"""This file marks a directory that holds adapters or an initial state instead of a model."""
_FORMAT = 1
_ROOM_FOR_DESCRIPTIONS = 1 << 20
_BLOCK = 1 << 20  # bytes that are read at once for a checksum


class CheckpointError(ValueError):
    """A path is not a checkpoint, the checkpoint is damaged, or it does not fit the model."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """The values that a checkpoint records beside its arrays.

    Attributes:
      tokenizer: name or path of the tokenizer that the model was trained with, such as "byte"; None
        if it is unknown.
      step: number of optimizer steps that the model was trained for.
      extra: other values that JSON can hold.
    """

    tokenizer: str | None
    step: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_checkpoint(
    path: Path | str,
    model: RWKV7,
    metadata: CheckpointMetadata,
    *,
    opt_state: Any = None,
) -> None:
    """Saves a model, and the state of the optimizer if training will be resumed.

    Args:
      path: the directory to create, with its parents.
      model: the model. All parameters are saved, in their dtype.
      metadata: values to record.
      opt_state: state of the optimizer, a pytree of arrays; None saves the model only.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
    """
    descriptions = {
        _CONFIG: model.config.to_dict(),
        _METADATA: {"format": _FORMAT} | dataclasses.asdict(metadata),
    }
    trees = {_PARAMS: nnx.to_pure_dict(nnx.state(model, nnx.Param)), _OPTIMIZER: opt_state}
    write_directory(path, descriptions, trees)


def write_directory(
    path: Path | str, descriptions: Mapping[str, Any], trees: Mapping[str, Any]
) -> None:
    """Writes JSON files, arrays and the checksums of all files to a new directory.

    Args:
      path: the directory to create, with its parents.
      descriptions: for each JSON file its value, by file name.
      trees: for each folder of arrays its pytree, by folder name. A None is left out.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left behind by a run that was killed
        temporary.mkdir(parents=True)
        _reserve(temporary, trees)
        for name, value in descriptions.items():
            _write_json(temporary / name, value)
        for name, tree in trees.items():
            _write_arrays(temporary / name, tree)
        _write_json(temporary / _CHECKSUMS, _checksums(temporary))
        temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"could not save the checkpoint {path}: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(path: Path | str, **overrides: Any) -> tuple[RWKV7, CheckpointMetadata]:
    """Loads the model of a checkpoint. The state of the optimizer is not read.

    Args:
      path: directory of a checkpoint, or of a training run, whose newest checkpoint is loaded.
      **overrides: fields of `RWKV7Config` to replace, such as `compute_dtype="bfloat16"`. Fields
        that determine the shapes or dtypes of parameters cannot be replaced.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is not a checkpoint, is damaged, or its parameters do not fit its
        configuration.
      ValueError: if an override is out of range.
    """
    path = find_checkpoint(path)
    verify_directory(path)
    config, metadata = read_description(path, **overrides)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    params = read_arrays(path / _PARAMS, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, params), metadata


def read_description(path: Path, **overrides: Any) -> tuple[RWKV7Config, CheckpointMetadata]:
    """Reads the configuration and the metadata of a checkpoint, but no parameters.

    Args:
      path: directory of the checkpoint.
      **overrides: fields of `RWKV7Config` to replace.

    Raises:
      CheckpointError: if the directory holds no model, is damaged, or has another format.
      ValueError: if an override is out of range.
    """
    if (path / ADAPTER).is_file():
        raise CheckpointError(
            f"{path} holds what was tuned beside a model and not the model: for adapters use "
            "goose-jax merge, for initial states --state"
        )
    stored = read_json(path / _METADATA)
    if (found := stored.pop("format", None)) != _FORMAT:
        raise CheckpointError(f"{path} has format {found}, but {_FORMAT} is read here")
    config = RWKV7Config.from_dict(read_json(path / _CONFIG) | overrides)
    return config, CheckpointMetadata(**stored)


def load_optimizer_state(path: Path | str, like: Any) -> Any:
    """Loads the state of the optimizer from a checkpoint.

    Args:
      path: directory of a checkpoint, or of a training run, whose newest checkpoint is read.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes of
        the state.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if the checkpoint is damaged, or has no state of an optimizer, or one of
        another structure.
    """
    path = find_checkpoint(path)
    verify_directory(path, with_optimizer=True)
    if not (path / _OPTIMIZER).is_dir():
        raise CheckpointError(f"{path} holds a model without the state of an optimizer")
    return read_arrays(path / _OPTIMIZER, like)


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns the path of a training run's checkpoint after a step."""
    return Path(run) / "checkpoints" / f"{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the paths of the checkpoints of a training run, the oldest first."""
    return sorted(path for path in Path(run).glob("checkpoints/[0-9]*") if path.is_dir())


def find_checkpoint(path: Path | str) -> Path:
    """Returns the path of the checkpoint at `path`, or of the newest one of the run at `path`.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is neither a checkpoint nor a run with checkpoints.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if (path / _CHECKSUMS).is_file():
        return path
    if path.is_dir() and (of_run := list_checkpoints(path)):
        return of_run[-1]
    raise CheckpointError(f"{path} is neither a checkpoint ({_CHECKSUMS} is missing) nor a run")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file of a checkpoint.

    Raises:
      CheckpointError: if the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
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


def verify_directory(path: Path, *, with_optimizer: bool = False) -> None:
    """Checks the files of a checkpoint against its checksums.

    Args:
      path: directory of the checkpoint.
      with_optimizer: whether to check the state of the optimizer, too.

    Raises:
      CheckpointError: if a file is missing or has changed. The message names the file.
    """
    for name, expected in read_json(path / _CHECKSUMS).items():
        if Path(name).parts[0] == _OPTIMIZER and not with_optimizer:
            continue
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if [file.stat().st_size, _crc32(file)] != expected:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written")


__all__ = [
    "ADAPTER",
    "CheckpointError",
    "CheckpointMetadata",
    "checkpoint_path",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_optimizer_state",
    "read_arrays",
    "read_description",
    "read_json",
    "save_checkpoint",
    "verify_directory",
    "write_directory",
]
