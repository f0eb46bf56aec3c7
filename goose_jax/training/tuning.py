"""The parts of a model that a run can train: all of it, LoRA adapters, or its initial state."""

from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import Mesh

from goose_jax.checkpoints import (
    CheckpointError,
    CheckpointMetadata,
    Saving,
    begin_checkpoint,
    load_checkpoint,
    save_state,
)
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.checkpoints.native import DESCRIPTION, open_checkpoint, read_description
from goose_jax.nn import RWKV7, abstract_model
from goose_jax.parallel.placement import to_host
from goose_jax.state import RWKV7State
from goose_jax.training.lora import LoraConfig, init_lora, lora_loss, merge_lora
from goose_jax.training.loss import L2WRAP
from goose_jax.training.state_tuning import init_wkv, state_loss, tuned_state, wkv_of
from goose_jax.training.step import (
    Loss,
    Parameters,
    check_trainable,
    full_loss,
    with_params,
)
from goose_jax.training.tuning_checkpoint import (
    TuningCheckpoint,
    begin_tuning_checkpoint,
    check_base,
    load_tuning_checkpoint,
)

STATE_FILE = "state.pth"
"""The file in which a finished run of state tuning leaves the initial state."""


class Tuning(Protocol):
    """What a run trains, and how that is saved and loaded."""

    @property
    def model(self) -> RWKV7:
        """The model. Its structure is used, and its parameters where they are frozen."""
        ...

    @property
    def loss(self) -> Loss:
        """The loss to minimise, a function of trained parameters, frozen ones and a batch."""
        ...

    @property
    def frozen(self) -> Parameters:
        """The parameters that are not trained; `{}` if all are trained."""
        ...

    def init(self) -> Parameters:
        """Returns the trained parameters before the first step. A run calls this once at most."""
        ...

    def load(
        self, path: Path, *, mesh: Mesh | None = None
    ) -> tuple[Parameters, CheckpointMetadata]:
        """Loads the trained parameters and the metadata from a checkpoint that `begin_save` wrote.

        Args:
          path: directory of the checkpoint.
          mesh: the mesh that the parameters are divided over; None for one device.

        Raises:
          FileNotFoundError: if `path` does not exist.
          CheckpointError: if it is no such checkpoint, is damaged, or belongs to another model.
        """
        ...

    def begin_save(
        self,
        path: Path,
        trained: Parameters,
        metadata: CheckpointMetadata,
        *,
        opt_state: Any = None,
    ) -> Saving:
        """Begins to write a checkpoint to a new directory, as `begin_checkpoint` does.

        Raises:
          FileExistsError: if `path` exists.
          OSError: if the disk has no space for the checkpoint.
        """
        ...

    def export(self, folder: Path, trained: Parameters) -> None:
        """Writes files that a finished run leaves in its folder beside checkpoints, if any.

        In a run of several processes all call this, and the first one writes.
        """
        ...

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """Returns the model that came out, and the state that its texts begin with (or None)."""
        ...


class FullTuning:
    """Trains all parameters of a model. A `Tuning`.

    Args:
      model: the model to start from, with parameters in float32. They are kept until `init` hands
        them over, so that a training run holds them once.
      l2wrap: factor of the pull on large logits, as for `token_losses`.

    Raises:
      ValueError: if the parameters have fewer than 32 bits.

    Attributes:
      model: the structure of the model; its parameters are `jax.ShapeDtypeStruct`s.
      loss: the loss of the whole model.
      frozen: `{}`.
    """

    def __init__(self, model: RWKV7, *, l2wrap: float = L2WRAP):
        check_trainable(model.config)
        self.model = abstract_model(model.config)
        self.loss = full_loss(model, l2wrap=l2wrap)
        self.frozen: Parameters = {}
        self._initial: Parameters | None = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @classmethod
    def from_checkpoint(
        cls, path: Path | str, *, l2wrap: float = L2WRAP, **overrides: Any
    ) -> "FullTuning":
        """Describes the training of a checkpoint's model, whose parameters `load` then loads.

        `init` cannot be used.

        Args:
          path: directory of a checkpoint, or of a training run, whose newest intact one is used.
          l2wrap: factor of the pull on large logits, as for `token_losses`.
          **overrides: other values for fields of `RWKV7Config` that do not determine shapes, such
            as `remat`.

        Raises:
          FileNotFoundError: if `path` does not exist.
          CheckpointError: if it holds no model, or is damaged.
          ValueError: if an override is out of range.
        """
        config, _ = read_description(open_checkpoint(path, only=DESCRIPTION), **overrides)
        tuning = cls(abstract_model(config), l2wrap=l2wrap)
        tuning._initial = None
        return tuning

    def init(self) -> Parameters:
        """Hands over the parameters of the model that training starts from.

        Raises:
          RuntimeError: if they are not here: an earlier call has handed them over, or `load` loads
            them.
        """
        if self._initial is None:
            raise RuntimeError(
                "FullTuning has no parameters to start from: they have been handed over, or they "
                "are in a checkpoint"
            )
        initial, self._initial = self._initial, None
        return initial

    def load(
        self, path: Path, *, mesh: Mesh | None = None
    ) -> tuple[Parameters, CheckpointMetadata]:
        """Loads the parameters of the model in a checkpoint, and the checkpoint's metadata.

        Args:
          path: directory of the checkpoint, or of a run, whose newest intact one is loaded.
          mesh: the mesh that the parameters are divided over; None for one device.

        Raises:
          FileNotFoundError: if `path` does not exist.
          CheckpointError: if it holds no model, or is damaged.
        """
        model, metadata = load_checkpoint(path, mesh=mesh)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), metadata

    def begin_save(
        self,
        path: Path,
        trained: Parameters,
        metadata: CheckpointMetadata,
        *,
        opt_state: Any = None,
    ) -> Saving:
        """Begins to write a checkpoint of the model to a new directory.

        Raises:
          FileExistsError: if `path` exists.
          OSError: if the disk has no space for the checkpoint.
        """
        model = with_params(self.model, trained)
        return begin_checkpoint(path, model, metadata, opt_state=opt_state)

    def export(self, folder: Path, trained: Parameters) -> None:
        """Writes nothing: the checkpoint is the model."""

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """Returns the trained model, whose texts begin with no state."""
        return with_params(self.model, trained), None


