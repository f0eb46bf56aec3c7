"""What `goose-jax train` can train: a whole model, adapters beside one, or its initial states."""

import shlex
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from goose_jax.checkpoints import (
    CheckpointMetadata,
    load_pretrained,
    load_state,
    save_checkpoint,
    save_state,
)
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.cli.train_settings import TrainSettings, known
from goose_jax.config import default_compute_dtype
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State
from goose_jax.training.lora import LoraConfig, init_lora, lora_losses, merge_lora
from goose_jax.training.state_tuning import init_wkv, state_losses, tuned_state, wkv_of
from goose_jax.training.step import Losses, Parameters, full_losses, with_params
from goose_jax.training.tuning_checkpoint import TuningCheckpoint, save_tuning_checkpoint

STATE_FILE = "state.pth"


class Full:
    """All parameters of a model are trained.

    Attributes:
      model: as it was before.
      losses: of what is trained, what is frozen, and a batch.
      initial: what is trained, before the first step.
      frozen: what is not.
      purpose: what is trained, in words.
    """

    purpose = "the whole model"
    frozen: Parameters | None = None

    def __init__(self, model: RWKV7):
        self.losses: Losses = full_losses(model)
        self.initial: Parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.model = model

    def save(
        self, path: Path, trained: Parameters, metadata: CheckpointMetadata, opt_state: Any
    ) -> None:
        """Writes a checkpoint."""
        save_checkpoint(path, with_params(self.model, trained), metadata, opt_state=opt_state)

    def export(self, run: Path, trained: Parameters) -> None:
        """Writes what else a finished run leaves."""

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """The model that has come out, and what a text begins with."""
        return with_params(self.model, trained), None

    def how_to_use(self, run: Path, tokenizer: str) -> list[str]:
        """Commands that let the result continue a text."""
        del tokenizer  # which the run knows
        return [f"goose-jax generate {shlex.quote(str(run))}"]


class _Beside:
    """Something is trained beside a model, all of whose parameters are frozen."""

    losses: Losses
    initial: Parameters

    def __init__(self, model: RWKV7, path: Path, lora: LoraConfig | None):
        self.frozen: Parameters | None = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.model, self._path, self._lora = model, path, lora
        self._fingerprint = fingerprint(model)

    def save(
        self, path: Path, trained: Parameters, metadata: CheckpointMetadata, opt_state: Any
    ) -> None:
        """Writes a checkpoint of what is trained."""
        adapter = TuningCheckpoint(
            params=trained,
            lora=self._lora,
            base_config=self.model.config,
            base_fingerprint=self._fingerprint,
            base_path=str(self._path.absolute()),
            metadata=metadata,
        )
        save_tuning_checkpoint(path, adapter, opt_state=opt_state)


class Lora(_Beside):
    """Adapters of the projection matrices are trained; attributes and methods as of `Full`."""

    def __init__(self, model: RWKV7, path: Path, config: LoraConfig, seed: int):
        super().__init__(model, path, config)
        assert self.frozen is not None
        self.purpose = f"adapters of rank {config.rank} (LoRA), alpha {config.alpha:g}"
        self.losses = lora_losses(model, config)
        self.initial = init_lora(self.frozen, config, jax.random.key(seed))
        self._config = config

    def export(self, run: Path, trained: Parameters) -> None:
        """Nothing: `goose-jax merge` does it."""

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """The merged model."""
        return merge_lora(self.model, trained, self._config), None

    def how_to_use(self, run: Path, tokenizer: str) -> list[str]:
        """Merge, then generate."""
        del tokenizer  # which the run knows
        merged = shlex.quote(str(run / "merged"))
        names = f"{shlex.quote(str(run))} --base {shlex.quote(str(self._path))}"
        return [f"goose-jax merge {names} --out {merged}", f"goose-jax generate {merged}"]


class InitialState(_Beside):
    """The states that a text begins with are trained; attributes and methods as of `Full`."""

    purpose = "the states that a text begins with"

    def __init__(self, model: RWKV7, path: Path, start: Path | None):
        super().__init__(model, path, None)
        config = model.config
        self.losses = state_losses(model)
        self.initial = init_wkv(config) if start is None else wkv_of(load_state(start, config))

    def export(self, run: Path, trained: Parameters) -> None:
        """Writes the states for the official ecosystem."""
        config = self.model.config
        new = run / f".{STATE_FILE}.new"
        new.unlink(missing_ok=True)  # of a run that was killed
        save_state(new, tuned_state(trained, config), config, "time_state")
        new.replace(run / STATE_FILE)

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """The model as it was, and the state."""
        return self.model, tuned_state(trained, self.model.config)

    def how_to_use(self, run: Path, tokenizer: str) -> list[str]:
        """Generate from the state."""
        base, file, name = map(shlex.quote, (str(self._path), str(run / STATE_FILE), tokenizer))
        return [f"goose-jax generate {base} --state {file} --tokenizer {name}"]


type Tuning = Full | Lora | InitialState


def load_base(settings: TrainSettings) -> tuple[RWKV7, CheckpointMetadata]:
    """The model to fine-tune: in float32 if it is itself trained."""
    dtype = "float32" if settings.tune == "full" else settings.frozen_dtype
    return load_pretrained(
        known(settings.from_),
        dtype=dtype,
        compute_dtype=settings.compute_dtype or default_compute_dtype(),
        remat=settings.remat,
    )


def tuning_of(settings: TrainSettings, model: RWKV7) -> Tuning:
    """What the settings say is trained.

    Args:
      settings: after `with_defaults`.
      model: a new one, or that of `load_base`.
    """
    match settings.tune:
        case "lora":
            path, config = known(settings.from_), settings.lora_config()
            return Lora(model, path, config, settings.seed)
        case "state":
            return InitialState(model, known(settings.from_), settings.state)
        case _:
            return Full(model)


__all__ = ["STATE_FILE", "Full", "InitialState", "Lora", "Tuning", "load_base", "tuning_of"]
