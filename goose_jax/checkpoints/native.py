"""Checkpoints of goose-jax: a directory with everything that is needed to use a model.

    config.json       fields of the `RWKV7Config`
    metadata.json     step, name of the tokenizer, and other values that the run records
    tokenizer.json    or rwkv_vocab.txt: a copy of the tokenizer's file, if it has one
    params/           the parameters, written by Orbax
    optimizer/        the state of the optimizer, written by Orbax; only if training will be resumed
    checksums.json    size and CRC-32 of each of these files

A checkpoint is written under a temporary name and renamed at the end. A directory with the final
name is therefore always complete, and a failure while saving leaves earlier checkpoints unchanged.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from flax import nnx
from jax.sharding import Mesh

from goose_jax.checkpoints.directory import (
    CHECKSUMS,
    read_arrays,
    read_json,
    verify_directory,
)
from goose_jax.checkpoints.directory_writer import Saving, begin_directory
from goose_jax.checkpoints.errors import CheckpointError, cause, list_names, shorten_name
from goose_jax.checkpoints.tokenizer_copy import embed_tokenizer, locate_tokenizer
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7, abstract_model
from goose_jax.parallel import check_mesh

_CONFIG, _METADATA = "config.json", "metadata.json"
DESCRIPTION = (_CONFIG, _METADATA)
"""The files that say what a checkpoint of a model is."""

_PARAMS = "params"
OPTIMIZER = "optimizer"
"""The folder of the state of the optimizer, which only training reads."""

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in the folder of a training run."""

ADAPTER = "adapter.json"
"""This file marks a directory that holds adapters or an initial state instead of a model."""
_FORMAT = 1
_MOST_NAMED = 8  # damaged checkpoints in one error
_LONGEST_NAME = 255  # characters of a file's name
_LAST_STEP = 2**31 - 1  # steps are int32


class CheckpointWarning(UserWarning):
    """The newest checkpoint of a run is damaged, and an older one is used."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """The values that a checkpoint records beside its arrays.

    Attributes:
      tokenizer: name or path of the tokenizer that the model was trained with, such as "byte"; None
        if it is unknown. A checkpoint keeps a copy of the tokenizer's file, and a loaded checkpoint
        names its copy.
      step: number of optimizer steps that the model was trained for.
      extra: other values that JSON can hold.
    """

    tokenizer: str | None
    step: int = 0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Any, source: str) -> Self:
        """Returns the metadata that `dataclasses.asdict` made a dict of.

        Args:
          values: the dict.
          source: where it was found, for the error.

        Raises:
          CheckpointError: if `values` is something else.
        """
        known = values if isinstance(values, dict) else {"metadata": values}
        wrong = [
            f"{shorten_name(name)} is {shorten_name(repr(value))}"
            for name, value in known.items()
            if not _IS_METADATA.get(name, _is_nothing)(value)
        ]
        if wrong or "tokenizer" not in known:
            found = list_names(wrong) if wrong else f"only {list_names(known)}"
            raise CheckpointError(f"{source} is damaged: it is no metadata: {found}")
        return cls(**known)


def _is_tokenizer(value: Any) -> bool:
    """Returns whether a value may name a tokenizer: None, a name, or a path that can exist."""
    if value is None:
        return True
    is_path = isinstance(value, str) and bool(value) and "\0" not in value
    return is_path and all(len(part) <= _LONGEST_NAME for part in value.split("/"))


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LAST_STEP


def _is_nothing(value: Any) -> bool:
    return False


_IS_METADATA: dict[str, Callable[[Any], bool]] = {
    "tokenizer": _is_tokenizer,
    "step": _is_step,
    "extra": lambda value: isinstance(value, dict),
}


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
    begin_checkpoint(path, model, metadata, opt_state=opt_state).wait()


def begin_checkpoint(
    path: Path | str,
    model: RWKV7,
    metadata: CheckpointMetadata,
    *,
    opt_state: Any = None,
) -> Saving:
    """Begins to save a checkpoint, as `save_checkpoint` does, and writes while training goes on.

    The arrays may be divided over the devices of several processes, all of which must call this.
    Returns when the arrays have been copied to the host, so that their buffers may be donated.

    Returns:
      What to wait for, before another checkpoint or the end; errors of writing are raised there.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if the disk has no space for the checkpoint.
    """
    tokenizer, files = embed_tokenizer(metadata.tokenizer)
    metadata = dataclasses.replace(metadata, tokenizer=tokenizer)
    descriptions = files | {
        _CONFIG: model.config.to_dict(),
        _METADATA: {"format": _FORMAT} | dataclasses.asdict(metadata),
    }
    trees = {_PARAMS: nnx.to_pure_dict(nnx.state(model, nnx.Param)), OPTIMIZER: opt_state}
    return begin_directory(path, descriptions, trees)


def load_checkpoint(
    path: Path | str, *, mesh: Mesh | None = None, **overrides: Any
) -> tuple[RWKV7, CheckpointMetadata]:
    """Loads the model of a checkpoint. The state of the optimizer is not read.

    Args:
      path: directory of a checkpoint, or of a training run, whose newest intact checkpoint is
        loaded. (A run of several processes needs the newest one.)
      mesh: the mesh that the parameters are divided over, which may be another one than that of the
        run that saved them; no process then reads more than its devices need. None loads to the
        default device.
      **overrides: fields of `RWKV7Config` to replace, such as `compute_dtype="bfloat16"`. Fields
        that determine the shapes or dtypes of parameters cannot be replaced.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is not a checkpoint, is damaged, or its parameters do not fit its
        configuration.
      ValueError: if an override is out of range, or the mesh does not divide the model.

    Warns:
      CheckpointWarning: for each newer checkpoint of a run that is damaged.
    """
    path = open_checkpoint(path, leave_out=OPTIMIZER)
    config, metadata = read_description(path, **overrides)
    if mesh is not None:
        check_mesh(mesh, config)
    graphdef, state = nnx.split(abstract_model(config))
    params = read_arrays(path / _PARAMS, nnx.to_pure_dict(state), mesh)
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
    verify_directory(path, only=DESCRIPTION)
    stored = read_json(path / _METADATA)
    found = stored.pop("format", None)
    if type(found) is not int or found != _FORMAT:
        shown = shorten_name(repr(found))
        raise CheckpointError(f"{path} has format {shown}, but {_FORMAT} is read here")
    try:
        config = RWKV7Config.from_dict(read_json(path / _CONFIG))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / _CONFIG} is damaged: {cause(error)}") from error
    config = dataclasses.replace(config, **overrides)
    metadata = CheckpointMetadata.from_json(stored, str(path / _METADATA))
    tokenizer = locate_tokenizer(metadata.tokenizer, path)
    return config, dataclasses.replace(metadata, tokenizer=tokenizer)


def load_optimizer_state(path: Path | str, like: Any, *, mesh: Mesh | None = None) -> Any:
    """Loads the state of the optimizer from a checkpoint.

    Args:
      path: directory of a checkpoint, or of a training run, whose newest checkpoint is read.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes of
        the state.
      mesh: the mesh that the state is divided over; None loads to the default device.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if the checkpoint is damaged, or has no state of an optimizer, or one of
        another structure.
    """
    path = find_checkpoint(path)
    verify_directory(path)
    if not (path / OPTIMIZER).is_dir():
        raise CheckpointError(f"{path} holds a model without the state of an optimizer")
    return read_arrays(path / OPTIMIZER, like, mesh)


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns the path of a training run's checkpoint after a step."""
    return Path(run) / CHECKPOINTS / f"{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the paths of the checkpoints of a training run, the oldest first."""
    return sorted(path for path in Path(run).glob(f"{CHECKPOINTS}/[0-9]*") if path.is_dir())