class _TuningBesideModel:
    """Trains parameters beside a model, all of whose own parameters are frozen."""

    def __init__(self, model: RWKV7, base_path: Path | str, lora: LoraConfig | None):
        self.model = model
        self.frozen: Parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self._base_path, self._lora = Path(base_path), lora
        self._fingerprint = fingerprint(model)

    def load(
        self, path: Path, *, mesh: Mesh | None = None
    ) -> tuple[Parameters, CheckpointMetadata]:
        """Loads the trained parameters in a checkpoint, and the checkpoint's metadata.

        Args:
          path: directory of the checkpoint, or of a run, whose newest intact one is loaded.
          mesh: the mesh that the parameters are divided over; None for one device.

        Raises:
          FileNotFoundError: if `path` does not exist.
          CheckpointError: if it is damaged, belongs to another model, or holds something else than
            what is trained here.
        """
        checkpoint = load_tuning_checkpoint(path, mesh=mesh)
        check_base(checkpoint, self.model, self._base_path)
        if checkpoint.lora != self._lora:
            raise CheckpointError(f"{path} has {checkpoint.lora}, but {self._lora} is trained here")
        return checkpoint.params, checkpoint.metadata

    def begin_save(
        self,
        path: Path,
        trained: Parameters,
        metadata: CheckpointMetadata,
        *,
        opt_state: Any = None,
    ) -> Saving:
        """Begins to write a checkpoint of the trained parameters to a new directory.

        Raises:
          FileExistsError: if `path` exists.
          OSError: if the disk has no space for the checkpoint.
        """
        checkpoint = TuningCheckpoint(
            params=trained,
            lora=self._lora,
            base_config=self.model.config,
            base_fingerprint=self._fingerprint,
            base_path=str(self._base_path.absolute()),
            metadata=metadata,
        )
        return begin_tuning_checkpoint(path, checkpoint, opt_state=opt_state)


class LoraTuning(_TuningBesideModel):
    """Trains LoRA adapters beside the projection matrices of a frozen model. A `Tuning`.

    Args:
      model: the model, in any dtype.
      config: size and weight of the adapters.
      base_path: path that the model was loaded from, for checkpoints and messages.
      seed: seed of the adapters' initial values.
      l2wrap: factor of the pull on large logits, as for `token_losses`.

    Attributes:
      model: the model.
      loss: the loss of the model with adapters.
      frozen: the parameters of the model.
    """

    def __init__(
        self,
        model: RWKV7,
        config: LoraConfig,
        *,
        base_path: Path | str,
        seed: int,
        l2wrap: float = L2WRAP,
    ):
        super().__init__(model, base_path, config)
        self.loss = lora_loss(model, config, l2wrap=l2wrap)
        self._config, self._seed = config, seed

    def init(self) -> Parameters:
        """Returns new adapters, which do not change the model yet."""
        return init_lora(self.frozen, self._config, jax.random.key(self._seed))

    def export(self, folder: Path, trained: Parameters) -> None:
        """Writes nothing: `result` merges the adapters."""

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """Returns the model merged with the adapters, whose texts begin with no state."""
        return merge_lora(self.model, trained, self._config), None


class StateTuning(_TuningBesideModel):
    """Trains the state that texts begin with, beside a frozen model. A `Tuning`.

    Args:
      model: the model, in any dtype.
      base_path: path that the model was loaded from, for checkpoints and messages.
      start: the state to start from, of one row and with token shifts of zero; None starts from
        zeros.
      l2wrap: factor of the pull on large logits, as for `token_losses`.

    Raises:
      ValueError: if `start` has several rows, or a token shift that is not zero.

    Attributes:
      model: the model.
      loss: the loss of the model with the state.
      frozen: the parameters of the model.
    """

    def __init__(
        self,
        model: RWKV7,
        *,
        base_path: Path | str,
        start: RWKV7State | None = None,
        l2wrap: float = L2WRAP,
    ):
        super().__init__(model, base_path, None)
        self.loss = state_loss(model, l2wrap=l2wrap)
        self._initial = init_wkv(model.config) if start is None else wkv_of(start)

    def init(self) -> Parameters:
        """Returns the state to start from, as `{"wkv": [layers, H, K, V]}`."""
        return self._initial

    def export(self, folder: Path, trained: Parameters) -> None:
        """Writes the state to `STATE_FILE`, in the layout of the official ecosystem."""
        config, trained = self.model.config, jax.tree.map(to_host, trained)
        if jax.process_index() > 0:
            return
        new = folder / f".{STATE_FILE}.new"
        new.unlink(missing_ok=True)  # left behind if an earlier process was killed
        save_state(new, tuned_state(trained, config), config, "time_state")
        new.replace(folder / STATE_FILE)

    def result(self, trained: Parameters) -> tuple[RWKV7, RWKV7State | None]:
        """Returns the model, which has not changed, and the tuned state."""
        return self.model, tuned_state(trained, self.model.config)


__all__ = ["STATE_FILE", "FullTuning", "LoraTuning", "StateTuning", "Tuning"]
