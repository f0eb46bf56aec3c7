"""Checkpoints of what is tuned beside a frozen model: adapters, or initial states.

    adapter.json      what it is, what it was tuned on, step, tokenizer
    config.json       fields of the `RWKV7Config` of the model it was tuned on
    params/           what was trained, written by Orbax
    optimizer/        the optimizer's state, if training is to be resumed
    checksums.json    size and CRC-32 of each of these files

They are written as a model's own checkpoints are: under a temporary name, never over anything.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from goose_jax.checkpoints import CheckpointError, CheckpointMetadata
from goose_jax.checkpoints.directory import (
    read_arrays,
    read_json,
    verify_directory,
    write_directory,
)
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.checkpoints.native import ADAPTER, OPTIMIZER, find_checkpoint
from goose_jax.config import RWKV7Config
from goose_jax.nn import RWKV7
from goose_jax.training.lora import LoraConfig, init_lora
from goose_jax.training.state_tuning import init_wkv
from goose_jax.training.step import Parameters

type AdapterKind = Literal["lora", "state"]

_FORMAT = 1
_CHOICES_OF_THE_MACHINE = ("compute_dtype", "remat", "implementation")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What was tuned beside a model.

    Attributes:
      params: the adapters (see `init_lora`), or the initial states (see `init_wkv`).
      lora: configuration of the adapters; None for initial states.
      base_config: of the model.
      base_fingerprint: of the model, see `fingerprint`.
      base_path: where the model was loaded from.
      metadata: tokenizer and step.
    """

    params: Parameters
    lora: LoraConfig | None
    base_config: RWKV7Config
    base_fingerprint: str
    base_path: str
    metadata: CheckpointMetadata

    @property
    def kind(self) -> AdapterKind:
        """What was tuned."""
        return "state" if self.lora is None else "lora"


def save_adapter(path: Path | str, adapter: Adapter, *, opt_state: Any = None) -> None:
    """Saves what was tuned, and the optimizer's state if training is to be resumed from it.

    Raises:
      FileExistsError: if there is something at `path`; nothing is ever written over.
      OSError: if writing fails, as on a full disk. What was written is removed.
    """
    description = {
        "format": _FORMAT,
        "kind": adapter.kind,
        "lora": None if adapter.lora is None else dataclasses.asdict(adapter.lora),
        "base": {"path": adapter.base_path, "fingerprint": adapter.base_fingerprint},
        "metadata": dataclasses.asdict(adapter.metadata),
    }
    descriptions = {ADAPTER: description, "config.json": adapter.base_config.to_dict()}
    write_directory(path, descriptions, {"params": adapter.params, OPTIMIZER: opt_state})


def load_adapter(path: Path | str) -> Adapter:
    """Loads what `save_adapter` saved; the optimizer's state is not read.

    Args:
      path: the directory, or that of a training run: then its newest checkpoint.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      CheckpointError: if it is no such checkpoint, or is damaged.
    """
    path = find_checkpoint(path)
    if not (path / ADAPTER).is_file():
        raise CheckpointError(f"{path} holds a model, and nothing that was tuned beside one")
    verify_directory(path, leave_out=OPTIMIZER)
    stored = read_json(path / ADAPTER)
    if stored.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {stored.get('format')}, but {_FORMAT} is read")
    config = RWKV7Config.from_dict(read_json(path / "config.json"))
    lora = None if stored["lora"] is None else LoraConfig(**stored["lora"])
    return Adapter(
        params=read_arrays(path / "params", _shapes(config, lora)),
        lora=lora,
        base_config=config,
        base_fingerprint=stored["base"]["fingerprint"],
        base_path=stored["base"]["path"],
        metadata=CheckpointMetadata(**stored["metadata"]),
    )


def check_base(adapter: Adapter, model: RWKV7, name: Path | str) -> None:
    """Checks that a model is the one that something was tuned on.

    Args:
      adapter: what was tuned.
      model: in the dtype in which it was frozen then.
      name: what the error calls the model.

    Raises:
      CheckpointError: if not; it lists what differs.
    """
    expected, found = adapter.base_config.to_dict(), model.config.to_dict()
    different = [
        f"{field} is {found[field]!r} rather than {value!r}"
        for field, value in expected.items()
        if field not in _CHOICES_OF_THE_MACHINE and found[field] != value
    ]
    if not different and fingerprint(model) != adapter.base_fingerprint:
        different = ["it has the same sizes, but other weights"]
    if different:
        raise CheckpointError(
            f"{name} is not the model that was tuned, {adapter.base_path}: {'; '.join(different)}"
        )


def _shapes(config: RWKV7Config, lora: LoraConfig | None) -> Parameters:
    if lora is None:
        return jax.eval_shape(lambda: init_wkv(config))
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.eval_shape(lambda: init_lora(params, lora, jax.random.key(0)))


__all__ = ["Adapter", "AdapterKind", "check_base", "load_adapter", "save_adapter"]
