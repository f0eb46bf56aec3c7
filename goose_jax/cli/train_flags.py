"""The flags of `goose-jax train`, as they are typed and as a run's folder records them."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from goose_jax.config import Dtype, Remat
from pallas_kernels.validation import check_positive

type Tune = Literal["full", "lora", "state"]

_POSITIVE = (
    "steps",
    "batch_size",
    "microbatches",
    "sequence_length",
    "held_out_bytes",
    "evaluate_every",
    "save_every",
    "keep",
)
_PATHS = ("data", "out", "from_", "state")
_OF_A_NEW_MODEL = ("num_layers", "hidden_size", "head_size")
_OF_LORA = ("lora_rank", "lora_alpha")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The text to train on, what to train, and how. `None` stands for a flag that was left out.

    Attributes:
      data: a UTF-8 text file or a folder of text files; by default the sources of this Python's
        standard library.
      pattern: which files of the folder are read, as in "*.txt".
      out: the run gets a numbered folder of its own in this folder.
      resume: folder of a run to continue. The run keeps its settings, so no other flag may be
        given.
      from_: checkpoint of a model to fine-tune: a .pth or safetensors file, a folder of Hugging
        Face, a checkpoint of goose-jax or the folder of a run. By default a new model is trained.
      tune: with --from, what is trained. full: the whole model; lora: adapters beside its matrices;
        state: only the states that a text begins with. By default full.
      lora_rank: with --tune lora, rank of the adapters; by default 16.
      lora_alpha: with --tune lora, the adapters are scaled by alpha / rank; by default 32.
      state: with --tune state, a file with the initial states to start from; by default those that
        lie beside the weights, or zeros.
      tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file. By default the
        tokenizer that the checkpoint names, or byte for a new model.
      num_layers: number of blocks of a new model; by default 2.
      hidden_size: width of a new model, a multiple of the head size; by default 128.
      head_size: channels of each head of a new model; by default 64.
      frozen_dtype: with --tune lora or state, dtype of the frozen model's parameters; by default
        the dtype in the checkpoint.
      compute_dtype: dtype of activations; by default float32 on a CPU, bfloat16 elsewhere.
      remat: what the backward pass computes again to save memory.
      steps: number of optimizer steps.
      batch_size: number of sequences that are read at once.
      microbatches: number of batches whose gradients make one optimizer step.
      sequence_length: tokens of a sequence; by default 128, with --from 512.
      learning_rate: learning rate at its peak; by default 3e-3, with --from 2e-5 (full), 2e-4
        (lora) or 0.1 (state).
      final_learning_rate: learning rate at the end; by default 2e-4, with --from a tenth of the
        learning rate at the peak.
      warmup_steps: number of steps until the learning rate is at its peak.
      weight_decay: weight decay of the large matrices, but not of adapters and states; by default
        0.1, with --from 0.
      held_out_bytes: bytes of text that are not trained on, but used to measure bits per byte; at
        most a tenth of the text.
      evaluate_every: number of steps between two measurements. The run also measures before the
        first step and after the last.
      save_every: number of steps between two checkpoints. The run also saves at the end and at
        Ctrl-C.
      keep: number of checkpoints to keep; older ones are removed.
      plot: draw the loss curve (needs matplotlib).
      prompt: text that the sample at the end continues.
      sample_length: tokens of the sample at the end; 0 for none.
      seed: seed of initial weights or adapters, batches and the sample.
    """

    data: Path | None = None
    pattern: str = "*"
    out: Path = Path("runs")
    resume: Path | None = None
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    tune: Tune | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    state: Path | None = None
    tokenizer: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    head_size: int | None = None
    frozen_dtype: Dtype | None = None
    compute_dtype: Dtype | None = None
    remat: Remat = "dots"
    steps: int = 1200
    batch_size: int = 8
    microbatches: int = 1
    sequence_length: int | None = None
    learning_rate: float | None = None
    final_learning_rate: float | None = None
    warmup_steps: int = 30
    weight_decay: float | None = None
    held_out_bytes: int = 32768
    evaluate_every: int = 300
    save_every: int = 300
    keep: int = 2
    plot: bool = True
    prompt: str = "def "
    sample_length: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("sample_length", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.sample_length and not self.prompt:
            raise ValueError("prompt must not be empty; sample_length=0 turns the sample off")
        if self.resume is None:
            self._check_fits_together()

    def _check_fits_together(self) -> None:
        tuned = ("tune", "frozen_dtype", *_OF_LORA, "state")
        if self.from_ is None:
            self._refuse(tuned, "needs --from CHECKPOINT, the model to tune")
            return
        self._refuse(_OF_A_NEW_MODEL, "cannot be given with --from: the checkpoint tells it")
        if self.tune != "lora":
            self._refuse(_OF_LORA, "needs --tune lora")
        if self.tune != "state":
            self._refuse(("state",), "needs --tune state")
        if self.tune in (None, "full"):
            self._refuse(("frozen_dtype",), "needs --tune lora or state: else nothing is frozen")

    def _refuse(self, names: Iterable[str], why: str) -> None:
        given = [option(name) for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)} {why}")

    def to_json(self) -> dict[str, Any]:
        """Returns all flags but `resume` as values that JSON can hold."""
        values = dataclasses.asdict(self)
        del values["resume"]
        for name in _PATHS:
            if values[name] is not None:
                values[name] = str(values[name] if name == "out" else values[name].absolute())
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainFlags":
        """Returns the flags that `to_json` gave.

        Raises:
          ValueError: if a flag is unknown, or a value is out of range.
        """
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"the run has settings that are unknown here: {unknown}")
        paths = {name: Path(values[name]) for name in _PATHS if values.get(name)}
        return cls(**(dict(values) | paths))


def option(name: str) -> str:
    """Returns the flag of a field, such as "--batch-size" for "batch_size"."""
    return "--" + name.rstrip("_").replace("_", "-")


__all__ = ["TrainFlags", "Tune", "option"]