def find_checkpoint(path: Path | str) -> Path:
    """Returns the path of the checkpoint at `path`, or of the newest one of the run at `path`.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is neither a checkpoint nor a run with checkpoints.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if (path / CHECKSUMS).is_file():
        return path
    if path.is_dir() and (of_run := list_checkpoints(path)):
        return of_run[-1]
    raise CheckpointError(f"{path} is neither a checkpoint ({CHECKSUMS} is missing) nor a run")


def open_checkpoint(
    path: Path | str, *, leave_out: str | None = None, only: Sequence[str] | None = None
) -> Path:
    """Returns the absolute path of a checkpoint, or of the newest intact one of a run.

    In a run of several processes only the newest one will do: each process reads its own part of
    the files, so they could not agree on another one.

    Args:
      path: directory of a checkpoint or of a training run.
      leave_out: name of a folder whose files are not checked.
      only: names of the files to check; None checks all.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is neither a checkpoint nor a run with checkpoints, or what it holds is
        damaged.

    Warns:
      CheckpointWarning: for each newer checkpoint that is damaged.
    """
    found = find_checkpoint(path)
    if found != Path(path).absolute() and jax.process_count() == 1:
        return newest_intact(Path(path), leave_out=leave_out, only=only)
    verify_directory(found, leave_out=leave_out, only=only)
    return found


def newest_intact(
    run: Path, *, leave_out: str | None = None, only: Sequence[str] | None = None
) -> Path:
    """Returns the absolute path of a run's newest checkpoint that is as it was written.

    Args:
      run: folder of a run with checkpoints.
      leave_out: name of a folder whose files are not checked.
      only: names of the files to check; None checks all.

    Raises:
      CheckpointError: if all are damaged. The message names each of them and its damage.

    Warns:
      CheckpointWarning: for each newer checkpoint that is damaged.
    """
    damaged: list[CheckpointError] = []
    for path in reversed(list_checkpoints(run.absolute())):  # Orbax needs absolute paths
        try:
            verify_directory(path, leave_out=leave_out, only=only)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for damage in damaged:
            warnings.warn(f"{damage}; going on from {path}", CheckpointWarning, stacklevel=2)
        return path
    shown = "; ".join(map(str, damaged[:_MOST_NAMED]))
    others = f"; and {len(damaged) - _MOST_NAMED} more" if damaged[_MOST_NAMED:] else ""
    raise CheckpointError(f"all checkpoints of {run} are damaged: {shown}{others}")


__all__ = [
    "ADAPTER",
    "CHECKPOINTS",
    "DESCRIPTION",
    "OPTIMIZER",
    "CheckpointMetadata",
    "CheckpointWarning",
    "begin_checkpoint",
    "checkpoint_path",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_optimizer_state",
    "newest_intact",
    "open_checkpoint",
    "read_description",
    "save_checkpoint",
]
