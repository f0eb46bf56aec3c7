"""Our own checkpoints: a directory that holds all that is needed to use a model.

    config.json       fields of the `RWKV7Config`
    metadata.json     step, name of the tokenizer, and whatever the run wants to remember
    params/           the parameters, written by Orbax
    optimizer/        the optimizer's state, written by Orbax; absent if only the model was saved
    checksums.json    size and CRC-32 of each of these files

A checkpoint is written under a temporary name beside its place and renamed at the end, so under its
own name it is always complete; and a failure while saving leaves the ones before as they were.
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
"""The file that tells a directory in which there is no model (see `goose_jax.training.adapter`)."""
_FORMAT = 1
_ROOM_FOR_DESCRIPTIONS = 1 << 20
_BLOCK = 1 << 20  # bytes that are read at once for a checksum


class CheckpointError(ValueError):
    """A checkpoint is damaged, is none, or does not fit what it is loaded into."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint knows beside its arrays.

    Attributes:
      tokenizer: name of the tokenizer the model was trained with, as in "byte"; None if nobody
        said which.
      step: optimizer steps the model was trained for.
      extra: anything that JSON can hold.
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
    """Saves a model, and the optimizer's state if training is to be resumed from it.

    Args:
      path: the directory to make; those above it are made too.
      model: all of its parameters are saved, in their dtype.
      metadata: saved beside it.
      opt_state: a pytree of arrays, or None.

    Raises:
      FileExistsError: if there is something at `path`; nothing is ever written over.
      OSError: if writing fails, as on a full disk. What was written is removed.
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
    """Writes what a checkpoint's directory consists of, with a checksum of each file.

    Args:
      path: the directory to make; those above it are made too.
      descriptions: what JSON can hold, by the name of its file.
      trees: pytrees of arrays by the name of their folder; None is left out.

    Raises:
      FileExistsError: if there is something at `path`; nothing is ever written over.
      OSError: if writing fails, as on a full disk. What was written is removed.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
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
    """Loads the model of a checkpoint; the optimizer's state is not read.

    Args:
      path: a checkpoint's directory, or that of a training run: then its newest checkpoint.
      **overrides: fields of `RWKV7Config` to set otherwise, as in `compute_dtype="bfloat16"`;
        those that say what parameters there are cannot change.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      CheckpointError: if it is no checkpoint, is damaged, or its parameters do not fit its config.
      ValueError: if an override is out of range.
    """
    path = find_checkpoint(path)
    verify_directory(path)
    config, metadata = read_description(path, **overrides)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    params = read_arrays(path / _PARAMS, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, params), metadata


def read_description(path: Path, **overrides: Any) -> tuple[RWKV7Config, CheckpointMetadata]:
    """What a checkpoint's directory says of its model, without reading any parameter."""
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
    """Loads the optimizer's state of a checkpoint.

    Args:
      path: as for `load_checkpoint`.
      like: an optimizer state of the same structure, shapes and dtypes (arrays or
        `jax.ShapeDtypeStruct`s).

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      CheckpointError: if the checkpoint is damaged, has no optimizer state, or one of another
        structure.
    """
    path = find_checkpoint(path)
    verify_directory(path, with_optimizer=True)
    if not (path / _OPTIMIZER).is_dir():
        raise CheckpointError(f"{path} holds a model without the state of an optimizer")
    return read_arrays(path / _OPTIMIZER, like)


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a training run keeps its checkpoint of a step."""
    return Path(run) / "checkpoints" / f"{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a training run, the oldest first."""
    return sorted(path for path in Path(run).glob("checkpoints/[0-9]*") if path.is_dir())


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint at `path`, or the newest of the training run at `path`.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      CheckpointError: if there is something else.
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
    """What a JSON file of a checkpoint holds.

    Raises:
      CheckpointError: if it cannot be read or holds no object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def _reserve(directory: Path, tree: Any) -> None:
    """Fails where there is no room for the arrays of `tree`.

    Orbax, out of space in the middle of its many writes, would fill the terminal with the
    tracebacks of its threads.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _ROOM_FOR_DESCRIPTIONS
    file = directory / "space"
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems without it
                    raise
    file.unlink()


def _write_arrays(path: Path, tree: Any) -> None:
    try:
        with _orbax() as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(tree))
    except OSError:
        raise
    except Exception as error:  # TensorStore reports what the system says as ValueError
        raise OSError(_reason(error)) from error


def read_arrays(path: Path, like: Any) -> Any:
    """The arrays in a folder of a checkpoint, as a pytree like `like`.

    Raises:
      CheckpointError: if they are damaged, or have other names, shapes or dtypes.
    """
    # The device is said here, because that of the file may not exist on this machine.
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
    # Copies that are not bound to that device: as arrays are that were made, not loaded.
    return jax.tree.map(lambda array: jnp.array(np.asarray(array)), arrays)


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """A checkpointer that leaves it to us to report an error, which it also raises."""
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
    """What went wrong, out of messages that go on for pages about where."""
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
    # By names alone: Orbax keeps tuples as lists or dicts.
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
    """Checks that the files of a checkpoint are what was written.

    Raises:
      CheckpointError: naming the one that is not.
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
