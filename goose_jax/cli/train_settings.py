"""What `goose-jax train` can be told."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from goose_jax.config import RWKV7Config
from goose_jax.training.optimizer import OptimizerConfig
from pallas_kernels.validation import check_positive

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on, what to train, and how.

    Attributes:
      data: a UTF-8 text file, or a folder of them; by default the sources of this Python's standard
        library.
      pattern: which files of the folder count, as in "*.txt".
      out: folder in which the run gets a folder of its own, with a number that is free.
      resume: folder of a run to go on with; it keeps its settings, so no others can be given.
      num_layers: number of blocks.
      hidden_size: channels of the residual stream, a multiple of the head size.
      head_size: channels of a head.
      compute_dtype: dtype of activations; by default float32 on a CPU, bfloat16 elsewhere.
      remat: what the backward pass computes again to save memory.
      steps: optimizer steps.
      batch_size: sequences that are read at once.
      microbatches: batches whose gradients make one optimizer step.
      sequence_length: bytes of a sequence.
      learning_rate: at its peak.
      final_learning_rate: at the end.
      warmup_steps: steps until the peak.
      weight_decay: of the large matrices.
      held_out_bytes: how much text is kept out of training to measure bits per byte on; at most a
        tenth of all.
      evaluate_every: steps between two such measurements; it is also done before and after.
      save_every: steps between two checkpoints; one is also saved at the end and at Ctrl-C.
      keep: how many of the newest checkpoints are kept.
      plot: draw the loss curve (needs matplotlib).
      prompt: what the sample at the end continues.
      sample_length: bytes of the sample at the end; 0 for none.
      seed: of the initial weights, the batches and the sample.
    """

    data: Path | None = None
    pattern: str = "*"
    out: Path = Path("runs")
    resume: Path | None = None
    num_layers: int = 2
    hidden_size: int = 128
    head_size: int = 64
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["none", "dots", "full"] = "none"
    steps: int = 1200
    batch_size: int = 8
    microbatches: int = 1
    sequence_length: int = 128
    learning_rate: float = 3e-3
    final_learning_rate: float = 2e-4
    warmup_steps: int = 30
    weight_decay: float = 0.1
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
            check_positive(name, getattr(self, name))
        for name in ("sample_length", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.sample_length and not self.prompt:
            raise ValueError("prompt must not be empty; sample_length=0 turns the sample off")

    def to_json(self) -> dict[str, Any]:
        """All but `resume`, as JSON can hold it."""
        values = dataclasses.asdict(self) | {"out": str(self.out)}
        del values["resume"]
        return values | {"data": None if self.data is None else str(self.data.absolute())}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainSettings":
        """What `to_json` described.

        Raises:
          ValueError: if a value is unknown or out of range.
        """
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"the run has settings that are unknown here: {unknown}")
        paths = {name: Path(values[name]) for name in ("data", "out") if values.get(name)}
        return cls(**(dict(values) | paths))

    def model_config(self, vocab_size: int) -> RWKV7Config:
        """The model's configuration, with a compute dtype that suits the machine."""
        on_cpu = jax.default_backend() == "cpu"
        return RWKV7Config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            head_size=self.head_size,
            compute_dtype=self.compute_dtype or ("float32" if on_cpu else "bfloat16"),
            remat=self.remat,
        )

    def optimizer_config(self) -> OptimizerConfig:
        """The optimizer's configuration."""
        return OptimizerConfig(
            total_steps=self.steps,
            learning_rate=self.learning_rate,
            final_learning_rate=self.final_learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
        )


__all__ = ["TrainSettings"]
