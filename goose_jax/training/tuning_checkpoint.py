"""Checkpoints of parameters that are tuned beside a frozen model: LoRA adapters or initial states.

    adapter.json      kind of the parameters, the frozen model, number of steps, tokenizer
    tokenizer.json    or rwkv_vocab.txt: a copy of the tokenizer's file, if it has one
    config.json       fields of the `RWKV7Config` of the frozen model
    params/           the tuned parameters, written by Orbax
    optimizer/        the optimizer's state; only if training is to be resumed
    checksums.json    size and CRC-32 of each of these files

A directory is written under a temporary name and renamed at the end, so it is always complete.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from goose_jax.checkpoints import CheckpointError, CheckpointMetadata
from goose_jax.checkpoints.directory import read_arrays, read_json
from goose_jax.checkpoints.directory_writer import Saving, begin_directory
from goose_jax.checkpoints.errors import cause
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.checkpoints.native import ADAPTER, OPTIMIZER, open_checkpoint
from goose_jax.checkpoints.tokenizer_copy import embed_tokenizer, locate_tokenizer
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7, abstract_model
from goose_jax.training.lora import LoraConfig, init_lora
from goose_jax.training.state_tuning import init_wkv
from goose_jax.training.step import Parameters

type TuningKind = Literal["lora", "state"]

_FORMAT = 1
_CHOICES_OF_THE_MACHINE = ("compute_dtype", "remat", "unroll_layers", "implementation", "precision")


@dataclasses.dataclass(frozen=True)
class TuningCheckpoint:
    """Parameters that were tuned beside a frozen model, and how to know that model again.

    Attributes:
      params: adapters as `init_lora` makes them, or initial states as `init_wkv` makes them.
      lora: configuration of the adapters; None for initial states.
      base_config: configuration of the frozen model.
      base_fingerprint: `fingerprint` of the frozen model.
      base_path: path that the frozen model was loaded from.
      metadata: tokenizer, number of steps, and other values that the run records.
    """

    params: Parameters
    lora: LoraConfig | None
    base_config: RWKV7Config
    base_fingerprint: str
    base_path: str
    metadata: CheckpointMetadata

    @property
    def kind(self) -> TuningKind:
        """Which parameters were tuned: "lora" or "state"."""
        return "state" if self.lora is None else "lora"


def save_tuning_checkpoint(
    path: Path | str, checkpoint: TuningCheckpoint, *, opt_state: Any = None
) -> None:
    """Saves tuned parameters, and the optimizer's state if training is to be resumed.

    Args:
      path: the directory to create, with its parents.
      checkpoint: what to save.
      opt_state: the optimizer's state, a pytree of arrays; None leaves it out.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
    """
    begin_tuning_checkpoint(path, checkpoint, opt_state=opt_state).wait()


def begin_tuning_checkpoint(
    path: Path | str, checkpoint: TuningCheckpoint, *, opt_state: Any = None
) -> Saving:
    """Begins to save tuned parameters, as `begin_checkpoint` begins to save a model."""
    tokenizer, files = embed_tokenizer(checkpoint.metadata.tokenizer)
    metadata = dataclasses.replace(checkpoint.metadata, tokenizer=tokenizer)
    description = {
        "format": _FORMAT,
        "kind": checkpoint.kind,
        "lora": None if checkpoint.lora is None else dataclasses.asdict(checkpoint.lora),
        "base": {"path": checkpoint.base_path, "fingerprint": checkpoint.base_fingerprint},
        "metadata": dataclasses.asdict(metadata),
    }
    descriptions = files | {ADAPTER: description, "config.json": checkpoint.base_config.to_dict()}
    trees = {"params": checkpoint.params, OPTIMIZER: opt_state}
    return begin_directory(path, descriptions, trees)


def load_tuning_checkpoint(path: Path | str, *, mesh: Mesh | None = None) -> TuningCheckpoint:
    """Loads what `save_tuning_checkpoint` saved. The optimizer's state is not read.

    Args:
      path: directory of a checkpoint, or of a training run, whose newest intact checkpoint is
        loaded, as by `load_checkpoint`.
      mesh: the mesh that the parameters are divided over; None loads to the default device.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is no such checkpoint, or is damaged.
    """
    path = open_checkpoint(path, leave_out=OPTIMIZER)
    if not (path / ADAPTER).is_file():
        raise CheckpointError(f"{path} holds a model, and nothing that was tuned beside one")
    stored = read_json(path / ADAPTER)
    if stored.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {stored.get('format')}, but {_FORMAT} is read")
    metadata = CheckpointMetadata.from_json(stored.get("metadata"), str(path / ADAPTER))
    tokenizer = locate_tokenizer(metadata.tokenizer, path)
    metadata = dataclasses.replace(metadata, tokenizer=tokenizer)
    try:
        config = RWKV7Config.from_dict(read_json(path / "config.json"))
        lora = None if stored["lora"] is None else LoraConfig(**stored["lora"])
        base = {name: str(stored["base"][name]) for name in ("path", "fingerprint")}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {cause(error)}") from error
    return TuningCheckpoint(
        params=read_arrays(path / "params", _shapes(config, lora), mesh),
        lora=lora,
        base_config=config,
        base_fingerprint=base["fingerprint"],
        base_path=base["path"],
        metadata=metadata,
    )


def check_base(checkpoint: TuningCheckpoint, model: RWKV7, name: Path | str) -> None:
    """Checks that a model is the frozen model that parameters were tuned beside.

    Args:
      checkpoint: the tuned parameters.
      model: the model, with parameters in the dtype that the frozen model had.
      name: what the error calls the model, such as its path.

    Raises:
      CheckpointError: if it is another model. The error lists what differs.
    """
    expected, found = checkpoint.base_config.to_dict(), model.config.to_dict()
    different = [
        f"{field} is {found[field]!r} rather than {value!r}"
        for field, value in expected.items()
        if field not in _CHOICES_OF_THE_MACHINE and found[field] != value
    ]
    if not different and fingerprint(model) != checkpoint.base_fingerprint:
        different = ["it has the same sizes, but other weights"]
    if different:
        raise CheckpointError(
            f"{name} is not the model that was tuned, {checkpoint.base_path}: "
            f"{'; '.join(different)}"
        )


def _shapes(config: RWKV7Config, lora: LoraConfig | None) -> Parameters:
    if lora is None:
        return jax.eval_shape(lambda: init_wkv(config))
    model = abstract_model(config)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.eval_shape(lambda: init_lora(params, lora, jax.random.key(0)))


__all__ = [
    "TuningCheckpoint",
    "TuningKind",
    "begin_tuning_checkpoint",
    "check_base",
    "load_tuning_checkpoint",
    "save_tuning_checkpoint",
]
